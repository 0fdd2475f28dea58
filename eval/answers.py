"""The output folders of eval.run, read back and paired: nothing is compared that was not measured alike.

A `Run` is one folder (answers.jsonl, run.json). A `Side` is one recipe: one run, or one per training seed, whose items
are the same. Reading checks what every number rests on; whatever does not fit is an AnswersError that names it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.images import one_line

# A gap between runs that differ in one of these would measure the setting.
SETTINGS = ("parser", "mode", "rationale", "max_new_tokens", "pixels")
ORDER = ("both", "text", "vision", "blind", "white", "black", "gray", "noise", "shuffled", "conflict", "other_facts", "rendered")
FIELDS = ("task", "view", "id", "group", "gold", "pred", "correct")
NAMES, LISTS = ("task", "view", "id", "group"), ("choices", "options")    # what is text, and what is a list of texts or null


class AnswersError(ValueError):
    """Output folders that cannot be read or compared; the message is one sentence that says which and why."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Run:
    """One evaluation: `rows` maps (task, view) to {item id: row of answers.jsonl}, the same items in every view."""

    folder: Path
    info: dict
    rows: dict[tuple[str, str], dict[str, dict]]
    # task -> {"n": items that some view lacks, "views": {view: how many of them it lacks}}
    left_out: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """One recipe under one name, with a run per training seed on the same items in the same views."""

    name: str
    runs: tuple[Run, ...]

    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self.runs[0].rows})

    def views(self, task: str) -> list[str]:
        """Views that every seed holds for the task, in their usual order."""
        shared = set.intersection(*({view for name, view in run.rows if name == task} for run in self.runs))
        return sorted(shared, key=lambda view: (ORDER.index(view) if view in ORDER else len(ORDER), view))

    def items(self, task: str) -> list[dict]:
        """One row per item (of the first seed and view), ordered by id: gold, choices, group, meta, image."""
        rows = self.runs[0].rows[task, self.views(task)[0]]
        return [rows[name] for name in sorted(rows)]

    def column(self, task: str, view: str, field: str) -> list[list]:
        """`field` of every answer, (seeds, items), items ordered by id."""
        return [[run.rows[task, view][name].get(field) for name in sorted(run.rows[task, view])] for run in self.runs]

    def correct(self, task: str, view: str) -> np.ndarray:
        """(seeds, items) of 0.0 and 1.0."""
        return np.array(self.column(task, view, "correct"), dtype=float)

    def clusters(self, task: str) -> list[str]:
        return [row["group"] for row in self.items(task)]

    def n_choices(self, task: str) -> list[int | None]:
        return [len(row["choices"]) if row.get("choices") else None for row in self.items(task)]


def read_run(folder: str | Path) -> Run:
    """Read an output folder of eval.run. Raises AnswersError for a missing, torn, repeated or contradictory row."""
    folder = Path(folder)
    info = {"rationale": False, **_json(folder / "run.json")}     # older runs knew no rationale
    for key in (*SETTINGS, "tasks"):
        if key not in info:
            raise AnswersError(f"{folder / 'run.json'} has no '{key}', so its answers cannot be compared")
    _check_info(info, folder / "run.json")
    if info.get("finished") is False:
        raise AnswersError(f"the evaluation in {folder} was cut short; the same eval.run command completes it")
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    path = folder / "answers.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AnswersError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise AnswersError(f"{path}:{number}: not a JSON object; was the evaluation cut off? Run it again to "
                               "complete it") from None
        _check(row, f"{path}:{number}")
        items = rows.setdefault((row["task"], row["view"]), {})
        if row["id"] in items:
            raise AnswersError(f"{path}:{number}: item '{row['id']}' of task '{row['task']}', view '{row['view']}' "
                               "stands here for the second time")
        items[row["id"]] = row
    if not rows:
        raise AnswersError(f"{path} holds no answers")
    run = Run(folder, info, rows)
    _pair_views(run)
    return run


def read_side(name: str | None, folders: str | Iterable[str | Path]) -> Side:
    """Read one recipe: a folder, several joined by commas, or a list of them (one per training seed).

    name None takes the label of run.json. Raises AnswersError when the seeds are not comparable with each other.
    """
    if isinstance(folders, str):
        folders = [part.strip() for part in folders.split(",") if part.strip()]
    runs = tuple(read_run(folder) for folder in folders)
    if not runs:
        raise AnswersError("no output folder given")
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise AnswersError("the same output folder is given twice as two seeds")
    side = Side(name or _label(runs), runs)
    for run in runs[1:]:
        _check_alike(runs[0], run)
        if set(run.rows) != set(runs[0].rows):
            odd = sorted(set(run.rows) ^ set(runs[0].rows))[0]
            raise AnswersError(f"{runs[0].folder} and {run.folder} are seeds of one recipe, but only one of them holds "
                               f"task '{odd[0]}' in view '{odd[1]}'")
    return side


def check_pair(before: Side, after: Side) -> list[str]:
    """The tasks both sides hold, after checking that they were measured alike on the same items.

    Raises AnswersError naming what differs: parser, mode, max_new_tokens, pixels, the data's sha256, the items, the
    number of seeds (one against several is allowed: one base model, several trainings of it).
    """
    tasks = [task for task in before.tasks() if task in after.tasks()]
    if not tasks:
        raise AnswersError(f"'{before.name}' and '{after.name}' have no task in common "
                           f"({', '.join(before.tasks())} against {', '.join(after.tasks())})")
    if len(before.runs) != len(after.runs) and 1 not in (len(before.runs), len(after.runs)):
        raise AnswersError(f"'{before.name}' has {len(before.runs)} seeds and '{after.name}' has {len(after.runs)}; "
                           "seeds are paired by position, so give as many on both sides, or one on one of them")
    _check_alike(before.runs[0], after.runs[0])
    return tasks


def _check_alike(a: Run, b: Run) -> None:
    for key in (*SETTINGS, "corrupt"):          # only runs with corruption record it
        if a.info.get(key) != b.info.get(key):
            raise AnswersError(f"{a.folder} and {b.folder} differ in {key}: {_short(a.info.get(key))} against "
                               f"{_short(b.info.get(key))}; evaluate both with the same")
    for task in sorted({task for task, _ in a.rows} & {task for task, _ in b.rows}):
        sums = [run.info["tasks"].get(task, {}).get("sha256") for run in (a, b)]
        if sums[0] != sums[1]:
            raise AnswersError(f"{a.folder} and {b.folder} differ in the data of task '{task}': sha256 "
                               f"{_short(sums[0])} against {_short(sums[1])}")
        first, second = (_items(run, task) for run in (a, b))
        if first.keys() != second.keys():
            odd = sorted(first.keys() ^ second.keys())[0]
            left = "; items that a view cannot show were left out, so evaluate both in the same views" \
                if task in a.left_out or task in b.left_out else ""
            raise AnswersError(f"the items of task '{task}' do not pair up: {len(first)} in {a.folder}, "
                               f"{len(second)} in {b.folder}, and '{odd}' is in one of them only{left}")
        for name, row in first.items():
            for field in ("gold", "choices", "group"):
                if row.get(field) != second[name].get(field):
                    raise AnswersError(f"item '{name}' of task '{task}' differs in {field} between {a.folder} and "
                                       f"{b.folder}: {row.get(field)!r} against {second[name].get(field)!r}")


def _pair_views(run: Run) -> None:
    """Keep the items that every view of a task holds, so that all views are measured on the same ones.

    A finished run lacks an item in a view that its problem cannot be shown in (no facts, no partner), or in every view
    that was asked; in any other run the evaluation was cut short, and what it lacks is chance.
    """
    finished = run.info.get("finished") is True
    for task in sorted({task for task, _ in run.rows}):
        if task not in run.info["tasks"]:
            raise AnswersError(f"{run.folder} has answers of task '{task}', which its run.json does not name")
        views = {view: items for (name, view), items in run.rows.items() if name == task}
        shared, known = set.intersection(*map(set, views.values())), set().union(*views.values())
        whole = max(len(known), run.info["tasks"][task].get("n") or 0) if finished else len(known)
        if len(shared) == whole:
            continue
        view = min(views, key=lambda one: (len(views[one]), one))
        if not finished or not shared:
            raise AnswersError(f"the items of task '{task}' in {run.folder} do not pair up: view '{view}' holds "
                               f"{len(views[view])} of {len(known)}, and '{sorted(known - shared)[0]}' is not in every "
                               "view; complete the evaluation" + ("" if shared else ", or ask for fewer views"))
        for one, items in views.items():
            run.rows[task, one] = {name: row for name, row in items.items() if name in shared}
        lacking = {one: whole - len(items) for one, items in views.items() if len(items) < whole}
        run.left_out[task] = {"n": whole - len(shared), "views": lacking}


def _check(row, place: str) -> None:
    if not isinstance(row, dict):
        raise AnswersError(f"{place}: not a JSON object")
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise AnswersError(f"{place}: no field '{missing[0]}'")
    for name in NAMES:
        if not _is_text(row[name]):
            raise AnswersError(f"{place}: '{name}' is {_short(row[name])}, not text")
    for name in LISTS:
        if not (row.get(name) is None or isinstance(row[name], list) and all(isinstance(one, str) for one in row[name])):
            raise AnswersError(f"{place}: '{name}' is {_short(row[name])}, not a list of texts")
    for name, kind, said in (("pred", str, "text"), ("question", str, "text"), ("text", str, "text"), ("finish", str, "text"),
                             ("meta", dict, "an object"), ("scores", list, "a list"), ("answer_tokens", int, "a number"),
                             ("image", (str, list), "a path or several")):
        if not (row.get(name) is None or isinstance(row[name], kind)):
            raise AnswersError(f"{place}: '{name}' is {_short(row[name])}, not {said} or null")
    if isinstance(row.get("image"), list) and not all(isinstance(one, str) for one in row["image"]):
        raise AnswersError(f"{place}: 'image' is {_short(row['image'])}, not a path or several or null")
    if isinstance(row.get("scores"), list) and not all(isinstance(one, (int, float)) for one in row["scores"]):
        raise AnswersError(f"{place}: 'scores' is {_short(row['scores'])}, not a list of numbers")
    if not isinstance(row["correct"], bool):
        raise AnswersError(f"{place}: 'correct' is {row['correct']!r}, not true or false")
    # An answer that is right in one field and wrong in another would be counted by chance.
    if row["correct"] and row["pred"] is None:
        raise AnswersError(f"{place}: an unparsed answer (pred null) is marked correct")
    if row.get("choices") and row["correct"] != (row["pred"] == row["gold"]):
        raise AnswersError(f"{place}: 'correct' is {str(row['correct']).lower()}, but pred is {row['pred']!r} and gold "
                           f"is {row['gold']!r}")


def _check_info(info: dict, path: Path) -> None:
    """AnswersError where run.json holds something else than eval.run writes into it, of what is used of it."""
    tasks = info["tasks"]
    if not isinstance(tasks, dict) or not all(isinstance(one, dict) for one in tasks.values()):
        raise AnswersError(f"{path}: 'tasks' is {_short(tasks)}, not an object of objects")
    for task, one in tasks.items():
        if not (one.get("n") is None or type(one["n"]) is int):
            raise AnswersError(f"{path}: tasks.{task}: 'n' is {_short(one['n'])}, not a number")
        for key in ("data", "root", "sha256"):
            if not (one.get(key) is None or _is_path(one[key])):
                raise AnswersError(f"{path}: tasks.{task}: '{key}' is {_short(one[key])}, not text")
    for key in ("label", "model", "adapter"):
        if not (info.get(key) is None or _is_path(info[key])):
            raise AnswersError(f"{path}: '{key}' is {_short(info[key])}, not text")
    if not (info.get("finished") is None or isinstance(info["finished"], bool)):
        raise AnswersError(f"{path}: 'finished' is {_short(info['finished'])}, not true or false")


def _is_text(value) -> bool:
    """Whether the value is text that can be written again: half of a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_path(value) -> bool:
    return _is_text(value) and "\0" not in value


def _label(runs: Sequence[Run]) -> str:
    """The label of run.json; of several seeds what their labels share: control-seed0, control-seed1 -> control."""
    labels = [str(run.info.get("label") or run.folder.name) for run in runs]
    shared = re.sub(r"[-_. ]*(?:seed)?[-_. ]*$", "", os.path.commonprefix(labels)) if len(runs) > 1 else ""
    return shared or labels[0]


def _items(run: Run, task: str) -> dict[str, dict]:
    return next(items for (name, _), items in sorted(run.rows.items()) if name == task)


def _json(path: Path) -> dict:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AnswersError(f"cannot read {path}: {error}") from None
    if not isinstance(info, dict):
        raise AnswersError(f"{path} is not a JSON object")
    return info


def _short(value) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 24 or isinstance(value, dict) and len(text) <= 100 else text[:13] + '..."'


def sides_of(runs: dict[str, Side | Sequence[str | Path] | str]) -> list[Side]:
    """Named sides from folders or from sides already read."""
    return [value if isinstance(value, Side) else read_side(name, value) for name, value in runs.items()]
