"""How much a model's answers depend on the picture at all, before and after training.

    python -m eval.case_study --model assets/tiny --tasks twins --out runs/case
    python -m eval.case_study --model assets/tiny --adapter control=runs/a/adapter --adapter better=runs/b/adapter --out runs/case
    python -m eval.case_study --runs base=DIR control=DIR1,DIR2 better=DIR3,DIR4 --out runs/case

The first form asks the model, the second the bare model (named `base`) and each adapter, every problem in every view that it can
have; the answers are kept in OUT/answers/<name>, and the same command continues them. All further options are those of eval.run
(--tasks, --data, --limit, --batch-size, --dtype, --seed, ...). The third form reads output folders of eval.run, one per training
seed, and runs no model. Writes case_study.json, case_study.html and case_study.svg into OUT. Formulas: eval/reliance.py.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.problem import View
from data_prep.provenance import parents, write_json
from eval import case_page, gap, reliance, stats
from eval import run as eval_run
from eval.answers import SETTINGS, AnswersError, Side, check_pair, read_side
from eval.reliance import Measure
from eval.report import parse_runs

BASE = "base"
# view -> the unaltered input that it is compared with
ABLATIONS = {**dict.fromkeys(("blind", "white", "black", "gray", "noise", "shuffled", "rendered"), "vision"),
             **dict.fromkeys(("text", "vision", "conflict"), "both")}
PICTURE_GONE = ("blind", "white", "black", "gray", "noise", "shuffled")  # what can stand where the picture stood
FOUR = ("blind", "vision", "text", "both")
FACTS = "facts in words"
NEEDS = {"both": FACTS, "text": FACTS, "shuffled": "another problem's picture to borrow",
         **dict.fromkeys(("conflict", "other_facts"), "another problem's facts to borrow")}
# measured per kind of question as well
PER_KIND = ("accuracy", "utility_image", "utility_text", "imbalance", "consistency", "kappa", "text_preference", "gold_change")


@dataclass(frozen=True)
class Answers:
    """What one model answered on one task. right, pred, scores: view -> (seeds, items); the others (items,)."""

    right: dict[str, np.ndarray]
    pred: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]  # of lists, or None where an answer was generated
    choices: np.ndarray
    gold: np.ndarray
    groups: np.ndarray
    kinds: np.ndarray
    absent: dict[str, str]  # view -> why it is not there

    @classmethod
    def of(cls, side: Side, task: str) -> Answers:
        """Raises AnswersError when an item's options, or their order, are not the same in every view."""
        views, items = side.views(task), side.items(task)
        for view in views:
            for field in ("choices", "gold"):
                for run, row in zip(side.runs, side.column(task, view, field)):
                    for item, found in zip(items, row):
                        if found != item.get(field):
                            raise AnswersError(f"{run.folder}: item '{item['id']}' of task '{task}' has other {field} in view "
                                               f"'{view}' than in '{views[0]}': {found!r} against {item.get(field)!r}")
            for row in side.column(task, view, "scores"):
                for item, scores in zip(items, row):
                    if scores is not None and len(scores) != len(item["choices"] or ()):
                        raise AnswersError(f"item '{item['id']}' of task '{task}', view '{view}': {len(scores)} scores for "
                                           f"{len(item['choices'] or ())} options")
        asked = set.intersection(*(set(run.info.get("views") or ()) for run in side.runs))
        needs = NEEDS if "text" in views or "text" not in asked else {**NEEDS, "conflict": FACTS, "other_facts": FACTS}
        absent = {view: f"no problem of the task has {needs.get(view, 'a picture')}" if view in asked else f"{view} was not asked"
                  for view in View.__members__ if view not in views}
        return cls({view: side.correct(task, view) for view in views}, *(
            {view: _objects(side.column(task, view, field)) for view in views} for field in ("pred", "scores")),
            *(_objects([[row.get(field) for row in items]])[0] for field in ("choices", "gold", "group")),
            _objects([[(row.get("meta") or {}).get("kind") for row in items]])[0], absent)

    def where(self, chosen: np.ndarray) -> Answers:
        """The same of some items; chosen: (items,) of bool."""
        part = {name: {view: one[:, chosen] for view, one in getattr(self, name).items()} for name in ("right", "pred", "scores")}
        return replace(self, **part, **{name: getattr(self, name)[chosen] for name in ("choices", "gold", "groups", "kinds")})

    @cached_property
    def scored(self) -> np.ndarray:
        """(items,) of bool: the options' log-likelihoods are there in every view and seed."""
        return np.all([(one != None).all(axis=0) for one in self.scores.values()], axis=0)  # noqa: E711  elementwise

    @cached_property
    def log_probabilities(self) -> dict[str, np.ndarray]:
        """view -> (seeds, items, options); items that are not scored stand there with a single sure option."""
        kept = np.broadcast_to(self.scored, next(iter(self.right.values())).shape).ravel()
        found = {}
        for view, scores in self.scores.items():
            flat = reliance.log_probabilities([one if keep else [0.0] for one, keep in zip(scores.ravel(), kept)])
            found[view] = flat.reshape(*scores.shape, -1)
        return found

    @cached_property
    def gold_places(self) -> np.ndarray:
        return reliance.places_of(self.gold[None], self.choices)[0] * self.scored

    def pair(self, view: str) -> tuple[np.ndarray, np.ndarray]:
        return self.pred[view], self.right[view]


def _objects(rows: Sequence[Sequence]) -> np.ndarray:
    """(rows, items) of whatever the items are; numpy would make lists and words into arrays of its own kinds."""
    array = np.empty((len(rows), len(rows[0])), dtype=object)
    for place, row in enumerate(rows):
        for column, one in enumerate(row):
            array[place, column] = one
    return array


def measures(answers: Answers) -> tuple[dict[tuple[str, str], Measure], list[dict]]:
    """Every measure that the answers allow, by (name, variant), and what cannot be given: measure, variant, reason."""
    found: dict[tuple[str, str], Measure] = {}
    missing: list[dict] = []

    def give(name: str, variant: str, views: Sequence[str], make: Callable[[], Measure], reason: str = "") -> None:
        reason = ", and ".join(dict.fromkeys(answers.absent[view] for view in View.__members__ if view in views
                                            and view not in answers.right)) or reason
        if reason:
            missing.append({"measure": name, "variant": variant, "reason": reason})
        else:
            found[name, variant] = make()

    right, pred = answers.right, answers.pred
    unscored = "" if answers.scored.any() else "the answers were generated, so there are no likelihoods of options"
    closed = "" if any(answers.choices) else "the questions are open, so there are no options"
    n_choices = [len(one) if one else None for one in answers.choices]
    for view in View.__members__:
        give("accuracy", view, (view,), lambda: reliance.mean_of(right[view]))
    for view, original in ABLATIONS.items():
        views = (original, view)
        if view in right and original in right:
            same = reliance.agrees(*(table[one] for table in (pred, right) for one in views))
            changes = pred[original], pred[view], right[original], right[view]
        give("consistency", view, views, lambda: reliance.consistency(same))
        give("consistency_right", view, views, lambda: reliance.consistency(same, right[original]))
        give("consistency_wrong", view, views, lambda: reliance.consistency(same, 1 - right[original]))
        give("kappa", view, views, lambda: reliance.kappa(
            *(reliance.places_of(pred[one], answers.choices) for one in views), n_choices), closed)
        for direction in (None, "right_to_wrong", "wrong_to_right", "wrong_to_other"):
            give(direction or "flips", view, views, lambda: reliance.flips(*changes, direction))
        for name in ("kl", "js", "gold_change"):
            give(name, view, views, lambda: _soft(answers, name, *views), unscored)
    for view in ("text", *PICTURE_GONE):
        give("utility_image", view, (ABLATIONS[view], view), lambda: reliance.utility(right[ABLATIONS[view]], right[view]))
    for view in ("vision", "rendered"):
        give("utility_text", view, (ABLATIONS[view], view), lambda: reliance.utility(right[ABLATIONS[view]], right[view]))
    give("imbalance", "text", ("both", "vision", "text"),
         lambda: reliance.imbalance(right["both"], right["vision"], right["text"]))
    for view in PICTURE_GONE:
        give("imbalance_drawn", view, ("vision", "rendered", view),
             lambda: reliance.imbalance(right["vision"], right["rendered"], right[view]))
    for name, alone in (("utilisation_image", "text"), ("utilisation_text", "vision")):
        give(name, alone, ("both", alone), lambda: reliance.utilisation(right["both"], right[alone]))
    constant = reliance.majority(answers.gold, answers.choices)
    give("perceptual", "accuracy", ("vision", "shuffled"), lambda: reliance.perceptual_score(right["vision"], right["shuffled"]))
    give("perceptual", "majority", ("vision", "shuffled"),
         lambda: reliance.perceptual_score_majority(right["vision"], right["shuffled"], constant))
    for part in ("image", "text", "interaction", "share"):
        give(f"shapley_{part}", "accuracy", FOUR, lambda: reliance.shapley(*(right[view] for view in FOUR), part))
        give(f"shapley_{part}", "log_probability", FOUR, lambda: _shapley_soft(answers, part), unscored)
    for part in ("preference", "text", "image", "neither"):
        give("text_preference" if part == "preference" else f"follows_{part}", "conflict", ("conflict", "other_facts", "vision"),
             lambda: reliance.follows(*map(answers.pair, ("conflict", "other_facts", "vision")), part))
    return found, missing


def _soft(answers: Answers, name: str, original: str, view: str) -> Measure:
    first, second = (answers.log_probabilities[one] for one in (original, view))
    if name == "gold_change":
        values = np.array([reliance.gold_change(a, b, answers.gold_places) for a, b in zip(first, second)])
    else:
        values = (reliance.kl if name == "kl" else reliance.jensen_shannon)(first, second)
    return reliance.mean_of(values, answers.scored)


def _shapley_soft(answers: Answers, part: str) -> Measure:
    kept = answers.scored
    gold = answers.gold_places[None, :, None]
    worth = [np.take_along_axis(answers.log_probabilities[view], gold, axis=2)[..., 0] for view in FOUR]
    # an item without scores adds 0 to every coalition; the share is not moved by it, and the means are taken among the others
    found = reliance.shapley(*(np.where(kept, one, 0.0) for one in worth), part)
    return replace(found, n=float(kept.sum())) if part == "share" else reliance.mean_of(found.columns[0], kept)


def measure(side: Side, task: str, *, seed: int = 0) -> dict:
    """All numbers of one model on one task, as plain values.

    Keys: n, n_groups, n_seeds, left_out, chance, views and warnings (as in gap.measure), majority, measures {name: {variant:
    value, low, high, n, note, ...}}, missing, kinds {kind: n, n_groups, chance, measures}.
    """
    answers = Answers.of(side, task)
    known = gap.measure(side, task, seed=seed)
    found, missing = measures(answers)
    result = {**{key: known.get(key) for key in ("n", "n_groups", "n_seeds", "left_out", "chance", "views", "warnings")},
              "majority": reliance.majority(answers.gold, answers.choices), "missing": missing,
              "measures": _estimates(found, answers, seed), "kinds": {}}
    for kind in sorted({str(one) for one in answers.kinds if one is not None}):
        part = answers.where(np.array([str(one) == kind for one in answers.kinds]))
        chosen = {key: one for key, one in measures(part)[0].items() if key[0] in PER_KIND}
        result["kinds"][kind] = {
            "n": len(part.gold), "n_groups": len(set(part.groups)),
            "chance": stats.chance_level([len(one) if one else None for one in part.choices]),
            "measures": _estimates(chosen, part, seed)}
    return result


def _estimates(found: dict[tuple[str, str], Measure], answers: Answers, seed: int) -> dict[str, dict[str, dict]]:
    result: dict[str, dict[str, dict]] = {}
    for (name, variant), one in found.items():
        value = stats.accuracy(answers.right[variant], clusters=answers.groups) if name == "accuracy" else \
            reliance.estimate(one, answers.groups, seed)
        result.setdefault(name, {})[variant] = asdict(value)
    return result


def change(before: Side, after: Side, task: str, *, seed: int = 0) -> dict[str, dict[str, dict]]:
    """after - before of every measure that both have, paired by item: {name: {variant: value, low, high, n, note, ...}}."""
    sides = [Answers.of(side, task) for side in (before, after)]
    old, new = (measures(one)[0] for one in sides)
    result: dict[str, dict[str, dict]] = {}
    for name, variant in old:
        if (name, variant) in new:
            found = reliance.difference(old[name, variant], new[name, variant], sides[0].groups, seed)
            result.setdefault(name, {})[variant] = asdict(found)
    return result


def compare(sides: Sequence[Side], *, seed: int = 0) -> dict:
    """The content of case_study.json. Raises AnswersError when the models were not measured alike on the same items."""
    shared = {side.name: check_pair(sides[0], side) for side in sides}
    partly = sorted(set.union(*(set(side.tasks()) for side in sides)) - set.intersection(*map(set, shared.values())))
    jobs = [(task, side) for task in sides[0].tasks() for side in sides if task in shared[side.name]]
    tasks: dict = {task: {"data": sides[0].runs[0].info["tasks"][task], "models": {}, "changes": {}} for task in sides[0].tasks()}
    for task, side in tqdm(jobs, desc="measuring", unit="model", mininterval=2):
        tasks[task]["models"][side.name] = measure(side, task, seed=seed)
        if side is not sides[0]:
            tasks[task]["changes"][side.name] = change(sides[0], side, task, seed=seed)
    info = sides[0].runs[0].info
    return {**parents(), "bootstrap_seed": seed, "level": stats.LEVEL, "models": [gap.provenance(side) for side in sides],
            "settings": {key: info[key] for key in SETTINGS}, "only_in_some": partly, "tasks": tasks}


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those that are handed on to eval.run."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.case_study", description="How much a model's answers depend on the picture.", allow_abbrev=False,
        epilog="Every further option is one of eval.run: --tasks, --data, --limit, --batch-size, --dtype, --seed and so on.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="local folder or hub id; it is asked")
    source.add_argument("--runs", nargs="+", metavar="NAME=DIR[,DIR...]",
                        help="output folders of eval.run instead; nothing is asked")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR",
                        help="an adapter to set beside the bare model")
    parser.add_argument("--views", help="comma-separated; default: every view that a problem can have")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bootstrap-seed", type=int, default=0, help="seed of the intervals (0); --seed is eval.run's")
    args, rest = parser.parse_known_args(argv)
    if args.runs:
        if unused := ["--adapter"] * bool(args.adapter) + ["--views"] * bool(args.views) + rest:
            parser.error(f"--runs asks no model, so it takes no {unused[0]}")
        return args, rest
    rest += ["--views", args.views or ",".join(View.__members__)]
    adapter = ["--adapter", "any"] if args.adapter else []
    eval_run.parse(["--model", args.model, *adapter, "--out", str(args.out), *rest])  # what it refuses, it refuses before any asking
    return args, rest


def ask(args: argparse.Namespace, rest: Sequence[str]) -> list[Side]:
    """Ask the bare model and each adapter, as eval.run does. Raises AnswersError for an adapter that is not there."""
    adapters: dict[str, str] = {}
    for word in args.adapter:
        name, equals, folder = word.partition("=")
        if not (equals and folder and re.fullmatch(r"[\w+-][\w.+-]*", name)):
            raise AnswersError(f"--adapter takes NAME=DIR with a name of letters, digits, '.', '+' and '-', not '{word}'")
        if name == BASE or name in adapters:
            raise AnswersError(f"--adapter {word}: the name '{name}' is taken" + (" by the bare model" if name == BASE else ""))
        if not (Path(folder) / "adapter_config.json").is_file():
            raise AnswersError(f"--adapter {word}: {folder} holds no adapter_config.json")
        adapters[name] = folder
    folders = {name: args.out / "answers" / name for name in (BASE, *adapters)}
    for name, folder in folders.items():
        adapter = ["--adapter", adapters[name]] if name in adapters else []
        eval_run.main(["--model", args.model, *adapter, *rest, "--out", str(folder), "--label", name])
    return [read_side(name, [folder]) for name, folder in folders.items()]


def main(argv: Sequence[str] | None = None) -> None:
    args, rest = parse(argv)
    try:
        result = compare(parse_runs(args.runs) if args.runs else ask(args, rest), seed=args.bootstrap_seed)
    except (AnswersError, stats.StatsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    figure, page = case_page.main_figure(result), case_page.build(result)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "case_study.json", gap.plain(result))
    for name, text in (("case_study.svg", figure), ("case_study.html", page)):
        part = args.out / f"{name}.part"
        part.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(part, args.out / name)
    case_page.terminal(result)
    print(f"wrote case_study.json, case_study.html and case_study.svg to {args.out.as_posix()}")


if __name__ == "__main__":
    main()
