"""Write twins to disk.

    python -m data_prep.twins --out data/twins [--seed 0] [--pictures train=6000,val=300,test=400,test_new=200]

One JSONL file per split and a folder of pictures. The same arguments write the same bytes.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep.problem import Problem, write_problems
from data_prep.twins.questions import KINDS, Balance, Question, ask
from data_prep.twins.worlds import FAMILIES, LEVELS, SPLITS, World, draw, sample_world

PICTURES = {"train": 6000, "val": 300, "test": 400, "test_new": 200}
LICENSE = "CC0-1.0"


def generate(split: str, pictures: int, *, seed: int = 0, families: Sequence[str] = FAMILIES,
             levels: Sequence[int] = LEVELS) -> Iterator[tuple[World, list[Question]]]:
    """Distinct worlds of a split with up to one question of each kind, families and levels in turn.

    Raises:
        ValueError: there are not that many distinct worlds.
    """
    rng, balance, seen = random.Random(f"{seed} {split}"), Balance(), set()
    for number in range(pictures):
        family, place = families[number % len(families)], number // len(families) % len(levels)
        world = next((world for level in (*levels[place:], *levels[:place])   # few things make few worlds: then take more things
                      if (world := _unseen(rng, family, level, split, seen))), None)
        if world is None:
            raise ValueError(f"{split}: no new world of {family} after {number} pictures; ask for fewer, or for more levels")
        seen.add(world.key)
        yield world, ask(world, rng, balance)


def _unseen(rng: random.Random, family: str, level: int, split: str, seen: set[str], tries: int = 200) -> World | None:
    for _ in range(tries):
        world = sample_world(rng, family, level, split)
        if world.key not in seen:
            return world
    return None


def to_problem(world: World, question: Question, root: Path) -> Problem:
    name = f"{world.family}-{world.key[:16]}"
    return Problem(
        id=f"{name}-{question.kind}", group=name, source=world.family, image=f"images/{name}.png", facts=world.facts,
        question=question.text, options=question.options, answer=question.answer, license=LICENSE,
        meta={"kind": question.kind, "level": world.level, "answer_with": "text", "rationale": question.rationale}, root=root)


def write(out: Path, pictures: dict[str, int], *, seed: int, families: Sequence[str] = FAMILIES, levels: Sequence[int] = LEVELS,
          ) -> dict[str, int]:
    """Write the splits; returns the number of problems in each."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, n in pictures.items():
        problems = []
        worlds = generate(split, n, seed=seed, families=families, levels=levels)
        for world, questions in tqdm(worlds, total=n, desc=f"twins {split}", unit="picture", mininterval=1):
            rows = [to_problem(world, question, out) for question in questions]
            if rows:
                draw(world).save(out / rows[0].image, optimize=False)
            problems += rows
        write_problems(out / f"{split}.jsonl", problems)
        counts[split] = len(problems)
    return counts


def _pictures(text: str) -> dict[str, int]:
    pictures = {}
    for item in text.split(","):
        split, _, number = item.partition("=")
        if split not in SPLITS or not number.isdigit():
            raise argparse.ArgumentTypeError(f"{item!r}: a split ({', '.join(SPLITS)}) and a number are needed: train=6000")
        pictures[split] = int(number)
    return pictures


def _subset(names: Sequence) -> Callable[[str], list]:
    def parse(text: str) -> list:
        chosen = [type(names[0])(part) for part in text.split(",")]
        if unknown := [str(c) for c in chosen if c not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(map(str, names))}")
        return chosen
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.twins",
                                     description="Write twins: problems exact in words and pixels.")
    parser.add_argument("--out", type=Path, default=Path("data/twins"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=_pictures, default=PICTURES,
                        help=f"pictures per split; up to {len(KINDS)} questions each (default: %(default)s)")
    parser.add_argument("--families", type=_subset(FAMILIES), default=FAMILIES)
    parser.add_argument("--levels", type=_subset(LEVELS), default=LEVELS, help="a world of level n holds n + 1 things")
    args = parser.parse_args(argv)
    try:
        counts = write(args.out, args.pictures, seed=args.seed, families=args.families, levels=args.levels)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for split, n in counts.items():
        print(f"{args.out / split}.jsonl: {n} problems about {args.pictures[split]} pictures")


if __name__ == "__main__":
    main()
