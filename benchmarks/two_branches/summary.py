"""What the rows say: means over seeds, paired differences, the table of benchmarks/README.md and the figure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

from rich.markup import escape
from rich.table import Table
from scipy import stats

from benchmarks.two_branches.rows import METHODS, TUNING_SEEDS
from benchmarks.two_branches.task import RATES, Task
from benchmarks.two_branches.training import LR
from eval import plots
from eval.show import table_lines

LEVEL = 0.95
MEASURES = ("weak", "dominant", "joint", "image_only", "text_only", "image_share", "corrupted_mean", "time_ratio")
COMPARED = MEASURES[:-1]
TITLE = "Change against plain training under the same optimizer"
BLOCK = re.compile(r"(?<=<!-- generated: two branches -->\n).*?(?=<!-- end -->)", re.S)
Row = Mapping


class SummaryError(ValueError):
    """Rows that do not make a comparison; the message is one sentence."""


def mean(values: Sequence[float | None]) -> dict[str, float | None]:
    """{"mean", "se"}: the standard error is the spread over the seeds / sqrt(seeds); none for one seed or missing values."""
    if None in values:
        return {"mean": None, "se": None}
    return {"mean": fmean(values), "se": stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None}


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "low", "high"} of value - other over the seeds, with the t interval at `LEVEL`; none for a single seed."""
    differences = [one - other for one, other in zip(values, others, strict=True)]
    found = mean(differences)
    reach = stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1) * found["se"] if len(differences) > 1 else None
    return {"mean": found["mean"], "low": None if reach is None else float(found["mean"] - reach),
            "high": None if reach is None else float(found["mean"] + reach)}


def verdict(change: Mapping[str, float | None]) -> str:
    """Of a paired difference in the accuracy of the weak branch."""
    if change["low"] is None:
        return "one seed"
    return "helps" if change["low"] > 0 else "hurts" if change["high"] < 0 else "not shown"


def summarise(rows: Iterable[Row], references: Sequence[Mapping], seeds: Sequence[int], task: Task) -> dict:
    """The content of summary, but for its parents. Raises SummaryError where a row, or what it is compared with, is missing."""
    by = {(row["method"], row["seed"]): row for row in rows}
    names = [name for name in METHODS if any(method == name for method, _ in by)]
    if missing := [(name, seed) for name in names for seed in seeds if (name, seed) not in by]:
        raise SummaryError("no row of {} with seed {}".format(*missing[0]))

    def values(name: str, measure: str) -> list:
        return [by[name, seed][measure] for seed in seeds]

    found = {}
    for name in names:
        entry, against = METHODS[name], {}
        for kind, other in (("plain", entry.plain), ("control", entry.control)):
            if other in names and other != name:
                against[f"against_{kind}"] = {one: paired(values(name, one), values(other, one)) for one in COMPARED}
        found[name] = {
            "idea": entry.idea, "optimizer": entry.optimizer, "settings": entry.settings, "source": entry.source,
            "epochs": entry.epochs * task.epochs, "plain": entry.plain, "control": entry.control,
            "measures": {one: {**mean(values(name, one)), "values": values(name, one)} for one in MEASURES},
            "corrupted": [fmean(each) for each in zip(*values(name, "corrupted"))],
            "diverged": sum(values(name, "diverged")), **against}
        if "against_plain" in found[name]:
            found[name]["verdict"] = verdict(found[name]["against_plain"]["weak"])
    return {"seeds": list(seeds), "tuning_seeds": list(TUNING_SEEDS), "level": LEVEL, "task": asdict(task), "lr": LR,
            "rates": list(RATES), "methods": found,
            "references": {kind: {key: fmean(one[kind][key] for one in references) for key in references[0][kind]}
                           for kind in references[0]}}


HEADER = ("method", "what it is", "weak branch", "against plain", "verdict", "weak against control", "dominant branch", "joint",
          "against plain", "image's share", "corrupted", "time per step")


def ordered(summary: Mapping) -> dict[str, Mapping]:
    """The methods in the order of the table; JSON has them by name."""
    return {name: summary["methods"][name] for name in [*METHODS, *summary["methods"]] if name in summary["methods"]}


def cells(summary: Mapping) -> list[tuple[str, ...]]:
    """The table's cells: accuracies and differences in points."""
    lines = []
    for name, one in ordered(summary).items():
        measures, plain = one["measures"], one.get("against_plain")
        control = f"{_change(one['against_control']['weak'])} (`{one['control']}`)" if "against_control" in one else "-"
        diverged = f"; {one['diverged']} of {len(summary['seeds'])} diverged" if one["diverged"] else ""
        lines.append((f"`{name}`", one["idea"] + diverged, _value(measures["weak"]), _change(plain["weak"]) if plain else "-",
                      one.get("verdict", "-"), control, _value(measures["dominant"]), _value(measures["joint"]),
                      _change(plain["joint"]) if plain else "-", _points(measures["image_share"]["mean"]),
                      _points(measures["corrupted_mean"]["mean"]),
                      "-" if measures["time_ratio"]["mean"] is None else f"x{measures['time_ratio']['mean']:.2f}"))
    return lines


def _points(value: float, sign: bool = False) -> str:
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def _value(one: Mapping[str, float | None]) -> str:
    return _points(one["mean"]) + ("" if one["se"] is None else f" ± {_points(one['se'])}")


def _change(one: Mapping[str, float | None]) -> str:
    interval = "" if one["low"] is None else f" [{_points(one['low'], True)}, {_points(one['high'], True)}]"
    return _points(one["mean"], True) + interval


def sentence(summary: Mapping) -> str:
    """What the table needs to be read."""
    task, lr = summary["task"], summary["lr"]
    bound, bare = (summary["references"][key] for key in ("best_possible", "untrained"))
    first = {}      # optimizer -> its first row, in the order of the table
    for name, one in ordered(summary).items():
        first.setdefault(one["optimizer"], name)
    under = " and ".join(f"from `{name}` on {'SGD (momentum 0.9)' if one == 'sgd' else 'Adam'} with learning rate {lr[one]:g}"
                         for one, name in first.items())
    return " ".join((
        f"Accuracies on {task['test']:,} test samples and differences in points, mean ± standard error over",
        f"{len(summary['seeds'])} seeds; in brackets the {100 * summary['level']:.0f} % t interval of differences paired by",
        "seed, not corrected for the number of rows. Branches: a linear probe on frozen features.",
        f"Rows {under}, {task['epochs']} epochs of {task['train']:,} samples; plain is that of the same optimizer.",
        f"Encoders that were never trained give {_points(bare['weak'])} (weak) and {_points(bare['dominant'])} (dominant);",
        f"the best rule there is gives {_points(bound['image'])} and {_points(bound['text'])} from one modality,",
        f"{_points(bound['joint'])} from both; chance is {_points(1 / task['classes'])}.",
        "Image's share: Shapley, of the joint accuracy. Corrupted: joint accuracy, mean over rates",
        f"{summary['rates'][0]:g} to {summary['rates'][-1]:g}. Time: CPU seconds per step over those of plain, in turn."))


def reading(summary: Mapping) -> list[str]:
    """Which intervals of the weak branch lie above 0, below it, or hold it: against plain and against controls."""
    lines = []
    for kind, against in (("against_plain", "Against plain training"), ("against_control", "Against their controls")):
        said: dict[str, list[str]] = {}
        for name, one in ordered(summary).items():
            if kind in one:
                beside = f" (`{one['control']}`)" if kind == "against_control" else ""
                said.setdefault(verdict(one[kind]["weak"]), []).append(f"`{name}`{beside}")
        parts = [f"{word}: {', '.join(names)}" for word, names in sorted(said.items())]
        lines += [f"- {against}, the weak branch. {'. '.join(part[0].upper() + part[1:] for part in parts)}."] if parts else []
    return lines


def block(summary: Mapping) -> str:
    dirty = ["", "Made from a working tree with uncommitted changes."] if summary.get("dirty") else []
    return "\n".join(["", *table_lines(HEADER, cells(summary)), "", sentence(summary), "", *reading(summary), *dirty, "", ""])


def rewritten(document: Path, summary: Mapping) -> tuple[str, bool]:
    """(the document with its block as it should be, whether it was). Raises SummaryError for a document without one."""
    text = document.read_text(encoding="utf-8")
    if len(BLOCK.findall(text)) != 1:
        raise SummaryError(f"{document}: there must be one block between '<!-- generated: two branches -->' and '<!-- end -->'")
    found = BLOCK.sub(lambda _: block(summary), text)
    return found, found == text


def terminal(summary: Mapping) -> Table:
    """The table without what would make its lines wrap: the descriptions, the names of controls and the last measures."""
    table = Table(title=TITLE)
    shown = [place for place, title in enumerate(HEADER) if title not in ("what it is", "image's share", "corrupted")]
    for place in shown:
        table.add_column(HEADER[place], no_wrap=place == 0)
    for line in cells(summary):
        table.add_row(*(escape(re.sub(r" \(`.*`\)|`", "", line[place])) for place in shown))
    return table


def figure(summary: Mapping) -> str:
    """Changes of three measures as an SVG, with the stamp of its numbers as last line. SummaryError: nothing is compared."""
    drawn = _drawn(summary)
    if not drawn[0][1]:
        raise SummaryError("no method here is compared with plain training, so there is nothing to draw")
    return plots.panel_figure([plots.Panel(label, series) for label, series in drawn], title=TITLE) + stamp(summary)


def stamp(summary: Mapping) -> str:
    return plots.stamp([TITLE, _drawn(summary)])


def _drawn(summary: Mapping) -> list[tuple[str, dict]]:
    panels = []
    for label, measure in (("weak branch, points", "weak"), ("dominant, points", "dominant"), ("joint, points", "joint")):
        series: dict[str, dict[str, tuple[float, float, float]]] = {}
        for name, one in ordered(summary).items():
            if "against_plain" in one:
                change = one["against_plain"][measure]
                point = tuple(math.nan if change[key] is None else change[key] for key in ("mean", "low", "high"))
                series.setdefault("SGD with momentum" if one["optimizer"] == "sgd" else "Adam", {})[name] = point
        panels.append((label, series))
    return panels
