"""The comparison of eval.gap as tables: on the terminal and in Markdown, from the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep import libraries
from eval.gap import DIFFERENCES, closed, points, within

TITLES = {"gap": "gap (both - vision)", "text_gap": "text gap (text - vision)",
          "image_gain": "image gain (vision - blind)", "rendered_gap": "rendered gap (vision - rendered)"}


class Section(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str] = []


def sections(result: dict) -> Iterator[Section]:
    """Tables of a comparison (see eval.gap.compare), task by task. Numbers are points, intervals 95 %."""
    names = result["before"]["name"], result["after"]["name"]
    if names[0] == names[1]:
        names = f"{names[0]} (before)", f"{names[1]} (after)"
    for task, found in result["tasks"].items():
        before, after, change = found["before"], found["after"], found["change"]
        yield Section(
            f"{task}: accuracy",
            ("view", names[0], names[1], "change", "McNemar p", "unparsed", "tokens"),
            [(view, within(before["views"].get(view)), within(after["views"].get(view)),
              within(change["views"].get(view), "change", sign=True), _p(change["views"].get(view)),
              _two(before, after, view, "unparsed", points), _two(before, after, view, "answer_tokens", _tokens))
             for view in [*before["views"], *(view for view in after["views"] if view not in before["views"])]],
            [f"n = {before['n']} items in {before['n_groups']} groups; chance {points(before['chance'])}; "
             f"seeds {before['n_seeds']} and {after['n_seeds']}"])
        yield Section(f"{task}: differences of views", ("", names[0], names[1], "change", "sides moved", "closed"),
                      list(_differences(before, after, change)), _spread_notes(change))
        rows = list(_reliance(before, after, change))
        if rows:
            yield Section(f"{task}: reliance on the picture", ("", names[0], names[1], "change"), rows)
        verdict = change["verdict"]
        notes = [f"verdict: {verdict['word']} ({verdict['reason']})"]
        missing = dict.fromkeys(before["missing"] + after["missing"])
        notes += [f"cannot be given: {one}" for one in missing]
        notes += [f"warning, {name}: {one}" for name, side in zip(names, (before, after)) for one in side["warnings"]]
        yield Section(f"{task}: verdict", (), [], notes)
    if result["only_in_one"]:
        yield Section("tasks left out", (), [], [f"measured on one side only: {', '.join(result['only_in_one'])}"])


def _differences(before: dict, after: dict, change: dict) -> Iterator[tuple[str, ...]]:
    for name, (first, second) in DIFFERENCES.items():
        if name not in before and name not in after:
            continue
        delta = change.get(name)
        moved = f"{first} {points(delta[f'd_{first}'], True)}, {second} {points(delta[f'd_{second}'], True)}" \
            if delta else "-"
        yield (TITLES[name], within(before.get(name), "gap", True), within(after.get(name), "gap", True),
               within(delta, "change", True), moved, closed(delta))


def _reliance(before: dict, after: dict, change: dict) -> Iterator[tuple[str, ...]]:
    for view in dict.fromkeys([*before["flips"], *after["flips"]]):
        sides = before["flips"].get(view), after["flips"].get(view)
        yield (f"answers changed, vision to {view}", *(within(one, "rate") for one in sides),
               within(change["flips"].get(view), "change", True))
        for split in ("right_to_wrong", "wrong_to_right", "wrong_to_other"):
            yield ("  " + split.replace("_", " "), *(points(one[split]) if one else "-" for one in sides), "")
    sides = before.get("shapley"), after.get("shapley")
    if any(sides):
        yield ("Shapley value of the image", *(points(one["image"], True) if one else "-" for one in sides), "")
        yield ("Shapley value of the text", *(points(one["text"], True) if one else "-" for one in sides), "")
        yield ("image share of both", *(within(one, "image_share") if one else "-" for one in sides),
               within(change.get("shapley"), "change", True))
    sides = before.get("agreement"), after.get("agreement")
    if any(sides):
        yield ("same answer in text and vision", *(points(one["agreement"]) if one else "-" for one in sides), "")
        yield ("  kappa, chance removed",
               *("-" if not one or one["kappa"] is None else f"{one['kappa']:.2f}" for one in sides), "")


def _spread_notes(change: dict) -> list[str]:
    notes = []
    for name in DIFFERENCES:
        seeds = change.get(name, {}).get("seeds")
        if seeds and len(seeds["values"]) > 1:
            notes.append(f"{name}, change per seed: {', '.join(points(one, True) for one in seeds['values'])}; "
                         f"mean {within(seeds, 'mean', True)} (t-interval over seeds)")
    return notes


def markdown(result: dict) -> str:
    """gap.md: the same tables, after the settings they hold for."""
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    lines = [f"# {_cell(result['before']['name'])} against {_cell(result['after']['name'])}", "",
             f"Points, with 95 % intervals paired by item and clustered by group. {_cell(settings)}."]
    for section in sections(result):
        lines += ["", f"## {_cell(section.title)}", ""]
        if section.header:
            lines += table_lines(section.header, section.rows)
        lines += ["", *(f"- {_cell(note)}" for note in section.notes)] if section.notes else []
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def table_lines(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table, line by line."""
    lines = ["| " + " | ".join(map(_cell, header)) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def terminal(result: dict, console: Console | None = None) -> None:
    """Print the tables with rich; a pipe gets them 150 columns wide instead of wrapped at 80.

    A narrow terminal gets every interval below its value.
    """
    console = console or libraries.console()
    interval = " [" if console.width >= 130 else "\n["
    for section in sections(result):
        if section.header:
            view = Table(title=escape(section.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
                         pad_edge=False)
            for number, name in enumerate(section.header):
                view.add_column(escape(name), justify="left" if number == 0 else "right", overflow="fold")
            for row in section.rows:
                view.add_row(*(escape(cell.replace(" [", interval)) for cell in row))
            console.print(view)
        for note in section.notes:
            style = "bold" if note.startswith("verdict") else "yellow" if note.startswith("warning") else ""
            console.print(escape(note), style=style, soft_wrap=True)
        console.print()


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _two(before: dict, after: dict, view: str, key: str, form) -> str:
    return " / ".join(form(side["views"][view][key]) if view in side["views"] else "-" for side in (before, after))


def _tokens(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _p(delta: dict | None) -> str:
    """One p-value, or one per seed: an average over seeds is neither right nor wrong, so it has none."""
    if delta is None:
        return "-"
    return ", ".join("<0.0001" if p < 1e-4 else f"{p:.4f}" for p in delta["mcnemar_p_seeds"])
