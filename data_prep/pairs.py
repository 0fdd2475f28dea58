"""Preference pairs from problems, one a problem, and what stock trainers take.

    python -m data_prep.pairs from-problems data/twins/train.jsonl --out data/twins/train.pairs.jsonl \\
        --kinds other_answer,language_prior,symmetric --model assets/tiny
    python -m data_prep.pairs check data/twins/train.pairs.jsonl
    python -m data_prep.pairs export data/twins/train.pairs.jsonl --out data/twins/train.pairs.parquet

The better side is the problem in one view with its right answer. The kinds say what is worse:

    other_answer    `rejected`: a wrong option drawn by (seed, id), or with --other-answer model what the model says with the
                    picture in view; of a closed question its most likely wrong option, which it says itself where it is wrong
    language_prior  `rejected_prior`: what the model says without looking. --prior blind: no picture; gray: a gray one of the
                    same size; continued: the first half of the right answer's tokens, continued without the picture, as in
                    DropoutNTP (Wang et al., 2024; arXiv 2411.10442), which brings few refusals; of answers of one token
                    nothing is left to continue. No prior sees the facts
    other_image     `rejected_images`: a picture that differs in one fact, so that the right answer is wrong for it. Only twins
                    have such; of other problems training draws the negative itself (a crop, noise, gray, another picture)
    symmetric       the same, with its own right answer, which is `rejected` too unless other_answer is asked for

Where the most likely option without the picture is the right one, the words are enough, and there is no prior to unlearn: it is
dropped as equal to the answer. --prior-wrong takes the most likely wrong option instead. What else is dropped stands in
data_prep.pair_filters. A pair that keeps no negative is left out.

What a model said is kept beside OUT in <name>.answers.jsonl as it comes: the same command continues a run that was cut short,
and with another seed or other kinds nothing is asked twice.
"""

import argparse
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import PIL.Image
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from data_prep.libraries import console, offline_if_local, one_sentence, quiet
from data_prep.pair import Pair, read_pairs, to_row, write_pairs
from data_prep.pair_answers import Answers, ask
from data_prep.pair_build import KINDS, PRIORS, Wanted, has_world, pair_of
from data_prep.pair_filters import Tally
from data_prep.problem import Problem, ProblemError, View, possible_views, read_problems
from data_prep.provenance import file_sha256, non_commercial, parents, write_json
from data_prep.read import check_beside, replacing
from data_prep.sources.common import positive

ROWS = 100      # of parquet, written at a time


def make(args: argparse.Namespace, load: Callable[[], Any]) -> None:
    """Write the pairs of a file. `load` makes the Answerer, after everything cheap has been checked."""
    check_beside("--out", args.out, args.file)
    wanted = Wanted(args.kinds, args.view, args.seed, args.other_answer, args.prior, args.prior_wrong)
    problems = read_problems(args.file, verify="header", skip_bad=args.skip_bad)[:args.limit]
    shown = [problem for problem in problems if View(args.view) in possible_views(problem)]
    asked = [(problem, way) for problem in shown for way in wanted.ways.values()]
    said, identity = None, {}
    if wanted.ways and args.model is None:
        kind = "language_prior" if "language_prior" in args.kinds else "other_answer with --other-answer model"
        raise ProblemError(f"--kinds {kind}: asks a model; give --model")
    if args.model is not None and not wanted.ways:
        raise ProblemError(f"--model {args.model}: is asked nothing by --kinds {','.join(args.kinds)}")
    if asked:
        answerer = load()
        identity = answerer.identity()
        answers = Answers(args.out.with_name(f"{args.out.stem}.answers.jsonl"), identity, args.max_new_tokens)
        ask(answerer, asked, answers, batch_size=args.batch_size)
        said = answers.get
    tally, pairs = Tally(), []
    for problem in tqdm(shown, desc=args.out.name, unit="pair", mininterval=1, delay=2, disable=None, file=sys.stderr):
        if pair := pair_of(problem, wanted, said, tally):
            pairs.append(pair)
    console().print(tally.table())
    for line in _left_out(problems, shown, pairs, wanted):
        print(f"{args.file}: {line}")
    if not pairs:
        raise ProblemError(f"--out {args.out}: no pair is left, so it is not written")
    write_pairs(args.out, pairs)
    write_json(args.out.with_suffix(".json"), {
        **asdict(wanted), "limit": args.limit, **identity, **parents(), "data": str(args.file),
        "data_sha256": file_sha256(args.file), "n": len(pairs), "negatives": tally.counts()})
    print(f"{args.out}: {len(pairs)} pairs")
    _say_licences(pairs)


def _left_out(problems: list[Problem], shown: list[Problem], pairs: list[Pair], wanted: Wanted) -> Iterator[str]:
    counts = {f"cannot be shown in view {wanted.view}": len(problems) - len(shown)}
    if "other_answer" in wanted.kinds and wanted.other_answer == "option":
        counts["are open: there is no option to draw from"] = sum(problem.options is None for problem in shown)
    if wanted.pictured:
        worlds = sum(map(has_world, shown))
        counts["have no counterfactual"] = worlds - sum(bool(pair.rejected_images) for pair in pairs)
        counts["are no twins: their other pictures are left to training, which draws them"] = len(shown) - worlds
    counts["keep no negative and are left out"] = len(shown) - len(pairs)
    for why, count in counts.items():
        if count:
            yield f"{count} of {len(problems)} problems {why}"


def _licences(pairs: Sequence[Pair]) -> list[tuple[str, int]]:
    return sorted(Counter(pair.license for pair in pairs).items())


def _say_licences(pairs: Sequence[Pair]) -> None:
    for name, count in _licences(pairs):
        if non_commercial(name):
            print(f"{name}: {count} pairs, non-commercial use only")


def summary(pairs: Sequence[Pair]) -> Table:
    """Per source: counts, what the worse sides are, lengths and licences."""
    columns = {}
    for source in sorted({pair.source for pair in pairs}):
        part = [pair for pair in pairs if pair.source == source]
        both = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in part if pair.rejected is not None]
        longer = sum(chosen > rejected for chosen, rejected in both), sum(chosen < rejected for chosen, rejected in both)
        columns[source] = {
            "pairs": str(len(part)),
            "groups": str(len({pair.group for pair in part})),
            "pictures": str(len({name for pair in part for name in (*pair.images, *pair.rejected_images)})),
            "without picture": str(sum(not pair.images for pair in part)),
            **{field: str(sum(bool(getattr(pair, field)) for pair in part))
               for field in ("rejected", "rejected_prior", "rejected_images", "rejected_images_answer")},
            **{f"words of {field}": _span([len(text.split()) for pair in part if (text := getattr(pair, field))])
               for field in ("chosen", "rejected", "rejected_prior")},
            "longer of chosen and rejected": f"chosen {longer[0]}, rejected {longer[1]}" if both else "-",
            "licences": ", ".join(f"{name} ({count})" for name, count in _licences(part)),
        }
    table = Table("", *map(escape, columns))
    for name in next(iter(columns.values()), {}):
        table.add_row(name, *(escape(column[name]) for column in columns.values()))
    return table


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}, mean {sum(counts) / len(counts):.1f}" if counts else "-"


def export(pairs: Sequence[Pair], out: Path) -> int:
    """Write the pairs that have a `rejected` as parquet for the stock trainers; returns their number.

    Columns: images (Hugging Face's Image, bytes inside), prompt, chosen, rejected, id, source, license.
    Raises ProblemError when none has one, or a picture cannot be read.
    """
    kept = [pair for pair in pairs if pair.rejected is not None]
    if not kept:
        raise ProblemError(f"none of {len(pairs)} pairs has a rejected answer, so {out} is not written")
    import pyarrow      # here, because the library behind the features takes seconds and the other commands should not
    import pyarrow.parquet
    from datasets import Features, Image, List, Value

    messages = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    schema = Features({"images": List(Image()), "prompt": messages, "chosen": messages, "rejected": messages,
                       **{name: Value("string") for name in ("id", "source", "license")}}).arrow_schema
    with replacing(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        with tqdm(total=len(kept), desc=out.name, unit="pair", delay=2, disable=None, file=sys.stderr) as bar:
            for start in range(0, len(kept), ROWS):
                rows = [_exported(pair) for pair in kept[start:start + ROWS]]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                bar.update(len(rows))
    return len(kept)


def _exported(pair: Pair) -> dict[str, Any]:
    row = to_row(pair)
    found = {name: row[name] for name in ("prompt", "chosen", "rejected", "id", "source", "license")}
    pictures = zip(pair.images, pair.load())
    return {**found, "images": [{"bytes": _plain(pair.root / name, loaded), "path": name} for name, loaded in pictures]}


def _plain(file: Path, loaded: PIL.Image.Image) -> bytes:
    """The file; where other readers would see other pixels than Pair.load (rotation, transparency, 16 bits), a PNG of these."""
    data = file.read_bytes()
    with PIL.Image.open(io.BytesIO(data)) as image:
        if image.mode in ("L", "RGB") and not image.has_transparency_data and image.size == loaded.size:
            if image.convert("RGB").tobytes() == loaded.tobytes():
                return data
    loaded.save(drawn := io.BytesIO(), format="PNG")
    return drawn.getvalue()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_prep.pairs", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("from-problems", help="make pairs from a file of problems", description=__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    make.add_argument("file", type=Path, metavar="FILE.jsonl")
    make.add_argument("--out", type=Path, required=True, metavar="PAIRS.jsonl", help="in the folder of FILE.jsonl")
    make.add_argument("--kinds", type=_kinds, required=True, metavar="KIND,...", help=f"of {', '.join(KINDS)}")
    make.add_argument("--view", choices=("vision", "both"), default="vision", help="of the prompt (default: %(default)s)")
    make.add_argument("--limit", type=positive, help="at most this many problems, the first of the file")
    make.add_argument("--seed", type=int, default=0, help="of drawn options and pictures (default: %(default)s)")
    make.add_argument("--other-answer", choices=("option", "model"), default="option", help="(default: %(default)s)")
    make.add_argument("--prior", choices=PRIORS, default="blind", help="(default: %(default)s)")
    make.add_argument("--prior-wrong", action="store_true", help="where the prior is right, its most likely wrong option")
    make.add_argument("--model", help="local folder or hub id")
    make.add_argument("--adapter", help="a PEFT adapter folder")
    make.add_argument("--revision", help="of a hub model")
    make.add_argument("--batch-size", type=positive, default=32, help="prompts at a time (default: %(default)s)")
    make.add_argument("--max-new-tokens", type=positive, default=256, help="of a generated answer (default: %(default)s)")
    make.add_argument("--min-pixels", type=positive)
    make.add_argument("--max-pixels", type=positive)
    make.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    check = commands.add_parser("check", help="read a file of pairs, decode its pictures and print what it holds")
    check.add_argument("file", type=Path, metavar="PAIRS.jsonl")
    write = commands.add_parser("export", help="write what stock TRL's DPOTrainer takes: parquet with the pictures inside")
    write.add_argument("file", type=Path, metavar="PAIRS.jsonl")
    write.add_argument("--out", type=Path, required=True, metavar="PAIRS.parquet")
    for command in (make, check, write):
        command.add_argument("--skip-bad", action="store_true", help="leave bad rows out, write them to <name>.bad.jsonl")
    args = parser.parse_args(argv)
    if args.command == "export" and args.out.suffix != ".parquet":
        parser.error(f"--out {args.out}: must be a .parquet file")
    return args


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(text.split(",")))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: not among {', '.join(KINDS)}")
    return kinds


def _make(args: argparse.Namespace) -> None:
    quiet()
    if args.model is None:
        make(args, lambda: None)
        return
    offline_if_local(args.model)
    from data_prep.answerer import Answerer, ModelError

    with one_sentence(ModelError):
        make(args, lambda: Answerer.of(args))


def _export(args: argparse.Namespace) -> None:
    pairs = read_pairs(args.file, verify="header", skip_bad=args.skip_bad)
    count = export(pairs, args.out)
    left = len(pairs) - count
    print(f"{args.out}: {count} pairs" + (f"; {left} without a rejected answer are left out" if left else ""))
    _say_licences([pair for pair in pairs if pair.rejected is not None])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with one_sentence(ProblemError):
        if args.command == "from-problems":
            _make(args)
        elif args.command == "export":
            _export(args)
        else:
            pairs = read_pairs(args.file, skip_bad=args.skip_bad)
            console().print(summary(pairs))
            _say_licences(pairs)


if __name__ == "__main__":
    main()
