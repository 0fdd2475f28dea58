"""SVG figures of the report and of the README. Deterministic: the same numbers give the same bytes.

Every series has its own marker and fill beside its colour (Okabe and Ito's palette), so that a figure can be read in
grey. Text is drawn as paths: a figure looks the same wherever it is shown and needs no font.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# view -> (marker, colour, filled); vision and both carry the story and are filled
STYLE = {
    "both": ("s", "#0072B2", True), "text": ("^", "#009E73", False), "vision": ("o", "#D55E00", True),
    "blind": ("X", "#555555", False), "white": ("P", "#CC79A7", False), "black": ("*", "#000000", False),
    "gray": ("h", "#999999", False), "noise": ("d", "#56B4E9", False), "shuffled": ("v", "#E69F00", False),
    "conflict": ("<", "#F0E442", False), "rendered": ("D", "#882255", False),
    "other_facts": (">", "#117733", False),
}
RUNS = [("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73"), ("D", "#CC79A7"), ("v", "#E69F00"), ("P", "#56B4E9")]
HATCH = ["", "///", "...", "xxx", "\\\\\\", "+++"]
SETTINGS = {"svg.hashsalt": "evensight", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10,
            "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left",
            "hatch.linewidth": 0.6, "text.parse_math": False}

Point = tuple[float, float, float]  # value, low, high as fractions; low and high may be nan


def gap_figure(rows: Sequence[Mapping], *, title: str = "", views: Sequence[str] = ("both", "text", "vision", "blind")
               ) -> str:
    """One line per run: accuracy of the views with intervals, and the gap as a bar from vision to both.

    rows: rows of eval.gap.table of one task. Raises ValueError for no rows. Returns the SVG as text.
    """
    if not rows:
        raise ValueError("no runs to draw")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        shown = [view for view in views if any(view in row["views"] for row in rows)]
        for place, row in enumerate(rows):
            found = row["views"]
            if "both" in found and "vision" in found:
                ends = found["vision"][0] * 100, found["both"][0] * 100
                axes.plot(ends, [place, place], color="#BBBBBB", linewidth=11, solid_capstyle="butt", zorder=1)
                low, high = (100 * one for one in (row.get("gap") or (0, math.nan, math.nan))[1:])
                reach = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
                axes.annotate(f"gap {ends[1] - ends[0]:+.1f}{reach}", (min(sum(ends) / 2, 84), place), xytext=(0, 17),
                              textcoords="offset points", ha="center", fontsize=9, fontweight="bold")
            for number, view in enumerate(shown):
                if view in found:
                    # a small step down per view, so that intervals of equal accuracies stay apart
                    _point(axes, found[view], place + 0.075 * (number - (len(shown) - 1) / 2), view)
        chance = sorted({round(row["chance"] * 100, 6) for row in rows})
        for one in chance:
            axes.axvline(one, color="#555555", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(rows)), [_run_label(row) for row in rows])
        axes.set_ylim(len(rows) - 0.45, -0.65)
        axes.set_xlim(0, 102)
        note = f" (dashed: chance, {', '.join(f'{one:.1f}' for one in chance)})" if chance else ""
        axes.set_xlabel("accuracy in per cent, 95 % interval" + note)
        axes.set_title(title)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        handles = [_point(axes, (math.nan,) * 3, 0, view) for view in shown]
        figure.legend(handles, shown, loc="outside lower center", ncols=len(shown), frameon=False)

    return _svg(draw, (8.2, 1.6 + 0.75 * len(rows)))


def change_figure(changes: Mapping[str, Mapping[str, Point]], *, title: str = "") -> str:
    """Changes with intervals around 0. changes: series (run) -> {what: (value, low, high)}."""
    names = list(dict.fromkeys(name for series in changes.values() for name in series))
    if not names:
        raise ValueError("no changes to draw")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (run, series) in enumerate(changes.items()):
            marker, colour, filled = _run_style(number)
            shift = 0.6 * ((number + 0.5) / len(changes) - 0.5)
            for place, name in enumerate(names):
                if name in series:
                    _mark(axes, series[name], place + shift, marker, colour, filled)
            axes.plot([], [], marker=marker, color=colour, linestyle="none", label=run,
                      markerfacecolor=colour if filled else "white")
        axes.axvline(0, color="#555555", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("change in points, 95 % interval, paired by item")
        axes.set_title(title)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)

    return _svg(draw, (8.2, 1.3 + len(names) * (0.22 + 0.11 * len(changes))))


def bar_figure(groups: Mapping[str, Mapping[str, Point]], *, title: str = "", chance: float | None = None) -> str:
    """Bars with intervals: series (run) -> {group (view or question kind): (value, low, high)}."""
    names = list(dict.fromkeys(name for series in groups.values() for name in series))
    if not names:
        raise ValueError("no bars to draw")
    width_in = max(5.5, min(11.0, 1.5 + len(names) * (0.35 + 0.3 * len(groups))))
    turned = 0.085 * max(map(len, names)) + 0.1 > (width_in - 0.8) / len(names)  # inches: a name against its place

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.8 / len(groups)
        for number, (run, series) in enumerate(groups.items()):
            places = [place + width * (number + 0.5) - 0.4 for place, name in enumerate(names) if name in series]
            points = [series[name] for name in names if name in series]
            axes.bar(places, [100 * one[0] for one in points], width * 0.94, label=run, edgecolor="white",
                     color=RUNS[number % len(RUNS)][1], hatch=HATCH[(number + number // len(RUNS)) % len(HATCH)],
                     yerr=_reach(points), ecolor="#222222", capsize=2, error_kw={"linewidth": 1})
        if chance is not None:
            axes.axhline(100 * chance, color="#222222", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(range(len(names)), names, rotation=30 if turned else 0, ha="right" if turned else "center",
                        rotation_mode="anchor" if turned else "default")
        axes.set_ylim(0, 102)
        axes.set_ylabel("accuracy in per cent")
        axes.set_title(title)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)

    return _svg(draw, (width_in, 3.6))


def inline(svg: str, prefix: str, label: str) -> str:
    """The SVG for use inside an HTML page: no XML header, no metadata, ids made unique by `prefix`, a text label.

    Several matplotlib figures on one page otherwise share ids, and a page has only one of each.
    """
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _point(axes, point: Sequence[float], place: float, view: str):
    marker, colour, filled = STYLE.get(view, ("o", "#333333", False))
    return _mark(axes, point, place, marker, colour, filled)


def _mark(axes, point: Sequence[float], place: float, marker: str, colour: str, filled: bool):
    return axes.errorbar([100 * point[0]], [place], xerr=_reach([point]), fmt=marker, color=colour, markersize=7,
                         markerfacecolor=colour if filled else "white", markeredgewidth=1.5, capsize=2.5, zorder=3)


def _reach(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lengths of the error bars below and above; 0 where there is no interval. Rounding must not make one negative."""
    return [[0.0 if math.isnan(low) else max(0.0, 100 * (value - low)) for value, low, _ in points],
            [0.0 if math.isnan(high) else max(0.0, 100 * (high - value)) for value, _, high in points]]


def _run_style(number: int) -> tuple[str, str, bool]:
    """(marker, colour, filled) of a run; the second round through the palette swaps filled and hollow."""
    return *RUNS[number % len(RUNS)], (number + number // len(RUNS)) % 2 == 0


def _run_label(row: Mapping) -> str:
    return row["run"] if row.get("n_seeds", 1) == 1 else f"{row['run']}\n({row['n_seeds']} seeds)"


def _svg(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    # no pyplot: a figure of its own leaves no global state behind
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def curve_figure(curves: Mapping[str, Sequence[Mapping]], *, title: str = "") -> str:
    """Two panels against optimizer steps: the gap, and the accuracies it is made of (both solid, vision dashed).

    curves: recipe -> points, each {"step": int, "gap": Point, "both": Point, "vision": Point}, in order of steps. Bands
    are the points' intervals. Raises ValueError for nothing to draw. Returns the SVG as text.
    """
    if not any(curves.values()):
        raise ValueError("no points to draw")

    def draw(figure: Figure) -> None:
        gaps, accuracies = figure.subplots(1, 2)
        for number, (recipe, points) in enumerate(curves.items()):
            marker, colour, filled = _run_style(number)
            style = {"color": colour, "marker": marker, "markersize": 5, "markerfacecolor": colour if filled else "white"}
            steps = [point["step"] for point in points]
            for axes, what, line in ((gaps, "gap", "-"), (accuracies, "both", "-"), (accuracies, "vision", (0, (4, 2)))):
                value, low, high = ([100 * point[what][part] for point in points] for part in range(3))
                axes.plot(steps, value, linestyle=line, linewidth=1.6, label=recipe if what == "gap" else None, **style)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        gaps.axhline(0, color="#555555", linewidth=1)
        gaps.set_title(title)
        gaps.set_ylabel("gap (both - vision) in points")
        accuracies.set_ylim(0, 102)
        accuracies.set_ylabel("accuracy in per cent")
        for axes in (gaps, accuracies):
            axes.set_xlabel("optimizer step, bands: 95 % intervals")
            axes.set_xticks(sorted({point["step"] for points in curves.values() for point in points}))
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
        for name, line in (("both", "-"), ("vision", (0, (4, 2)))):
            accuracies.plot([], [], color="#222222", linestyle=line, linewidth=1.6, label=name)
        accuracies.legend(loc="lower right", frameon=False)
        figure.legend(*gaps.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    return _svg(draw, (9.6, 3.6 + 0.22 * (len(curves) // 4)))


def stamp(numbers: Sequence) -> str:
    """A comment with the hash of the numbers drawn, the last line of a committed figure: a check then draws nothing."""
    text = json.dumps(numbers, sort_keys=True)
    return f"<!-- numbers {hashlib.sha256(text.encode()).hexdigest()} -->\n"


class Panel(NamedTuple):
    """One panel of `panel_figure`: series (run) -> {row: (value, low, high)}, drawn times `scale`."""

    label: str
    series: Mapping[str, Mapping[str, Point]]
    scale: float = 100
    line: float | None = 0.0  # a reference to draw, in the unit of the values
    limits: tuple[float | None, float | None] = (None, None)


def panel_figure(panels: Sequence[Panel], *, title: str = "") -> str:
    """Values with intervals, one row per name, side by side panels that share their rows; a run has one marker in all.

    Raises ValueError when there is nothing to draw. Returns the SVG as text.
    """
    names = list(dict.fromkeys(name for panel in panels for series in panel.series.values() for name in series))
    runs = list(dict.fromkeys(run for panel in panels for run in panel.series))
    if not names:
        raise ValueError("nothing to draw")

    def draw(figure: Figure) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
            for number, run in enumerate(runs):
                marker, colour, filled = _run_style(number)
                shift = 0.66 * ((number + 0.5) / len(runs) - 0.5)
                series = panel.series.get(run, {})
                places = [place + shift for place, name in enumerate(names) if name in series]
                found = [series[name] for name in names if name in series]
                if found:
                    reach = [[one * panel.scale / 100 for one in side] for side in _reach(found)]  # _reach is times 100
                    axes.errorbar([panel.scale * one[0] for one in found], places, xerr=reach, fmt=marker, color=colour,
                                  markerfacecolor=colour if filled else "white", markeredgewidth=1.5, markersize=7,
                                  capsize=2.5, zorder=3)
            if panel.line is not None:
                axes.axvline(panel.scale * panel.line, color="#555555", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            for place in range(1, len(names)):
                axes.axhline(place - 0.5, color="#E5E5E5", linewidth=0.6, zorder=0)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlim(*panel.limits)
            axes.set_xlabel(panel.label)
            axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
        figure.axes[0].set_title(title)
        styles = [_run_style(number) for number in range(len(runs))]
        handles = [figure.axes[0].plot([], [], marker=marker, color=colour, linestyle="none", markersize=7, markeredgewidth=1.5,
                                       markerfacecolor=colour if filled else "white")[0] for marker, colour, filled in styles]
        figure.legend(handles, runs, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)

    return _svg(draw, (2.2 + 6.0 * min(1, len(panels)) + 3.4 * (len(panels) - 1), 1.3 + len(names) * (0.16 + 0.13 * len(runs))))


def share_figure(rows: Mapping[str, Mapping[str, float]], *, title: str = "", label: str = "") -> str:
    """Stacked bars, one per run: {run: {part: share}}, the same parts in every run. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("nothing to draw")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        parts = list(next(iter(rows.values())))
        start = [0.0] * len(rows)
        for number, part in enumerate(parts):
            widths = [100 * row[part] for row in rows.values()]
            axes.barh(range(len(rows)), widths, 0.62, left=start, label=part, edgecolor="white", hatch=HATCH[number % len(HATCH)],
                      color=("#D55E00", "#DDDDDD", "#0072B2")[number % 3])
            for place, (left, width) in enumerate(zip(start, widths)):
                if width >= 6:  # narrower, the number would not fit
                    axes.text(left + width / 2, place, f"{width:.0f}", ha="center", va="center", fontsize=9,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
            start = [left + width for left, width in zip(start, widths)]
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel(label)
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=len(parts), frameon=False)

    return _svg(draw, (8.2, 1.4 + 0.45 * len(rows)))


def rate_figure(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], *, title: str = "", label: str = "") -> str:
    """Accuracy against a rate, side by side panels that share their axes; a run has one marker in all.

    panels: title -> run -> points (rate, value, low, high) in order of rates; bands are the intervals. Raises ValueError
    when there is nothing to draw. Returns the SVG as text.
    """
    runs = list(dict.fromkeys(run for panel in panels.values() for run in panel))
    if not runs:
        raise ValueError("nothing to draw")

    def draw(figure: Figure) -> None:
        columns = min(2, len(panels))
        rows = figure.subplots(-(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False)
        for axes, (name, panel) in zip(rows.flat, panels.items()):
            for run, points in panel.items():
                marker, colour, filled = _run_style(runs.index(run))
                rates, value, low, high = zip(*((point[0], *(100 * one for one in point[1:])) for point in points))
                axes.plot(rates, value, color=colour, marker=marker, markersize=5, linewidth=1.6,
                          markerfacecolor=colour if filled else "white")
                axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_title(name)
            axes.set_ylim(0, 102)
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
        for axes in rows.flat[len(panels):]:
            axes.set_axis_off()
        for line in rows:
            line[0].set_ylabel("accuracy in per cent")
        for axes in rows[-1]:
            axes.set_xlabel(label)
        figure.suptitle(title)
        styles = [_run_style(number) for number in range(len(runs))]
        handles = [rows[0][0].plot([], [], marker=marker, color=colour, markersize=5, linewidth=1.6,
                                   markerfacecolor=colour if filled else "white")[0] for marker, colour, filled in styles]
        figure.legend(handles, runs, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)

    return _svg(draw, (9.6, 0.9 + 3.0 * -(-len(panels) // 2) + 0.22 * (len(runs) // 4)))
