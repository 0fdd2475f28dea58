"""The case study shown: what each measure says in words, tables on the terminal and on one self-contained page, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jinja2
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from data_prep import libraries
from eval import gap, plots
from eval.gap import left_out_words, points
from eval.reliance import EPSILON
from eval.report import TEMPLATES, settings_words
from eval.show import table_lines


class Text(NamedTuple):
    title: str
    formula: str
    reading: str
    source: str = "our definition"
    scale: int = 100  # 100: shown in points (per cent); 1: a plain number


GAME = "Shapley value of two players; the game is our definition"
GAT = "Gat et al., arXiv 2110.14375"
TEXTS = {
    "accuracy": Text(
        "accuracy", "share of right answers; unparsed counts as wrong",
        "Look at how little is lost where the picture is gone or is another one: what remains was answered from the words.",
        "standard, Wilson interval"),
    "consistency": Text(
        "consistency C", "share of items with the same chosen option in both views",
        "High where the picture was taken away: the answer did not depend on it. It also rises with habit and with few options, "
        "so read kappa beside it."),
    "kappa": Text(
        "chance-corrected agreement kappa",
        "(C - p_e) / (1 - p_e); p_e is the agreement of two independent answers with the same habits of place: the marginals are "
        "those of the place (letter) at which the chosen option was shown, among items with equally many options",
        "1: no answer moves; 0: the two agree no more than unrelated answers. Options are permuted per item, alike in every "
        "view, so a place says nothing about the question.", "Cohen's form; the marginals are our definition", 1),
    "consistency_right": Text(
        "consistency of right answers", "C among the answers that the original gets right",
        "High: right answers that did not need what was taken away."),
    "consistency_wrong": Text(
        "consistency of wrong answers", "C among the answers that the original gets wrong",
        "High: errors that do not come from looking, such as habits of the language model."),
    "flips": Text(
        "answers changed", "share of items whose answer changes; the sum of the three directions below",
        "How many answers the change of input moves at all.", "standard"),
    "right_to_wrong": Text("right to wrong", "share of all items", "What the input had been good for.", "standard"),
    "wrong_to_right": Text("wrong to right", "share of all items", "Luck, or an input that misled.", "standard"),
    "wrong_to_other": Text(
        "wrong to another wrong", "share of all items", "Sensitive to the input without using it well.", "standard"),
    "kl": Text(
        "KL divergence, nats", "mean of sum p log(p / q) over the options, p original, q ablated",
        "How far the option probabilities move; 0: not at all. Moves that change no answer count too.", "standard", 1),
    "js": Text(
        "Jensen-Shannon divergence, nats", "mean of (KL(p, m) + KL(q, m)) / 2, m = (p + q) / 2",
        "The same, bounded by ln 2 = 0.693, so that a few confident items cannot carry the mean.", "standard", 1),
    "gold_change": Text(
        "what the input lends the right option, nats", "mean of log p(right | original) - log p(right | ablated)",
        "Above 0: the input speaks for the right option. Near 0 with a large KL: it moves the model, but not to the truth.",
        "pointwise mutual information", 1),
    "utility_image": Text(
        "utility of the picture, U_image", "Acc(x) - Acc(x with the picture removed or replaced)",
        "What the picture is worth. In the row text the facts stand in words on both sides (x = both); in the others the picture "
        "was the only source (x = vision; against blind this is the image gain)."),
    "utility_text": Text(
        "utility of the words, U_text", "Acc(x) - Acc(x with the words removed, or drawn into the picture)",
        "Row vision: what facts in words add to the picture (x = both). Row rendered: what it is worth to have the question as "
        "text and not as pixels (x = vision)."),
    "imbalance": Text(
        "imbalance ratio", "U_text / (U_text + U_image), x = both, U_text against vision, U_image against text",
        "1: the picture is worth nothing beside the words; 0.5: balance. Undefined, and not clipped, where the two utilities do "
        "not have one sign. Only the view text gives it: the other views without the own picture do not show the facts either.",
        scale=1),
    "imbalance_drawn": Text(
        "imbalance ratio, question drawn in",
        "U_text / (U_text + U_image), x = vision, U_text against rendered, U_image against each replaced picture",
        "The same for tasks without facts in words: the words are neutralised by drawing the question into the picture.",
        scale=1),
    "utilisation_image": Text(
        "utilisation of the picture given the words, u(I|T)", "(B - T) / B with B = Acc(both), T = Acc(text)",
        "The share of the accuracy with both that the picture adds to the words.", "arXiv 2202.05306"),
    "utilisation_text": Text(
        "utilisation of the words given the picture, u(T|I)", "(B - V) / B with V = Acc(vision)",
        "The share that the words add to the picture. The larger of the two names the modality relied on.", "arXiv 2202.05306"),
    "perceptual": Text(
        "perceptual score",
        "(Acc - Acc with the image permuted over items) / Z; row accuracy: Z = Acc; row majority: Z = 1 - the best constant "
        "answer",
        "0: another item's picture does as well. Each item has one fixed other picture; only the second accuracy is permuted.",
        GAT),
    "shapley_image": Text(
        "Shapley value of the picture", "[(V - N) + (B - T)] / 2 over blind (N), vision (V), text (T), both (B)",
        "What the picture is worth, averaged over coming first and coming second; in accuracy, and in nats of the right option's "
        "log-probability.", GAME),
    "shapley_text": Text(
        "Shapley value of the words", "[(T - N) + (B - V)] / 2", "The same for the facts in words; the two sum to B - N.", GAME),
    "shapley_interaction": Text(
        "interaction", "B - T - V + N", "Below 0: picture and words say the same; above 0: each needs the other.", GAME),
    "shapley_share": Text(
        "share of the picture in both values", "|phi_I| / (|phi_I| + |phi_T|)", "0.5: both are worth as much.", GAME, 1),
    "text_preference": Text(
        "text preference",
        "follows text / (follows text + follows image), over the items where the words alone (other_facts) and the picture alone "
        "(vision) are answered differently", "1: with contradicting inputs the words always win; 0: the picture does.", scale=1),
    "follows_text": Text("follows the words", "share of these items", "The answer is that of the words alone."),
    "follows_image": Text("follows the picture", "share of these items", "The answer is that of the picture alone."),
    "follows_neither": Text(
        "follows neither", "share of these items", "A third answer: read the ratio with care when this is large."),
}
SOFT = {name for name in TEXTS if name.startswith("shapley")}  # their variant log_probability is in nats
SECTIONS = {
    "Accuracy per view": ("accuracy",),
    "Does the answer change?": ("consistency", "kappa", "consistency_right", "consistency_wrong", "flips", "right_to_wrong",
                                "wrong_to_right", "wrong_to_other"),
    "How far do the probabilities move?": ("kl", "js", "gold_change"),
    "What is each modality worth?": ("utility_image", "utility_text", "imbalance", "imbalance_drawn", "utilisation_image",
                                     "utilisation_text", "perceptual", "shapley_image", "shapley_text", "shapley_interaction",
                                     "shapley_share"),
    "What is followed when they contradict?": ("text_preference", "follows_text", "follows_image", "follows_neither"),
}
VIEWS = {"both": "picture and facts", "text": "facts, no picture", "vision": "picture", "blind": "no picture",
         "white": "white picture", "black": "black picture", "gray": "gray picture", "noise": "random pixels",
         "shuffled": "another item's picture", "conflict": "picture, other facts",
         "other_facts": "other facts, no picture", "rendered": "question in the picture"}
HEADLINE = {
    ("accuracy", "both"): "accuracy, both", ("accuracy", "vision"): "accuracy, vision",
    ("accuracy", "rendered"): "accuracy, rendered", ("accuracy", "text"): "accuracy, text",
    ("accuracy", "blind"): "accuracy, blind",
    ("utility_image", "blind"): "vision - blind (image gain)", ("utility_image", "shuffled"): "vision - shuffled",
    ("utility_image", "text"): "both - text (U_image)", ("utility_text", "vision"): "both - vision (U_text)",
    ("imbalance", "text"): "imbalance ratio", ("consistency", "shuffled"): "consistency, shuffled",
    ("kappa", "shuffled"): "kappa, shuffled", ("kl", "shuffled"): "KL, shuffled, nats",
    ("gold_change", "shuffled"): "lent to the gold, nats", ("text_preference", "conflict"): "text preference",
    ("perceptual", "accuracy"): "perceptual score, Z = Acc", ("shapley_share", "accuracy"): "Shapley share, picture",
    ("utilisation_image", "text"): "utilisation u(I|T)", ("utilisation_text", "vision"): "utilisation u(T|I)",
}
KIND_COLUMNS = [("accuracy", "vision"), ("utility_image", "blind"), ("utility_image", "shuffled"), ("utility_image", "text"),
                ("kappa", "shuffled"), ("gold_change", "shuffled"), ("text_preference", "conflict")]
NOT_GIVEN = "not given"


def scale_of(name: str, variant: str) -> int:
    return 1 if name in SOFT and variant == "log_probability" else TEXTS[name].scale


def cell(one: Mapping | None, scale: int, *, sign: bool = False, n: int | None = None) -> tuple[str, str, str]:
    """(value, interval, remark: why there is none, and n where it is not that of the task)."""
    if one is None:
        return NOT_GIVEN, "", ""

    def number(value: float) -> str:
        return points(value, sign) if scale == 100 else f"{value + 0.0:{'+' if sign else ''}.3f}"

    remarks = [f"n {one['n']}"] if n is not None and one["n"] != n else []
    if math.isnan(one["value"]):
        return "undefined", "", "; ".join([one["note"], *remarks])
    if math.isnan(one["low"]):
        return number(one["value"]), "", "; ".join([one["note"], *remarks])
    if one["high"] - one["low"] < EPSILON:
        remarks.insert(0, "no spread")
    return number(one["value"]), f"[{number(one['low'])}, {number(one['high'])}]", "; ".join(remarks)


def rows_of(found: Mapping, keys: Iterable[tuple[str, str]]) -> list[dict]:
    """Table rows of one task: label, one cell per model, one per change. Rows that no model has are left out."""
    rows = []
    for name, variant in keys:
        values = [model["measures"].get(name, {}).get(variant) for model in found["models"].values()]
        if any(values):
            scale, n = scale_of(name, variant), next(iter(found["models"].values()))["n"]
            moved = [one.get(name, {}).get(variant) for one in found["changes"].values()]
            rows.append({"label": HEADLINE.get((name, variant), ""), "variant": in_words(variant),
                         "cells": [cell(one, scale, n=n) for one in values] + [cell(one, scale, sign=True) for one in moved]})
    return rows


def in_words(variant: str) -> str:
    return "log-probability" if variant == "log_probability" else variant


def variants_of(found: Mapping, name: str) -> list[tuple[str, str]]:
    return [(name, variant) for variant in dict.fromkeys(
        variant for model in found["models"].values() for variant in model["measures"].get(name, {}))]


def header_of(found: Mapping) -> list[str]:
    names = list(found["models"])
    return names + [f"{name} - {names[0]}" for name in found["changes"]]


def absences(found: Mapping) -> list[tuple[str, list[str]]]:
    """Why something cannot be given, and what: the measures of each reason, with the models where it is not so for all."""
    reasons: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name, model in found["models"].items():
        for one in model["missing"]:
            reasons.setdefault(one["reason"], {}).setdefault((one["measure"], one["variant"]), []).append(name)
    lines = []
    for reason, what in reasons.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for (measure, variant), names in what.items():
            alike.setdefault((measure, *names), []).append(in_words(variant))
        lines.append((reason, [f"{TEXTS[measure].title} ({', '.join(variants)})"
                               + (f" of {', '.join(names)}" if len(names) < len(found["models"]) else "")
                               for (measure, *names), variants in alike.items()]))
    return lines


def terminal(result: Mapping) -> None:
    """The headline of every task, and what cannot be given, printed."""
    console = libraries.console()
    for task, found in result["tasks"].items():
        first = next(iter(found["models"].values()))
        table = Table("95 % intervals", box=SIMPLE_HEAD, title=escape(
            f"{task}: {first['n']} items in {first['n_groups']} groups, chance {points(first['chance'])}; shares in points"))
        for name in header_of(found):
            table.add_column(escape(name), justify="right")
        for row in rows_of(found, HEADLINE):
            table.add_row(escape(row["label"]), *(escape(" ".join(filter(None, (value, interval or (remark and "(see page)")))))
                                                  for value, interval, remark in row["cells"]))
        console.print(table)
        if first["left_out"]:
            console.print(escape(f"{left_out_words(first['left_out'])} and are left out of all numbers"), soft_wrap=True)
        for reason, titles in absences(found):
            console.print(escape(f"{len(titles)} measures are not given because {reason}; the page names them"), soft_wrap=True)
    if result["only_in_some"]:
        console.print(escape(f"tasks that not every model was asked: {', '.join(result['only_in_some'])}"), soft_wrap=True)


def main_figure(result: Mapping) -> str:
    """Accuracy per view of every model, one panel per task."""
    panels = []
    for task, found in result["tasks"].items():
        chance = next(iter(found["models"].values()))["chance"]
        series = {name: {_view(view): _point(one) for view, one in model["views"].items()}
                  for name, model in found["models"].items()}
        text = f"{task}: accuracy in per cent, 95 % interval (dashed: chance {points(chance)})"
        panels.append(plots.Panel(text, series, 100, chance, (0, 102)))
    return plots.panel_figure(panels, title="What is answered from which input")


def figures(task: str, found: Mapping, prefix: str) -> dict[str, str]:
    """Section -> inline SVG, for what the answers allow."""
    drawn = {"Accuracy per view": main_figure({"tasks": {task: found}})}
    same = [_panel(found, "consistency", "C, same answer in both views, per cent", line=None, limits=(0, 102)),
            _panel(found, "kappa", "kappa (dashed: chance)", scale=1)]
    drawn["Does the answer change?"] = _panels(same, "Agreement with the answer to the unaltered input")
    soft = [_panel(found, "kl", "KL, nats", scale=1), _panel(found, "gold_change", "lent to the gold, nats", scale=1)]
    drawn["How far do the probabilities move?"] = _panels(soft, "Change of the option probabilities")
    drawn["What is each modality worth?"] = _panels([_panel(found, "utility_image", "utility of the picture, points")],
                                                    "Accuracy lost without the own picture")
    shares, said = {}, {"text": "follows the words", "neither": "follows neither", "image": "follows the picture"}
    for name, model in found["models"].items():
        parts = {part: model["measures"].get(f"follows_{part}", {}).get("conflict") for part in said}
        if all(one and not math.isnan(one["value"]) for one in parts.values()):
            shares[name] = {said[part]: one["value"] for part, one in parts.items()}
    if shares:
        drawn["What is followed when they contradict?"] = plots.share_figure(
            shares, title="Picture and words contradict each other",
            label="per cent of the items where each alone is answered differently")
    return {section: plots.inline(svg, f"{prefix}{number}", f"{task}: {section}")
            for number, (section, svg) in enumerate(drawn.items()) if svg}


def kind_figure(task: str, found: Mapping, prefix: str) -> str:
    """The picture's utility per kind of question, against the first way of taking it away that was measured; "" for one kind."""
    keys = [key for key in KIND_COLUMNS if key[0] == "utility_image" and key in variants_of(found, "utility_image")]
    if not keys or max(len(model["kinds"]) for model in found["models"].values()) < 2:
        return ""
    name, variant = keys[0]
    series = {model: {kind: _point(one["measures"][name][variant]) for kind, one in part["kinds"].items()
                      if variant in one["measures"].get(name, {})} for model, part in found["models"].items()}
    against = "both - text" if variant == "text" else f"vision - {variant}"
    title = "Utility of the picture per kind of question"
    return plots.inline(_panels([plots.Panel(f"{against}, points", series)], title), prefix, f"{task}: {title}")


def _panels(panels: Sequence[plots.Panel], title: str) -> str:
    kept = [panel for panel in panels if any(panel.series.values())]
    return plots.panel_figure(kept, title=title) if kept else ""


def _panel(found: Mapping, name: str, text: str, *, scale: float = 100, line: float | None = 0.0,
           limits: tuple[float | None, float | None] = (None, None)) -> plots.Panel:
    series = {model: {_view(view): _point(one) for view, one in part["measures"].get(name, {}).items()
                      if not math.isnan(one["value"])} for model, part in found["models"].items()}
    return plots.Panel(text, series, scale, line, limits)


def _view(view: str) -> str:
    return f"{view}: {VIEWS[view]}" if view in VIEWS else view


def _point(one: Mapping) -> plots.Point:
    return one["value"], one["low"], one["high"]


def build(result: Mapping) -> str:
    """The page: self-contained, without a script; text of data and models is escaped."""
    tasks = []
    for number, (task, found) in enumerate(result["tasks"].items()):
        first = next(iter(found["models"].values()))
        drawn = figures(task, found, f"t{number}f")
        sections = []
        for title, names in SECTIONS.items():
            blocks = [(TEXTS[name], rows_of(found, variants_of(found, name))) for name in names]
            sections.append({"title": title, "figure": drawn.get(title, ""), "blocks": [one for one in blocks if one[1]]})
        columns = [key for key in KIND_COLUMNS if key in variants_of(found, key[0])]
        kinds = [(kind, model, part["n"], [cell(part["measures"].get(name, {}).get(variant), scale_of(name, variant), n=part["n"])
                                           for name, variant in columns])
                 for kind in first["kinds"] for model, one in found["models"].items() if (part := one["kinds"].get(kind))]
        tasks.append({
            "name": task, "n": first["n"], "groups": first["n_groups"], "chance": points(first["chance"]),
            "left_out": left_out_words(first["left_out"]) if first["left_out"] else "",
            "majority": points(first["majority"]), "header": header_of(found), "models": len(found["models"]),
            "headline": rows_of(found, HEADLINE), "sections": sections, "absent": absences(found),
            "kinds": kinds, "kind_figure": kind_figure(task, found, f"t{number}k"),
            "kind_header": [HEADLINE[key] for key in columns],
            "unparsed": [(name, points(max(view["unparsed"] for view in model["views"].values())))
                         for name, model in found["models"].items()],
            "warnings": [(name, model["warnings"]) for name, model in found["models"].items() if model["warnings"]]})
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    origin = {key: result[key] for key in ("commit", "dirty", "packages", "python", "bootstrap_seed", "models")}
    return environment.get_template("case_study.html").render(
        tasks=tasks, names=[one["name"] for one in result["models"]], settings=settings_words(result["settings"]),
        not_given=NOT_GIVEN, only_in_some=result["only_in_some"],
        origin=json.dumps({**origin, "tasks": {task: found["data"] for task, found in result["tasks"].items()}}, indent=1,
                          sort_keys=True, ensure_ascii=False))


SHOWN = (("same answer for a white picture", "consistency", "white"), ("same answer for another picture", "consistency", "shuffled"),
         ("follows the words under conflict", "text_preference", "conflict"), ("perceptual score", "perceptual", "accuracy"),
         ("image's Shapley share", "shapley_share", "accuracy"))


def block(result: Mapping) -> list[str]:
    """The documentation's table of a case study (`case_study.json`) of one task: what says most about reliance on the picture."""
    (task, found), = result["tasks"].items()
    rows, models = [], gap.numbers(found["models"])
    for name in (model["name"] for model in result["models"]):
        measured = [models[name]["measures"].get(measure, {}).get(variant) for _, measure, variant in SHOWN]
        rows.append((f"`{name}`", *(gap.within(one) for one in measured)))
    first = next(iter(found["models"].values()))
    seeds = max(model["n_seeds"] for model in found["models"].values())
    text = (f"{first['n']:,} items in {first['n_groups']:,} groups (task `{task}`), {seeds} training seed{'s' * (seeds > 1)}; in "
            "per cent, with 95 % intervals clustered by group. The lower the first three, the more the picture decides.")
    if result["dirty"]:
        text += " Made from a working tree with uncommitted changes."
    return [*table_lines(("run", *(title for title, _, _ in SHOWN)), rows), "", text]
