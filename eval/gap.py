"""The modality gap before and after: python -m eval.gap BEFORE AFTER [--out DIR] [--margin 0.02] [--seed 0]

BEFORE and AFTER are output folders of eval.run, or comma-separated lists of them (one per training seed, paired by
position; one base model may stand against several trainings of it). Prints tables and writes gap.json and gap.md.
Everything is paired by item and clustered by group. Sources of the formulas: eval/stats.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eval import stats
from eval.answers import SETTINGS, AnswersError, Side, check_pair, read_side, sides_of

MARGIN = 0.02  # how much `text` or `both` may fall while the gap still counts as closed well
DIFFERENCES = {"gap": ("both", "vision"), "text_gap": ("text", "vision"), "image_gain": ("vision", "blind"),
               "rendered_gap": ("vision", "rendered")}
IF_ASKED = {"rendered_gap"}  # nothing is missing where the view of it was not asked
REPLACED = ("blind", "white", "black", "gray", "noise", "shuffled")  # views that flip rates are taken against
AT_CHANCE = ("blind", "white", "black", "gray", "noise", "shuffled", "conflict", "other_facts")  # where chance is no warning
FOUR = ("blind", "vision", "text", "both")  # the coalitions of the two-player game: none, image, text, both


def measure(side: Side, task: str, *, seed: int = 0) -> dict:
    """All numbers of one side on one task, as plain JSON values.

    Keys: n, n_groups, n_seeds, chance, views (accuracy, unparsed, truncated, answer_tokens), those of DIFFERENCES, flips
    (per replaced view), agreement (text against vision), shapley, missing (what cannot be given), warnings, and left_out
    (n, and per view how many of them it lacks) where some items cannot be shown in every view.
    """
    clusters, views = side.clusters(task), side.views(task)
    correct = {view: side.correct(task, view) for view in views}
    pred = {view: side.column(task, view, "pred") for view in views}
    options = {"clusters": clusters, "seed": seed}
    result = {
        "n": len(clusters), "n_groups": len(set(clusters)), "n_seeds": len(side.runs),
        "chance": stats.chance_level(side.n_choices(task)), "views": {}, "flips": {}, "missing": [],
    }
    if task in side.runs[0].left_out:
        result["left_out"] = side.runs[0].left_out[task]
    for view in views:
        result["views"][view] = {
            **asdict(stats.accuracy(correct[view], clusters=clusters)),
            "unparsed": _share(pred[view], None), "truncated": _share(side.column(task, view, "finish"), "length"),
            "answer_tokens": _mean(side.column(task, view, "answer_tokens")),
            "seeds": asdict(stats.seed_spread(correct[view].mean(axis=1))),
        }
    for name, (first, second) in DIFFERENCES.items():
        if name in IF_ASKED and second not in views or _lacks(result, name, views, (first, second)):
            continue
        per_seed = (correct[first] - correct[second]).mean(axis=1)
        result[name] = {**asdict(stats.paired_gap(correct[first], correct[second], **options)),
                        "seeds": asdict(stats.seed_spread(per_seed))}
    for view in REPLACED:
        if "vision" in views and view in views:
            result["flips"][view] = asdict(stats.flip_rate(pred["vision"], pred[view], correct["vision"],
                                                           correct[view], **options))
    if not result["flips"]:
        result["missing"].append("flips: needs the view vision and one of " + ", ".join(REPLACED))
    if not _lacks(result, "agreement", views, ("text", "vision")):
        result["agreement"] = asdict(stats.agreement(pred["text"], pred["vision"], correct["text"], correct["vision"],
                                                     side.n_choices(task)))
    if not _lacks(result, "shapley", views, FOUR):
        result["shapley"] = asdict(stats.shapley(*(correct[view] for view in FOUR), **options))
    result["warnings"] = _warnings(side, task, result)
    return result


def change(before: Side, after: Side, task: str, *, seed: int = 0, margin: float = MARGIN) -> dict:
    """after - before of everything `measure` gives, paired by item and seed.

    Keys: views (change, interval, mcnemar_p), those of DIFFERENCES (change, interval, closure, and d_<view> of the two
    views), flips, shapley, verdict. Call check_pair on the sides first.
    """
    clusters = before.clusters(task)
    options = {"clusters": clusters, "seed": seed}
    views = [view for view in before.views(task) if view in after.views(task)]
    old = {view: before.correct(task, view) for view in views}
    new = {view: after.correct(task, view) for view in views}
    result: dict = {"views": {}, "flips": {}}
    for view in views:
        found = stats.paired_gap(new[view], old[view], **options)
        result["views"][view] = {
            "change": found.gap,
            **{key: getattr(found, key) for key in ("se", "low", "high", "mcnemar_p", "n", "note")},
            "seeds": asdict(stats.seed_spread((new[view] - old[view]).mean(axis=1))),
            "mcnemar_p_seeds": [stats.mcnemar(b, a) for a, b in zip(*np.broadcast_arrays(old[view], new[view]))],
        }
    for name, (first, second) in DIFFERENCES.items():
        if first not in views or second not in views:
            continue
        sides = (old[first], old[second]), (new[first], new[second])
        found = asdict(stats.gap_change(*sides, **options))
        found[f"d_{first}"], found[f"d_{second}"] = found.pop("d_text"), found.pop("d_vision")
        per_seed = ((new[first] - new[second]) - (old[first] - old[second])).mean(axis=1)
        result[name] = {**found, "seeds": asdict(stats.seed_spread(per_seed))}
        if name != "image_gain":
            result[name]["closure"] = asdict(stats.closure(*sides, **options))
    for view in REPLACED:
        if "vision" in views and view in views:
            flips = [stats.flips_of(side.column(task, "vision", "pred"), side.column(task, view, "pred"),
                                    side.correct(task, "vision"), side.correct(task, view)) for side in (after, before)]
            found = asdict(stats.mean_interval(flips[0] - flips[1], **options))
            result["flips"][view] = {"change": found.pop("value"), **found}
    if all(view in views for view in FOUR):
        found = stats.shapley_change([old[view] for view in FOUR], [new[view] for view in FOUR], **options)
        if found is not None:
            found = asdict(found)
            result["shapley"] = {"change": found.pop("value"), **found}
    start = stats.paired_gap(old["both"], old["vision"], **options) if "gap" in result else None
    result["verdict"] = verdict(result, start, margin)
    return result


def verdict(changes: dict, start: stats.Gap | None, margin: float = MARGIN) -> dict:
    """{"word", "reason"}: "closed well" only when the gap fell (interval below 0), vision rose, and neither both nor
    text fell by more than `margin`. A gap that closed because the words got worse is "closed by loss"."""
    if start is None:
        return {"word": "not known", "reason": "the gap needs the views both and vision on both sides"}
    gap = changes["gap"]
    fallen = {view: changes["views"][view]["change"] for view in ("both", "text")
              if view in changes["views"] and changes["views"][view]["change"] < -margin - 1e-9}
    moved = f"gap {points(gap['change'], sign=True)}, vision {points(gap['d_vision'], sign=True)}"
    if not start.gap > 0:
        return {"word": "no gap", "reason": f"the gap before was {points(start.gap, sign=True)}: nothing to close"}
    if not gap["high"] < 0:  # also when the interval is undefined
        return {"word": "not closed", "reason": f"{moved}: the interval of the gap's change does not lie below 0"}
    if fallen:
        lost = ", ".join(f"{view} {points(value, sign=True)}" for view, value in fallen.items())
        return {"word": "closed by loss", "reason": f"{moved}, but {lost} is more than the margin of {points(margin)}"}
    if not gap["d_vision"] > 0:
        return {"word": "closed by loss", "reason": f"{moved}: the gap fell without a gain in vision"}
    guard = "neither both nor text fell" if "text" in changes["views"] else "text was not measured, both did not fall"
    return {"word": "closed well", "reason": f"{moved}; {guard} by more than {points(margin)}"}


def compare(before: Side, after: Side, *, seed: int = 0, margin: float = MARGIN) -> dict:
    """The content of gap.json. Raises AnswersError when the sides were not measured alike on the same items."""
    tasks = check_pair(before, after)
    return {
        "before": provenance(before), "after": provenance(after), "margin": margin, "bootstrap_seed": seed,
        "settings": {key: before.runs[0].info[key] for key in SETTINGS},
        "only_in_one": sorted(set(before.tasks()) ^ set(after.tasks())),
        "tasks": {task: {"before": measure(before, task, seed=seed), "after": measure(after, task, seed=seed),
                         "change": change(before, after, task, seed=seed, margin=margin)} for task in tasks},
    }


def provenance(side: Side) -> dict:
    """Name, folders and the parents of every run of a side."""
    keys = ("label", "model", "adapter", "adapter_sha256", "recipe", "seed", "commit", "dirty")
    return {"name": side.name, "runs": [{"folder": run.folder.as_posix(), **{key: run.info.get(key) for key in keys}}
                                        for run in side.runs]}


def table(runs: Mapping[str, Side | Sequence[str | Path] | str], *, seed: int = 0) -> list[dict]:
    """One row per run and task, for reports and the README.

    runs: name -> Side, or the folder(s) of it. Row keys: run, task, n, n_groups, n_seeds, chance, views {view:
    (value, low, high)}, those of DIFFERENCES (each (value, low, high), or None when a view is missing; rendered_gap only
    where it was asked), unparsed (largest share of any view). Raises AnswersError.
    """
    rows = []
    for side in sides_of(dict(runs)):
        for task in side.tasks():
            rows.append(table_row(side.name, task, measure(side, task, seed=seed)))
    return rows


def table_row(name: str, task: str, found: Mapping) -> dict:
    """The row of `table` for what `measure` found."""
    return {
        "run": name, "task": task, **{key: found[key] for key in ("n", "n_groups", "n_seeds", "chance")},
        "views": {view: (one["value"], one["low"], one["high"]) for view, one in found["views"].items()},
        **{key: tuple(found[key][part] for part in ("gap", "low", "high")) if key in found else None
           for key in DIFFERENCES if key in found or key not in IF_ASKED},
        "unparsed": max(one["unparsed"] for one in found["views"].values()),
    }


def points(value: float | None, sign: bool = False) -> str:
    """0.123 -> "12.3", with its sign when asked; "-" when undefined."""
    if value is None or math.isnan(value):
        return "-"
    return f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"


def within(one: Mapping | Sequence | None, key: str = "value", sign: bool = False) -> str:
    """A value with its interval in points: "12.3 [10.1, 14.2]"."""
    if one is None:
        return "-"
    value, low, high = (one[key], one["low"], one["high"]) if isinstance(one, Mapping) else one
    interval = "" if math.isnan(low) else f" [{points(low, sign)}, {points(high, sign)}]"
    return points(value, sign) + interval


def closed(change_of_gap: Mapping | None) -> str:
    """The closed part of a gap: "71.4 [59.3, 81.7] %", or "-"."""
    one = (change_of_gap or {}).get("closure")
    return "-" if one is None or math.isnan(one["value"]) else f"{within(one)} %"


def _lacks(result: dict, name: str, views: Sequence[str], needed: Sequence[str]) -> bool:
    absent = [view for view in needed if view not in views]
    if absent:
        result["missing"].append(f"{name}: needs the view{'s' if len(absent) > 1 else ''} {', '.join(absent)}")
    return bool(absent)


def _share(column: list[list], value) -> float:
    return float(np.mean([[one == value for one in row] for row in column]))


def _mean(column: list[list]) -> float | None:
    known = [one for row in column for one in row if one is not None]
    return float(np.mean(known)) if known else None


def _warnings(side: Side, task: str, result: dict) -> list[str]:
    found, views, chance = [], result["views"], result["chance"]
    low, high = (pick(views, key=lambda view: views[view]["unparsed"]) for pick in (min, max))
    if views[high]["unparsed"] - views[low]["unparsed"] > 0.01 + 1e-9:
        found.append(f"unparsed answers: {points(views[high]['unparsed'])} % in {high} against "
                     f"{points(views[low]['unparsed'])} % in {low}, so part of a difference may be form")
    for view, one in views.items():
        p, n = one["value"], one["n"]
        reach = 3 * (math.sqrt(p * (1 - p) / n) if math.isnan(one["se"]) else one["se"])
        if view not in AT_CHANCE and one["value"] - chance <= reach + 1e-12:
            found.append(f"{view} is within 3 SE of chance or below it ({points(p)}; chance {points(chance)})")
        if view == "blind" and one["value"] - chance > reach:
            found.append(f"blind is above chance ({points(one['value'])}; chance {points(chance)}): "
                         "part of the task can be answered without its facts")
        if 1 - one["value"] <= reach + 1e-12:
            found.append(f"{view} is within 3 SE of 100 ({points(one['value'])}): it cannot show a gain")
        if one["truncated"] > 0:
            found.append(f"{points(one['truncated'])} % of the answers in {view} were cut off at max_new_tokens")
    for run in side.runs:
        expected = run.info["tasks"][task].get("n")
        if task in run.left_out:
            found.append(f"{left_out_words(run.left_out[task])} and are left out of all numbers")
        elif expected is not None and expected != result["n"]:
            found.append(f"{run.folder.name} holds {result['n']} of {expected} items")
        if run.info.get("dirty"):
            found.append(f"{run.folder.name} was made from a working tree with uncommitted changes")
    if result["n_groups"] < stats.FEW_CLUSTERS:
        found.append(f"only {result['n_groups']} groups: intervals are likely too narrow")
    return list(dict.fromkeys(found))


def left_out_words(left_out: Mapping) -> str:
    """{"n": 3, "views": {"shuffled": 2, "text": 1}} -> "3 items cannot be shown in every view (2 not in shuffled, ...)"."""
    views = ", ".join(f"{count} not in {view}" for view, count in left_out["views"].items())
    return f"{left_out['n']} items cannot be shown in every view ({views})"


def plain(value):
    """The same with nan as None, so that the JSON can be read by anything."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(value):
    """What `plain` wrote, with nan where it wrote None."""
    if isinstance(value, dict):
        return {key: numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [numbers(one) for one in value]
    return math.nan if value is None else value


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.gap", description="The modality gap before and after.")
    parser.add_argument("before", metavar="BEFORE", help="output folder of eval.run, or several joined by commas")
    parser.add_argument("after", metavar="AFTER", help="the same for the model after training")
    parser.add_argument("--out", type=Path, help="folder of gap.json and gap.md (default: the first AFTER folder)")
    parser.add_argument("--margin", type=float, default=MARGIN, help="fall of text or both that is allowed (0.02)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    args = parser.parse_args(argv)
    from eval import show  # rich is needed on the terminal only

    try:
        before, after = read_side(None, args.before), read_side(None, args.after)
        result = compare(before, after, seed=args.seed, margin=args.margin)
    except (AnswersError, stats.StatsError) as error:
        sys.exit(str(error))
    out = args.out or after.runs[0].folder
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(result), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (out / "gap.json").write_text(text + "\n", encoding="utf-8")
    (out / "gap.md").write_text(show.markdown(result), encoding="utf-8")
    show.terminal(result)
    print(f"wrote {(out / 'gap.json').as_posix()} and {(out / 'gap.md').as_posix()}")


if __name__ == "__main__":
    main()
