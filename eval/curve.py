"""The gap over training: does a recipe open it or close it, and how fast?

    python -m eval.curve --out results/demo/curve.json \\
        full-text=0:runs/base,90:runs/full90-seed0+runs/full90-seed1,180:runs/full180-seed0+runs/full180-seed1

Every recipe is a name and, per optimizer step, output folders of eval.run: `+` joins training seeds, in the same order
at every step, and step 0 may be one base model for all of them. Writes the numbers and, beside them, curve.svg; the
block `<!-- generated: curve results/demo -->` of a document is then filled by eval.readme.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.provenance import write_json
from eval import gap, plots, stats
from eval.answers import SETTINGS, AnswersError, Side, check_pair, read_side
from eval.parents import parents, rounded
from eval.show import table_lines

PER = 100  # optimizer steps that the slope is given for
VIEWS = ("both", "text", "vision")
TITLE = "The gap over training"
FORM = "NAME=STEP:DIR[+DIR...],STEP:DIR[+DIR...]..."


@dataclass(frozen=True)
class Curve:
    """One recipe: its runs by optimizer step, from step 0 upwards."""

    name: str
    points: dict[int, Side]


def parse_curves(words: Sequence[str]) -> list[Curve]:
    """Command-line words of the form FORM -> curves. AnswersError for another form, a step given twice, no step 0."""
    curves: list[Curve] = []
    for word in words:
        name, equals, rest = word.partition("=")
        points: dict[int, Side] = {}
        for part in rest.split(","):
            step, colon, folders = part.partition(":")
            if not (name and equals and colon and folders and step.isascii() and step.isdigit()):
                raise AnswersError(f"a recipe is given as {FORM}, not as '{word}'")
            if int(step) in points:
                raise AnswersError(f"{name}: step {int(step)} is given twice; join its seeds with +")
            points[int(step)] = read_side(f"{name} at step {int(step)}", [one for one in folders.split("+") if one])
        if name in {curve.name for curve in curves}:
            raise AnswersError(f"the recipe '{name}' is given twice")
        if 0 not in points or len(points) < 2:
            raise AnswersError(f"{name}: a curve needs step 0, where training starts, and a later step; it has "
                               f"{', '.join(map(str, sorted(points)))}")
        curves.append(Curve(name, dict(sorted(points.items()))))
    return curves


def measure(curves: Sequence[Curve], *, task: str | None = None, seed: int = 0, allow_dirty: bool = False) -> dict:
    """The content of curve.json.

    Per recipe and step: accuracy of both, text and vision, the gap, its change since step 0 (all paired by item,
    clustered by group), and the parents of every seed. Per recipe: the slope of the gap (see `slopes`).
    task: default the first that all runs hold. Raises AnswersError for runs that were not measured alike on the same
    items, whose training is not known, or is not that of one recipe with the same seeds at every step.
    """
    if not curves:
        raise AnswersError(f"no recipe given; one is given as {FORM}")
    sides = [side for curve in curves for side in curve.points.values()]
    for curve in curves:
        check_pair(curves[0].points[0], curve.points[0])
        for side in curve.points.values():
            check_pair(curve.points[0], side)
    names = sorted(set.intersection(*(set(side.tasks()) for side in sides)))
    if not names or task not in (None, *names):
        raise AnswersError(f"tasks that all runs hold: {', '.join(names) or 'none'}" + (f"; not {task}" if task else ""))
    task = task or names[0]
    for side in sides:
        if missing := sorted({"both", "vision"} - set(side.views(task))):
            raise AnswersError(f"{side.name}: task {task} was not asked in the view {missing[0]}, so it has no gap")
    origins = {curve.name: _origins(curve, allow_dirty) for curve in curves}
    with tqdm(total=len(sides), desc="curve", unit="point", mininterval=1) as bar:
        recipes = [_measure(curve, task, origins[curve.name], seed, bar) for curve in curves]
    first, clusters = sides[0], sides[0].clusters(task)
    dirty = any(one[key] for found in origins.values() for runs in found.values() for one in runs
                for key in ("dirty", "training_dirty"))
    settings = {key: first.runs[0].info[key] for key in SETTINGS}
    return rounded(gap.plain({
        "task": task, "n": len(clusters), "n_groups": len(set(clusters)), "chance": stats.chance_level(first.n_choices(task)),
        "recipes": recipes, "settings": settings, "dirty": dirty, "slope_per_steps": PER, "bootstrap_seed": seed}))


def _origins(curve: Curve, allow_dirty: bool) -> dict[int, list[dict]]:
    """Parents per step, after checking that they are one base and one training per seed, as far as the step says."""
    found = {step: [parents(run, allow_dirty=allow_dirty) for run in side.runs] for step, side in curve.points.items()}
    base = found[0][0]
    for step, side in curve.points.items():
        for run, one in zip(side.runs, found[step]):
            if (one["steps"] or 0) != step:
                raise AnswersError(f"{curve.name}: {run.folder.as_posix()} is given as step {step}, but its adapter has made "
                                   f"{one['steps'] or 0} optimizer steps")
            if one["model_sha256"] != base["model_sha256"] or one["revision"] != base["revision"]:
                raise AnswersError(f"{curve.name}: {run.folder.as_posix()} is of another base model than step 0")
    first, *later = [step for step in found if step]
    for step in (first, *later):
        runs, others = ([(one["recipe"], one["seed"]) for one in found[at]] for at in (first, step))
        if runs != others or len(set(runs)) < len(runs) or len({recipe for recipe, _ in runs}) > 1:
            raise AnswersError(f"{curve.name}: the runs are not one recipe with the same seeds, each once and in the same "
                               f"order, at every step: {_said(runs)} (step {first}) against {_said(others)} (step {step})")
        for one, other in zip(found[first], found[step]):
            if one["recipe_sha256"] != other["recipe_sha256"]:
                raise AnswersError(f"{curve.name}: seed {one['seed']} was trained by another recipe.yaml at step {step} than "
                                   f"at step {first}")
    return found


def _said(runs: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{recipe} {seed}" for recipe, seed in runs)


def _measure(curve: Curve, task: str, origins: dict[int, list[dict]], seed: int, bar: tqdm) -> dict:
    """One recipe of curve.json."""
    start, points, gaps = curve.points[0], [], []
    for step, side in curve.points.items():
        found = gap.measure(side, task, seed=seed)
        points.append({
            "step": step, "n_seeds": len(side.runs), "parents": origins[step], "gap": found["gap"],
            "views": {view: found["views"][view] for view in VIEWS if view in found["views"]},
            "change": gap.change(start, side, task, seed=seed)["gap"] if step else None,
        })
        gaps.append(side.correct(task, "both") - side.correct(task, "vision"))
        bar.update()
    per_item = slopes(list(curve.points), gaps)
    slope = stats.mean_interval(per_item, clusters=start.clusters(task), seed=seed)
    return {"name": curve.name, "points": points,
            "slope": {**asdict(slope), "seeds": asdict(stats.seed_spread(per_item.mean(axis=1)))}}


def slopes(steps: Sequence[int], gaps: Sequence[np.ndarray]) -> np.ndarray:
    """Least-squares slope of every item's gap against the step, per 100 steps: sum_s w_s g_s, w_s = (s - m) / sum (s - m)^2.

    steps: optimizer steps, at least two different ones; m is their mean. gaps: per step (seeds, items), where one seed
    stands for all (a base model at step 0). Returns (seeds, items). Every step counts the same, step 0 among them.

    The slope is linear in the gaps, so the mean of the items' slopes is the slope of the mean gap. Its interval is
    therefore that of a mean over items, from a bootstrap of whole groups; a line fitted to a handful of means would take
    the bends of the curve for noise, and know nothing of the items. It says how another sample of items would do, not
    another training: the slopes of the seeds are given beside it.
    """
    x = np.asarray(steps, dtype=float)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum() * PER
    return sum(weight * one for weight, one in zip(weights, np.broadcast_arrays(*gaps)))


def block(found: Mapping) -> list[str]:
    """The README's table of a curve and the sentences below it."""
    rows, moves = [], {}
    found = gap.numbers(found)
    for recipe in found["recipes"]:
        first, last = recipe["points"][0], recipe["points"][-1]
        rows.append((f"`{recipe['name']}`", gap.within(first["gap"], "gap", True),
                     f"{gap.within(last['gap'], 'gap', True)} (step {last['step']})",
                     gap.within(last["change"], "change", True), gap.within(recipe["slope"], sign=True)))
        moves.setdefault(_moved(last["change"]), []).append(f"`{recipe['name']}`")
    said = "; ".join(f"{word} under {', '.join(names)}" for word, names in moves.items())
    steps = sorted({point["step"] for recipe in found["recipes"] for point in recipe["points"]})
    seeds = sorted({recipe["points"][-1]["n_seeds"] for recipe in found["recipes"]})
    text = [f"From step 0 to the last step the gap {said}.",
            f"Measured at steps {', '.join(map(str, steps))}, {' or '.join(map(str, seeds))} training "
            f"seed{'s' if max(seeds) > 1 else ''}.",
            f"{found['n']:,} items in {found['n_groups']:,} groups (task `{found['task']}`, chance "
            f"{gap.points(found['chance'])}); differences in points, with 95 % intervals paired by item and clustered by "
            "group; the slope is that of least squares."]
    if found["dirty"]:
        text.append("Made from a working tree with uncommitted changes.")
    header = ("recipe", "gap at step 0", "gap at the end", "change", f"slope per {found['slope_per_steps']} steps")
    return [*table_lines(header, rows), "", " ".join(text)]


def _moved(change: Mapping) -> str:
    return "opens" if change["low"] > 0 else "closes" if change["high"] < 0 else "does not change measurably"


def figure(found: Mapping) -> str:
    """curve.svg, with the stamp of its numbers as its last line."""
    return plots.curve_figure(_drawn(found), title=TITLE) + stamp(found)


def stamp(found: Mapping) -> str:
    return plots.stamp([TITLE, _drawn(found)])


def _drawn(found: Mapping) -> dict[str, list[dict]]:
    def point(one: Mapping, key: str) -> tuple[float, ...]:
        return tuple(one[part] for part in (key, "low", "high"))

    return {recipe["name"]: [{"step": one["step"], "gap": point(one["gap"], "gap"),
                              **{view: point(one["views"][view], "value") for view in ("both", "vision")}}
                             for one in recipe["points"]] for recipe in gap.numbers(found)["recipes"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.curve", description="The gap over training.")
    parser.add_argument("recipes", nargs="+", metavar=FORM, help="output folders of eval.run per optimizer step, from step 0")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the figure goes beside it")
    parser.add_argument("--task", help="default: the first that all runs hold")
    parser.add_argument("--allow-dirty", action="store_true", help="also runs of a changed working tree, and say so")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    args = parser.parse_args(argv)
    if args.out.suffix != ".json":
        parser.error("--out takes a file that ends in .json")
    try:
        found = measure(parse_curves(args.recipes), task=args.task, seed=args.seed, allow_dirty=args.allow_dirty)
    except (AnswersError, stats.StatsError) as error:
        sys.exit(f"error: {error}")
    drawn = figure(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, found)
    args.out.with_suffix(".svg").write_text(drawn, encoding="utf-8", newline="\n")
    print("\n".join(block(found)))
    print(f"wrote {args.out.as_posix()} and {args.out.with_suffix('.svg').as_posix()}")


if __name__ == "__main__":
    main()
