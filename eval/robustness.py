"""How accuracy falls when words or parts of the picture are missing: curves against the rate of corruption.

    python -m eval.robustness --model assets/tiny --adapter control=runs/c0/adapter,runs/c1/adapter \\
        --adapter lnln=runs/l0/adapter,runs/l1/adapter --tasks twins --modality both --out runs/robustness
    python -m eval.robustness --runs control=runs/robustness/answers/control lnln=runs/robustness/answers/lnln \\
        --out results/demo/robustness.json

The first form asks each recipe, one adapter per training seed (`base=` is the bare model), at every rate of --rates in each
view of --views. Answers go to OUT/answers/NAME/SEED/MODALITY-RATE, one folder of eval.run each, and the same command continues
them. Further options are those of eval.run (--data, --limit, --batch-size, --dtype, ...). The second form asks nothing: it
compares what processes of the first form have asked side by side.

--modality image|text|both: where the rate applies; with `both` the two lose at the same rate, as in LNLN (arXiv 2409.20012),
whose tables give means over the rates 0 to 0.9. Writes the numbers as JSON and the curves as SVG, and prints the means.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.provenance import write_json
from eval import gap, plots, stats
from eval import run as eval_run
from eval.answers import SETTINGS, AnswersError, Side, check_pair, read_side
from eval.parents import parents, rounded
from eval.show import table_lines

MODALITIES = ("image", "text", "both")
VIEWS = "both,vision"
RATES = ",".join(f"{rate / 10:g}" for rate in range(10))
BASE = "base"
NAME = re.compile(r"[\w+-][\w.+-]*")
SAID = {"image": "the picture", "text": "the words", "both": "picture and words"}
TITLE = "Accuracy with parts of the input missing"


@dataclass(frozen=True)
class Curve:
    """One recipe: its runs by rate of corruption, from rate 0 upwards."""

    name: str
    points: dict[float, Side]


# -- asking --------------------------------------------------------------------------------------------------------------


def corruption(modality: str, rate: float) -> str:
    """The words that eval.run --corrupt takes."""
    return ",".join(f"{name}={rate:g}" for name in ("text", "image") if modality in (name, "both"))


def parse_rates(text: str) -> list[float]:
    """Comma-separated rates in [0, 1], ascending and each once; 0, the complete input, is always among them. AnswersError."""
    try:
        rates = {0.0, *(float(word) for word in text.split(","))}
    except ValueError:
        rates = {-1.0}
    if not all(0 <= rate <= 1 for rate in rates):
        raise AnswersError(f"--rates takes rates from 0 to 1, such as 0,0.3,0.6, not {text!r}")
    return sorted(rates)


def parse_adapters(words: Sequence[str]) -> dict[str, list[str | None]]:
    """NAME=DIR[,DIR...] -> adapter folders per recipe; `base` has none. AnswersError: another form, or no adapter there."""
    found: dict[str, list[str | None]] = {}
    for word in words or [f"{BASE}="]:
        name, equals, folders = word.partition("=")
        if not equals or not NAME.fullmatch(name) or bool(folders) == (name == BASE):
            raise AnswersError("--adapter takes NAME=DIR[,DIR...] with a name of letters, digits, '.', '+' and '-', or "
                               f"{BASE}= for the bare model, not '{word}'")
        if name in found:
            raise AnswersError(f"--adapter {word}: the name '{name}' is taken; join seeds with commas")
        found[name] = folders.split(",") if folders else [None]
        for folder in found[name]:
            if folder is not None and not (Path(folder) / "adapter_config.json").is_file():
                raise AnswersError(f"--adapter {word}: {folder or 'an empty name'} holds no adapter_config.json")
    return found


def ask(args: argparse.Namespace, rest: Sequence[str], load: Callable[[argparse.Namespace], Any]) -> dict[str, Path]:
    """Ask every recipe at every rate, and give the folder of each one's answers. load: eval.run's options -> an Answerer."""
    recipes, rates = parse_adapters(args.adapter), parse_rates(args.rates)
    folders = {name: args.out / "answers" / name for name in recipes}
    conditions = {"complete": "", **{f"{modality}-{rate:g}": corruption(modality, rate) for modality in args.modality
                                     for rate in rates if rate}}
    for name, adapters in recipes.items():
        for number, adapter in enumerate(adapters):
            loaded = None
            for condition, missing in conditions.items():
                options = eval_run.parse(["--model", args.model, *(["--adapter", adapter] if adapter else []), *rest,
                                          "--out", str(folders[name] / str(number) / condition),
                                          "--label", f"{name} {number} {condition}", "--corrupt", missing])
                loaded = loaded or load(options)        # once for all rates
                eval_run.run(options, lambda: loaded)   # noqa: B023  called before the next one
    return folders


# -- reading -------------------------------------------------------------------------------------------------------------


def parse_runs(words: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR -> the folder of each recipe's answers. AnswersError for another form, or a folder without them."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name in found:
            raise AnswersError(f"--runs takes NAME=DIR, each name once, not '{word}'")
        found[name] = Path(folder)
        if not any(found[name].glob("*/*/run.json")):
            raise AnswersError(f"--runs {word}: there is no SEED/RATE/run.json in it, as --model writes them")
    return found


def rate_in(run: Mapping, modality: str) -> float | None:
    """The rate of a run if it belongs to the modality's curve, else None. The complete input belongs to all."""
    found = run.get("corrupt") or {"text": 0.0, "image": 0.0}
    of, other = ("text", "image") if modality == "text" else ("image", "text")
    return found[of] if found[other] == (found[of] if modality == "both" else 0) else None


def read_curve(name: str, folder: Path, modality: str) -> Curve:
    """A recipe's answers at the rates of a modality. AnswersError: a rate twice, seeds at other rates, or no rate but 0."""
    seeds = sorted({path.parent.parent for path in folder.glob("*/*/run.json")}, key=lambda path: (len(path.name), path.name))
    found: dict[float, dict[Path, Path]] = {}
    for seed in seeds:
        for path in sorted(seed.glob("*/run.json")):
            rate = rate_in(json.loads(path.read_text(encoding="utf-8")), modality)
            if rate is not None and (one := found.setdefault(rate, {}).setdefault(seed, path.parent)) != path.parent:
                raise AnswersError(f"{name}: {one} and {path.parent} hold answers at the same rate, {rate:g}")
    for rate, folders in found.items():
        if len(folders) < len(seeds):
            lacking = next(seed for seed in seeds if seed not in folders)
            raise AnswersError(f"{name}: {lacking} has no answers at rate {rate:g} of {modality}, as others have")
    if 0.0 not in found or len(found) < 2:
        raise AnswersError(f"{name}: {folder} has no answers with {modality} corrupted beside those with nothing missing")
    return Curve(name, {rate: read_side(f"{name} at {rate:g}", list(found[rate].values())) for rate in sorted(found)})


def check(curves: Sequence[Curve]) -> list[str]:
    """The tasks that all curves hold. AnswersError when they are not of the same rates, items, masks and settings."""
    first = curves[0]
    start = first.points[0.0]
    for curve in curves:
        if list(curve.points) != list(first.points):
            told = (", ".join(f"{rate:g}" for rate in one.points) for one in (first, curve))
            raise AnswersError(f"'{first.name}' and '{curve.name}' were asked at other rates: {' against '.join(told)}")
        for rate, side in curve.points.items():
            check_pair(first.points[rate], side)
            mine, complete = ([(run.info.get("model_sha256"), run.info.get("adapter_sha256")) for run in one.runs]
                              for one in (side, curve.points[0.0]))
            if mine != complete:
                raise AnswersError(f"{curve.name}: the models at rate {rate:g} are not those at rate 0, in the same order")
            if differing := [key for key in SETTINGS if side.runs[0].info[key] != start.runs[0].info[key]]:
                raise AnswersError(f"{curve.name}: the runs at rates 0 and {rate:g} differ in {', '.join(differing)}")
    sides = [side for curve in curves for side in curve.points.values()]
    if len(seeds := corrupt_seeds(sides)) > 1:
        raise AnswersError(f"the runs have the corruption seeds {', '.join(map(str, seeds))}, so different parts are missing; "
                           "ask all with one --corrupt-seed")
    tasks = sorted(set.intersection(*(set(side.tasks()) for side in sides)))
    for task in tasks:
        names = {tuple(row["id"] for row in side.items(task)) for side in sides}
        if len(names) > 1:
            raise AnswersError(f"the items of task '{task}' are not the same at every rate")
    return tasks


def corrupt_seeds(sides: Sequence[Side]) -> list[int]:
    return sorted({run.info["corrupt"]["seed"] for side in sides for run in side.runs if run.info.get("corrupt")})


# -- numbers -------------------------------------------------------------------------------------------------------------


def measure(recipes: Mapping[str, Path], modalities: Sequence[str], *, task: str | None = None, seed: int = 0,
            allow_dirty: bool = False) -> dict:
    """The content of robustness.json.

    Per modality and recipe: accuracy of every view at every rate, its mean over the rates, that mean's value for each training
    seed, and, but for the first recipe, its distance from the first one's, paired by item. Intervals are clustered by group.

    Args:
        recipes: name -> folder of its answers.
        task: default the first that all runs hold.
        seed: of the bootstrap.

    Raises:
        AnswersError: answers that are not there, or were not measured alike.
    """
    # In the order that JSON is written in, so that a figure drawn from the file is the same.
    read = {modality: [read_curve(name, folder, modality) for name, folder in recipes.items()]
            for modality in sorted(modalities)}
    names = sorted(set.intersection(*(set(check(curves)) for curves in read.values())))
    if not names or task not in (None, *names):
        raise AnswersError(f"tasks that all runs hold: {', '.join(names) or 'none'}" + (f"; not {task}" if task else ""))
    task = task or names[0]
    curves = [curve for one in read.values() for curve in one]
    start = curves[0].points[0.0]
    origins = {curve.name: [parents(run, allow_dirty=allow_dirty) for run in curve.points[0.0].runs] for curve in curves}
    found = {modality: _measure(one, task, seed) for modality, one in tqdm(read.items(), desc="measuring", mininterval=1)}
    clusters = start.clusters(task)
    return rounded(gap.plain({
        "task": task, "n": len(clusters), "n_groups": len(set(clusters)), "chance": stats.chance_level(start.n_choices(task)),
        "modalities": found, "recipes": [{"name": name, "parents": one} for name, one in origins.items()],
        "settings": {key: start.runs[0].info[key] for key in SETTINGS}, "bootstrap_seed": seed,
        "corrupt_seed": corrupt_seeds([side for curve in curves for side in curve.points.values()])[0],
        "dirty": any(one[key] for runs in origins.values() for one in runs for key in ("dirty", "training_dirty"))}))


def _measure(curves: Sequence[Curve], task: str, seed: int) -> list[dict]:
    clusters = curves[0].points[0.0].clusters(task)
    views = [view for view in sorted(curves[0].points[0.0].views(task))
             if all(view in side.views(task) for curve in curves for side in curve.points.values())]
    if not views:
        raise AnswersError(f"task {task}: no view was asked at every rate")
    first: dict[str, np.ndarray] = {}
    found = []
    for curve in curves:
        entry: dict[str, Any] = {"name": curve.name, "n_seeds": len(curve.points[0.0].runs), "views": {}}
        for view in views:
            rights = {rate: side.correct(task, view) for rate, side in curve.points.items()}
            mean = np.mean(list(rights.values()), axis=0)          # (seeds, items): over rates, each counting the same
            difference = mean.mean(0) - first.setdefault(view, mean.mean(0))
            entry["views"][view] = {
                "points": [{"rate": rate, **asdict(stats.accuracy(right, clusters=clusters))}
                           for rate, right in rights.items()],
                "mean": {**asdict(stats.mean_interval(mean, clusters=clusters, seed=seed)),
                         "seeds": asdict(stats.seed_spread(mean.mean(1)))}}
            if found:
                entry["views"][view]["against_first"] = asdict(stats.mean_interval(difference, clusters=clusters, seed=seed))
        found.append(entry)
    return found


# -- figure and table ----------------------------------------------------------------------------------------------------


def figure(found: Mapping) -> str:
    """robustness.svg, with the stamp of its numbers as its last line."""
    return plots.rate_figure(_drawn(found), title=TITLE, label="rate of corruption, bands: 95 % intervals") + stamp(found)


def stamp(found: Mapping) -> str:
    return plots.stamp([TITLE, _drawn(found)])


def _drawn(found: Mapping) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """panel (modality and view) -> recipe -> (rate, value, low, high) of each point."""
    drawn: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for modality, recipes in gap.numbers(found)["modalities"].items():
        for recipe in recipes:
            for view, one in recipe["views"].items():
                drawn.setdefault(f"view {view}, missing in {SAID[modality]}", {})[recipe["name"]] = [
                    tuple(point[key] for key in ("rate", "value", "low", "high")) for point in one["points"]]
    return drawn


def block(found: Mapping) -> list[str]:
    """The table of means over rates in Markdown, and the sentences below it."""
    rows, rates = [], []
    found = gap.numbers(found)
    for modality, recipes in found["modalities"].items():
        for recipe in recipes:
            for view, one in recipe["views"].items():
                rates = [point["rate"] for point in one["points"]]
                ends = [gap.points(one["points"][place]["value"]) for place in (0, -1)]
                rows.append((SAID[modality], view, f"`{recipe['name']}`", *ends, gap.within(one["mean"]),
                             gap.within(one.get("against_first"), sign=True)))
    first = next(iter(found["modalities"].values()))[0]["name"]
    header = ("missing in", "view", "recipe", "complete", "highest rate", "mean over rates", f"against `{first}`")
    text = (f"Rates {', '.join(f'{rate:g}' for rate in rates)}, each counting the same; {found['n']:,} items in "
            f"{found['n_groups']:,} groups (task `{found['task']}`, chance {gap.points(found['chance'])}); accuracy in "
            "per cent, differences in points, with 95 % intervals paired by item and clustered by group.")
    if found["dirty"]:
        text += " Made from a working tree with uncommitted changes."
    return [*table_lines(header, rows), "", text]


# -- command -------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those that are handed on to eval.run."""
    parser = argparse.ArgumentParser(prog="python -m eval.robustness", description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="Every further option is one of eval.run: --data, --limit, --batch-size and so on.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="local folder or hub id; it is asked")
    source.add_argument("--runs", nargs="+", metavar="NAME=DIR", help="OUT/answers/NAME of such runs; nothing is asked")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR[,DIR...]",
                        help=f"a recipe, an adapter per training seed; {BASE}= is the bare model")
    parser.add_argument("--modality", default="both", help=f"comma-separated: {', '.join(MODALITIES)} (default: %(default)s)")
    parser.add_argument("--rates", help=f"comma-separated; 0 is always among them (default: {RATES})")
    parser.add_argument("--views", help=f"comma-separated (default: {VIEWS})")
    parser.add_argument("--task", help="to be measured; default: the first that all runs hold")
    parser.add_argument("--out", type=Path, required=True, help="a folder; with --runs a .json file, too")
    parser.add_argument("--allow-dirty", action="store_true", help="also runs of a changed working tree, and say so")
    parser.add_argument("--bootstrap-seed", type=int, default=0, help="seed of the intervals (0)")
    args, rest = parser.parse_known_args(argv)
    args.modality = list(dict.fromkeys(args.modality.split(",")))
    if unknown := [one for one in args.modality if one not in MODALITIES]:
        parser.error(f"--modality: no such modality: {', '.join(unknown)}; modalities: {', '.join(MODALITIES)}")
    if args.runs:
        given = {"--adapter": args.adapter, "--rates": args.rates, "--views": args.views}
        if unused := [name for name, value in given.items() if value] + rest:
            parser.error(f"--runs asks no model, so it takes no {unused[0]}")
        return args, rest
    if args.out.suffix == ".json":
        parser.error("--out takes a folder when a model is asked")
    if any(word.partition("=")[0] == "--endpoint" for word in rest):
        parser.error("--endpoint: a server cannot be shown corrupted input")
    if "--corrupt" in rest:
        parser.error("--corrupt is set by --rates and --modality")
    args.rates = args.rates or RATES
    rest += ["--views", args.views or VIEWS]
    eval_run.parse(["--model", args.model, "--out", str(args.out), *rest])      # what it refuses, it refuses before any asking
    return args, rest


def main(argv: Sequence[str] | None = None) -> None:
    args, rest = parse(argv)
    try:
        found = measure(parse_runs(args.runs) if args.runs else _asking(args, rest), args.modality, task=args.task,
                        seed=args.bootstrap_seed, allow_dirty=args.allow_dirty)
    except (AnswersError, stats.StatsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    out = args.out if args.out.suffix == ".json" else args.out / "robustness.json"
    drawn = figure(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    out.with_suffix(".svg").write_text(drawn, encoding="utf-8", newline="\n")
    print("\n".join(block(found)))
    print(f"wrote {out.as_posix()} and {out.with_suffix('.svg').as_posix()}")


def _asking(args: argparse.Namespace, rest: Sequence[str]) -> dict[str, list[Path]]:
    from data_prep.libraries import offline_if_local, one_sentence, quiet
    from data_prep.problem import ProblemError
    from eval.tasks import TaskError

    quiet()
    offline_if_local(args.model)
    from data_prep.answerer import Answerer, ModelError

    with one_sentence(ProblemError, TaskError, ModelError):
        return ask(args, rest, lambda options: Answerer.of(options))


if __name__ == "__main__":
    main()
