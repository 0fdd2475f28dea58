"""What a problem's picture is worth: how much less sure a model is of the right answer without it.

    python -m data_prep.blind data/twins/train.jsonl --model assets/tiny [--adapter DIR] [--orders 3] [--limit N]
    python -m data_prep.blind ... --keep 0.1 --out-kept data/twins/train.picture.jsonl

Every problem is answered in three views side by side: `vision`, `blind` (no picture) and `shuffled` (another problem's picture).
FILE.blind.jsonl gets one row for each problem, FILE.blind.json the settings and parents. The same command continues a run that
was cut short; rows of problems that have changed since are made again; other settings, and another file's rows, are refused.

That questions which a text-only model answers should not test vision is the filter of MMStar and MMMU-Pro, which count votes of
language models. What is ours: one model, the same with and without the picture; the probability of the right option and not a
vote; options in several orders, so that a liking for a letter cancels out; and a wrong picture as second control, because a model
may only be surer when there is any picture at all.

A gain near 0 has two causes: the words were enough, or the model cannot read the picture. A weak model's gains throw out what it
has yet to learn. `max_blind` alone, with a min_gain of -1, leaves out only what the words gave away.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from data_prep.images import picture_path
from data_prep.libraries import console, offline_if_local, one_sentence, quiet
from data_prep.problem import (
    Problem,
    ProblemError,
    Prompt,
    View,
    every_picture,
    partners,
    possible_views,
    read_problems,
    render,
    shown_options,
    write_problems,
)
from data_prep.provenance import file_sha256, parents, write_json
from data_prep.read import check_beside, dump, json_lines, parse_json, replacing

Pair = tuple[Problem, Problem | None]   # a problem and its partner
VIEWS = (View.vision, View.blind, View.shuffled)
AGAINST = ("blind", "shuffled", "both")
SHOWN_META = ("answer_with", "keep_order", "published")     # what render reads of meta in these views
GAINS = (0.05, 0.1, 0.2)    # of the summary
SCORES_VERSION = 1          # raised when the same model would get other scores
WINDOW = 8                  # batches that are sorted by length together, so that short and long prompts do not pad each other


def orders_of(problem: Problem, count: int) -> list[Problem]:
    """The problem with its options in up to `count` orders: evenly spaced rotations of the order that `render` shows.

    With as many orders as options every option stands once in every place. Open problems and those with meta.keep_order have one.
    """
    shown = shown_options(problem)
    if shown is None or problem.meta.get("keep_order"):
        return [problem]
    count = min(count, len(shown))
    starts = [number * len(shown) // count for number in range(count)]
    meta = {**problem.meta, "keep_order": True}
    return [replace(problem, options=shown[start:] + shown[:start], meta=meta) for start in starts]


class Contents:
    """Hashes of what is shown of problems; each picture file is read once."""

    def __init__(self) -> None:
        self._pictures: dict[Path, str] = {}

    def pictures(self, problem: Problem) -> list[str]:
        files = [picture_path(problem.root, name) for name in every_picture(problem)]
        for file in files:
            if file not in self._pictures:
                self._pictures[file] = file_sha256(file)
        return [self._pictures[file] for file in files]

    def of(self, problem: Problem) -> str:
        """Of id, question, options, answer and pictures; not of what these views do not show, such as facts and licence."""
        meta = {name: problem.meta[name] for name in SHOWN_META if name in problem.meta}
        return _hash([problem.id, problem.question, problem.options, problem.answer, meta, self.pictures(problem)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def score(answerer: Any, asked: Sequence[Pair], *, orders: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """The row of each problem, in order, without `content` and `key`.

    answerer: a data_prep.answerer.Answerer. asked: problems, each with its partner, whose picture `shuffled` borrows, or None.

    `p_<view>` is the probability of the right option: softmax over the options' log-likelihoods, mean over orders; of an open
    problem exp(mean log-probability per token of its answer). `correct_<view>` is the share of orders answered right; null for an
    open problem. `gain_<view>` and `correct_gain_<view>` are vision's minus that view's. Null where a view cannot be made.
    """
    for start in range(0, len(asked), window := max(1, WINDOW * batch_size // (orders * len(VIEWS)))):
        yield from _score_window(answerer, asked[start:start + window], orders, batch_size)


def _score_window(answerer: Any, window: Sequence[Pair], orders: int, batch_size: int) -> list[dict[str, Any]]:
    prompts = [(place, view, render(form, view, other)) for place, (problem, other) in enumerate(window)
               for form in orders_of(problem, orders) for view in VIEWS if view in possible_views(problem, other)]
    found: dict[tuple[int, View], list[tuple[float, bool | None]]] = defaultdict(list)
    for ask, part in ((_of_choices, [one for one in prompts if one[2].choices is not None]),
                      (_of_answers, [one for one in prompts if one[2].choices is None])):
        part.sort(key=lambda one: _size(one[2]))
        for start in range(0, len(part), batch_size):
            batch = part[start:start + batch_size]
            for (place, view, _), result in zip(batch, ask(answerer, [prompt for _, _, prompt in batch])):
                found[place, view].append(result)
    return [_row(problem, {view: found.get((place, view), []) for view in VIEWS}) for place, (problem, _) in enumerate(window)]


def _size(prompt: Prompt) -> tuple[int, int]:
    texts = [part.get("text", "") for part in prompt.messages[0]["content"]]
    return sum(image.width * image.height for image in prompt.images), sum(map(len, texts))


def _of_choices(answerer: Any, prompts: list[Prompt]) -> list[tuple[float, bool]]:
    results = []
    for prompt, scores in zip(prompts, answerer.likelihoods(prompts)):
        gold = prompt.choices.index(prompt.answer)
        odds = np.exp(np.asarray(scores) - max(scores))
        results.append((float(odds[gold] / odds.sum()), int(np.argmax(odds)) == gold))
    return results


def _of_answers(answerer: Any, prompts: list[Prompt]) -> list[tuple[float, None]]:
    return [(math.exp(value), None) for value in answerer.answer_log_probs(prompts)]


def _row(problem: Problem, found: dict[View, list[tuple[float, bool | None]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": problem.id, "source": problem.source, "group": problem.group, "n_orders": len(found[View.blind])}
    for view, results in found.items():
        right = [correct for _, correct in results if correct is not None]
        row[f"p_{view.value}"] = round(sum(p for p, _ in results) / len(results), 6) if results else None
        row[f"correct_{view.value}"] = round(sum(right) / len(right), 6) if right else None
    for view in VIEWS[1:]:
        for name, kind in (("gain", "p"), ("correct_gain", "correct")):
            with_it, without = row[f"{kind}_vision"], row[f"{kind}_{view.value}"]
            row[f"{name}_{view.value}"] = None if with_it is None or without is None else round(with_it - without, 6)
    return row


def read_scores(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a scores file by problem id. ProblemError "<file>:<line>: <field>: ..." for what data_prep.blind did not write."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        for number, line in json_lines(path):
            try:
                row = parse_json(line)
                for name in ("id", "content", "key", "p_vision", "p_blind", "gain_blind", "gain_shuffled"):
                    if not isinstance(row, dict) or name not in row:
                        raise ProblemError(f"{name}: missing field; is this what data_prep.blind wrote?")
                if row["id"] in rows:
                    raise ProblemError(f"id: {row['id']!r} stands there twice")
            except ProblemError as error:
                raise ProblemError(f"{path}:{number}: {error}") from error
            rows[row["id"]] = row
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read ({error.strerror})") from error
    return rows


def needs_picture(problems: Sequence[Problem], scores: str | Path, *, min_gain: float = 0.1,
                  against: Literal["blind", "shuffled", "both"] = "both", max_blind: float | None = None) -> list[Problem]:
    """The problems whose picture is worth at least `min_gain` in probability of the right answer, in their order.

    Args:
        scores: what `python -m data_prep.blind` wrote for these problems.
        against: no picture, another picture, or both: the smaller of the two gains. A problem whose gain is unknown (it has no
            picture, or no other problem's could be borrowed) is left out.
        max_blind: leave out what is answered without the picture with a probability above this.

    Raises:
        ProblemError: a problem has no row, or has changed since it was scored.
    """
    if against not in AGAINST:
        raise ProblemError(f"against must be one of {', '.join(AGAINST)}, not {against!r}")
    rows, contents, kept = read_scores(Path(scores)), Contents(), []
    for problem in problems:
        row = rows.get(problem.id)
        if row is None:
            raise ProblemError(f"{scores}: no row for problem {problem.id!r}; score the file again: python -m data_prep.blind")
        if row["content"] != contents.of(problem):
            raise ProblemError(f"{scores}: problem {problem.id!r} has changed; score the file again: python -m data_prep.blind")
        gain = _gain(row, against)
        if gain is not None and gain >= min_gain and (max_blind is None or row["p_blind"] <= max_blind):
            kept.append(problem)
    return kept


def _gain(row: dict[str, Any], against: str) -> float | None:
    gains = [row[f"gain_{view}"] for view in (("blind", "shuffled") if against == "both" else (against,))]
    return None if None in gains else min(gains)


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """Per source: mean probability and share right in each view, gains with standard errors, and what a filter keeps."""
    table = Table("source", "n", *(f"{what} {view.value}" for what in ("p", "right") for view in VIEWS),
                  "gain over blind", "over shuffled", *(f"kept at {gain:g}" for gain in GAINS))
    for source in sorted({row["source"] for row in rows}):
        part = [row for row in rows if row["source"] == source]
        means = [_mean(part, f"{what}_{view.value}")[0] for what in ("p", "correct") for view in VIEWS]
        gains = [_mean(part, f"gain_{view.value}") for view in VIEWS[1:]]
        kept = [sum(1 for row in part if (gain := _gain(row, "both")) is not None and gain >= least) for least in GAINS]
        table.add_row(escape(source), str(len(part)), *("-" if math.isnan(mean) else f"{mean:.3f}" for mean in means),
                      *(_with_error(*gain) for gain in gains), *map(str, kept))
    return table


def _with_error(mean: float, se: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:+.3f}" + ("" if math.isnan(se) else f" ± {se:.3f}")


def _mean(rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean of a column where it is known, and its standard error clustered by group:

    SE^2 = C / (C - 1) / n^2 * sum over the C groups of (sum of (x_i - mean) in it)^2; nan with one group.
    """
    known = [row for row in rows if row[name] is not None]
    if not known:
        return math.nan, math.nan
    mean = sum(row[name] for row in known) / len(known)
    sums: dict[str, float] = defaultdict(float)
    for row in known:
        sums[row["group"]] += row[name] - mean
    clusters = len(sums)
    if clusters < 2:
        return mean, math.nan
    return mean, math.sqrt(clusters / (clusters - 1) * sum(value**2 for value in sums.values())) / len(known)


def run(args: argparse.Namespace, load: Any) -> None:
    """Score a file. `load` makes the Answerer, after everything cheap has been checked."""
    out = args.out or args.file.with_name(f"{args.file.stem}.blind.jsonl")
    if out.suffix != ".jsonl" or out.resolve() == args.file.resolve():
        raise ProblemError(f"--out {out}: must be a .jsonl file of its own")
    if (args.keep is None) != (args.out_kept is None):
        raise ProblemError("--keep and --out-kept belong together: how much a picture must be worth, and where such problems go")
    if args.out_kept is not None:
        check_beside("--out-kept", args.out_kept, args.file)
    problems = read_problems(args.file, verify="header", skip_bad=args.skip_bad)
    others, contents = partners(problems), Contents()
    answerer = load()
    settings = {**answerer.identity(), "orders": args.orders, "scores_version": SCORES_VERSION}
    info = _open(out.with_suffix(".json"), out, settings, {"data": str(args.file), "data_sha256": file_sha256(args.file)})
    keys = {}
    for problem, other in zip(problems, others):
        content = contents.of(problem)
        borrowed = contents.pictures(other) if other is not None else None
        keys[problem.id] = {"content": content, "key": _hash([settings, content, borrowed])}
    rows = _resume(out, keys)
    write_json(out.with_suffix(".json"), info)
    wanted = problems[: args.limit]
    left = [(problem, other) for problem, other in zip(wanted, others) if problem.id not in rows]
    with out.open("ab") as file, \
            tqdm(total=len(wanted), initial=len(wanted) - len(left), desc=out.name, unit="problem", mininterval=2) as bar:
        for row in score(answerer, left, orders=args.orders, batch_size=args.batch_size):
            rows[row["id"]] = {**row, **keys[row["id"]]}
            file.write(dump(rows[row["id"]]))
            file.flush()
            bar.update()
    ordered = [rows[problem.id] for problem in problems if problem.id in rows]
    _rewrite(out, ordered)
    write_json(out.with_suffix(".json"), {**info, "n": len(ordered), "finished": len(ordered) == len(problems)})
    shown = [rows[problem.id] for problem in wanted]
    for view, why in ((View.vision, "no picture"), (View.shuffled, "no other problem's picture to borrow")):
        if missing := sum(1 for row in shown if row[f"p_{view.value}"] is None):
            print(f"{out}: {missing} of {len(shown)} problems have {why}, so nothing is known of {view.value}", file=sys.stderr)
    console().print(summary(shown))
    print(f"{out}: {len(shown)} problems")
    if args.out_kept is not None:
        kept = needs_picture(wanted, out, min_gain=args.keep, against=args.against, max_blind=args.max_blind)
        if not kept:
            raise ProblemError(f"--keep {args.keep:g}: no problem is left, so {args.out_kept} is not written")
        write_problems(args.out_kept, kept)
        print(f"{args.out_kept}: {len(kept)} problems")


def _open(path: Path, out: Path, settings: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The settings beside the scores. ProblemError when scores were made under others, which no filter may mix."""
    if out.exists() and not path.exists():
        raise ProblemError(f"{out}: has no {path.name} beside it that says how its scores were made; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    info = {**settings, **parents()}
    if path.exists() and out.exists():
        try:
            old = parse_json(path.read_bytes())
        except ProblemError as error:
            raise ProblemError(f"{path}: {error}") from error
        if differing := [key for key, value in settings.items() if old.get(key) != value]:
            raise ProblemError(f"{out}: holds scores of other settings ({', '.join(differing)}); give another --out or delete it")
        info = old
    return {**info, **data, "finished": False}


def _resume(out: Path, keys: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Rows already there that still hold. Of problems that changed since, or whose partner did, they are thrown away.

    ProblemError when none holds: then they are another file's, and may have taken hours.
    """
    if not out.exists():
        return {}
    data = out.read_bytes()
    if (whole := data[: data.rfind(b"\n") + 1]) != data:    # a killed process left half a line
        out.write_bytes(whole)
    rows = read_scores(out)
    holding = {name: row for name, row in rows.items() if name in keys and row["key"] == keys[name]["key"]}
    if rows and not holding:
        raise ProblemError(f"{out}: holds scores of {len(rows)} other problems; give another --out or delete it")
    if len(holding) < len(rows):
        print(f"{out}: {len(rows) - len(holding)} rows are of problems that have changed or gone; thrown away", file=sys.stderr)
        _rewrite(out, holding.values())
    return holding


def _rewrite(out: Path, rows: Any) -> None:
    with replacing(out) as file:
        file.writelines(dump(row) for row in rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_prep.blind", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--adapter", help="a PEFT adapter folder")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--out", type=Path, metavar="SCORES.jsonl", help="default: FILE.blind.jsonl")
    parser.add_argument("--orders", type=_positive, default=3, help="option orders per problem (default: %(default)s)")
    parser.add_argument("--limit", type=_positive, help="at most this many problems, the first of the file")
    parser.add_argument("--batch-size", type=_positive, default=32, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--keep", type=float, metavar="MIN", help="problems whose picture is worth this much go to --out-kept")
    parser.add_argument("--out-kept", type=Path, metavar="KEPT.jsonl", help="in the folder of FILE.jsonl, beside its pictures")
    parser.add_argument("--against", choices=AGAINST, default="both", help="of --keep: more than what (default: %(default)s)")
    parser.add_argument("--max-blind", type=float, metavar="P", help="of --keep: at most this probability without the picture")
    parser.add_argument("--min-pixels", type=_positive)
    parser.add_argument("--max-pixels", type=_positive)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of stopping")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quiet()
    offline_if_local(args.model)
    from data_prep.answerer import Answerer, ModelError

    with one_sentence(ProblemError, ModelError):
        run(args, lambda: Answerer.of(args))


if __name__ == "__main__":
    main()
