"""Balance methods on two branches, against plain training, over several seeds.

    python -m benchmarks.two_branches --out results/two_branches [--seeds 0,1,2,3,4] [--methods miles,cggm] [--jobs 1]
    python -m benchmarks.two_branches --tune --out results/two_branches
    python -m benchmarks.two_branches --readme [--check]

The first writes two_branches.json and two_branches.svg. Interrupted, it goes on where it was: rows stand in rows.jsonl.part,
and one that was made by other code or settings is made anew. Plain training and controls are added to the methods named.
--tune tries settings on the validation split, with seeds that are not reported, and writes tuning.json. --readme brings the
table of benchmarks/README.md up to date; with --check it writes nothing and exits 1 when that is not so.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.two_branches import summary as said
from benchmarks.two_branches.rows import CANDIDATES, METHODS, TUNING_SEEDS, fingerprint, reference, row, tried
from benchmarks.two_branches.task import Task
from data_prep import libraries
from data_prep.provenance import parents, write_json
from eval.parents import rounded

RESULT = Path("results/two_branches/two_branches.json")
DOCUMENT = Path("benchmarks/README.md")
ROWS = "rows.jsonl.part"


def wanted(names: str | None) -> list[str]:
    """The methods named and what they are compared with, in the order of the table; all of them for none."""
    if names is None:
        return list(METHODS)
    asked = names.split(",")
    if unknown := [name for name in asked if name not in METHODS]:
        raise SystemExit(f"error: no such method: {unknown[0]}; there are {', '.join(METHODS)}")
    asked += [other for name in asked for other in (METHODS[name].plain, METHODS[name].control) if other]
    return [name for name in METHODS if name in asked]


def seeds_of(text: str) -> list[int]:
    try:
        seeds = [int(one) for one in text.split(",")]
    except ValueError:
        raise SystemExit(f"error: --seeds takes whole numbers with commas between them, not '{text}'") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise SystemExit(f"error: --seeds must differ and not be negative: {text}")
    if spent := sorted(set(seeds) & set(TUNING_SEEDS)):
        raise SystemExit(f"error: settings were chosen with seed {spent[0]}; report another one")
    return seeds


def kept(path: Path, task: Task) -> dict[tuple[str, int], dict]:
    """Rows of an earlier run that the present code and settings would make again; a line cut short by a kill counts as none."""
    found, now = {}, {name: fingerprint(name, task) for name in METHODS}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if one["fingerprint"] == now.get(one["method"]):
            found[one["method"], one["seed"]] = one
    return found


def made(todo: Sequence[tuple[str, int]], task: Task, jobs: int) -> Iterator[dict]:
    if jobs == 1:
        yield from (row(name, seed, task) for name, seed in todo)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for one in as_completed([pool.submit(row, name, seed, task) for name, seed in todo]):
            yield one.result()


def compare(out: Path, names: Sequence[str], seeds: Sequence[int], jobs: int, task: Task) -> dict:
    """Every row that is not there yet, then the summary and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    found = kept(out / ROWS, task)
    # Seed by seed: data of a seed are drawn once, and an interrupted run holds whole seeds.
    todo = [(name, seed) for seed in seeds for name in names if (name, seed) not in found]
    total = len(names) * len(seeds)
    with (out / ROWS).open("a", encoding="utf-8") as file, tqdm(total=total, initial=total - len(todo), unit="row") as bar:
        for one in made(todo, task, jobs):
            file.write(json.dumps(rounded(one)) + "\n")
            file.flush()
            found[one["method"], one["seed"]] = rounded(one)
            bar.set_postfix_str(f"{one['method']} seed {one['seed']}", refresh=False)
            bar.update()
    rows = [found[name, seed] for name in names for seed in seeds]
    summary = said.summarise(rows, [reference(seed, task) for seed in seeds], seeds, task)
    return rounded({**parents(), **summary, "fingerprints": {name: fingerprint(name, task) for name in names}})


def tune(out: Path, task: Task) -> None:
    found = {what: tried(what, task) for what in tqdm(CANDIDATES, unit="setting")}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "tuning.json", rounded({**parents(), "seeds": list(TUNING_SEEDS), "candidates": found}))
    for what, rows in found.items():
        for one in rows:
            values = ", ".join(f"{key} {value:g}" for key, value in one.items() if key not in ("validation", "used"))
            print(f"{what:12s} {values:24s} {100 * one['validation']:5.1f}{'  used' if one['used'] else ''}")


def document(check: bool) -> None:
    text, current = said.rewritten(DOCUMENT, json.loads(RESULT.read_text(encoding="utf-8")))
    if check and not current:
        raise SystemExit(f"out of date: the table of {DOCUMENT}. Run python -m benchmarks.two_branches --readme")
    if not check:
        DOCUMENT.write_text(text, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None, task: Task = Task()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_branches", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated (default: %(default)s)")
    parser.add_argument("--methods", help="comma-separated (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes; times are then those of a machine that is busy")
    parser.add_argument("--tune", action="store_true", help="try settings on the validation split")
    parser.add_argument("--readme", action="store_true", help=f"bring the table of {DOCUMENT} up to date")
    parser.add_argument("--check", action="store_true", help="with --readme: only look")
    args = parser.parse_args(argv)
    if args.readme:
        with libraries.one_sentence(said.SummaryError, json.JSONDecodeError):
            return document(args.check)
    if args.out is None or args.check or args.jobs < 1:
        parser.error("--out DIR says where results go; --check stands behind --readme; --jobs is at least 1")
    torch.set_num_threads(1)
    if args.tune:
        return tune(args.out, task)
    with libraries.one_sentence(said.SummaryError):
        summary = compare(args.out, wanted(args.methods), seeds_of(args.seeds), args.jobs, task)
        drawn = said.figure(summary)
        write_json(args.out / RESULT.name, summary)
        (args.out / RESULT.name).with_suffix(".svg").write_text(drawn, encoding="utf-8", newline="\n")
    console = libraries.console()
    console.print(said.terminal(summary))
    console.print(said.sentence(summary), highlight=False)
    print(f"wrote {(args.out / RESULT.name).as_posix()}", file=sys.stderr)


if __name__ == "__main__":
    main()
