"""One self-contained HTML page: python -m eval.report --runs base=DIR full-text=DIR1,DIR2 no-text=DIR3 --out report.html

Every run is a name and its output folder(s) of eval.run, one per training seed. The first run is what the others are
compared with; a run named `full-text`, if there is one, is compared with as well. The page makes no request: figures are
inline SVG, pictures are data URIs, and its security policy forbids everything else. Text of data and models is escaped.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image, ImageOps

from data_prep.images import FORMATS
from data_prep.problem import NO_PICTURE, ProblemError, read_problems
from data_prep.provenance import file_sha256
from data_prep.read import as_tuple
from eval import gap, plots, stats
from eval.answers import SETTINGS, AnswersError, Side, check_pair, read_side
from eval.show import TITLES

CONTROL = "full-text"
SAMPLE = 24  # items shown per task
SIDE_PIXELS = 448  # longer side of a picture on the page
COLUMN_PIXELS = 290  # smaller pictures are shown enlarged by a whole factor, up to this side
TEMPLATES = Path(__file__).parent / "templates"


class Picture(NamedTuple):
    uri: str
    width: int  # as shown
    height: int
    enlarged: bool


def build(sides: Sequence[Side], *, sample: int = SAMPLE, seed: int = 0) -> str:
    """The page. Raises AnswersError when the runs were not measured alike on the same items."""
    pairs = pairs_of(sides)
    for before, after in pairs:
        check_pair(before, after)
    names = list(dict.fromkeys(task for side in sides for task in side.tasks()))
    tasks = [_task(task, [side for side in sides if task in side.tasks()], pairs, sample, seed, f"t{number}")
             for number, task in enumerate(names)]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    # The policy names the one script that may run, so that no answer could run another even if an escape were missed.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        tasks=tasks, sides=sides, script=script, digest=digest,
        settings=settings_words(sides[0].runs[0].info),
        provenance=[(side.name, run.folder.name, json.dumps(run.info, indent=1, sort_keys=True, ensure_ascii=False))
                    for side in sides for run in side.runs])


def settings_words(info: Mapping) -> dict[str, str]:
    """What every run was measured with, for a page: the SETTINGS of a run.json."""
    said = {key: str(info[key]).lower() if isinstance(info[key], bool) else str(info[key]) for key in SETTINGS}
    pixels = info["pixels"]
    return said | ({"pixels": f"{pixels.get('min')} to {pixels.get('max')}"} if isinstance(pixels, dict) else {})


def pairs_of(sides: Sequence[Side], control: str | None = CONTROL) -> list[tuple[Side, Side]]:
    """Each run against the first, then each run after the first against the control."""
    pairs = [(sides[0], side) for side in sides[1:]]
    return pairs + [(one, side) for one in sides[1:] if one.name == control for side in sides[1:] if side is not one]


def _task(task: str, sides: Sequence[Side], pairs, sample: int, seed: int, prefix: str) -> dict:
    found = {side.name: gap.measure(side, task, seed=seed) for side in sides}
    differences = [key for key in gap.DIFFERENCES if key not in gap.IF_ASKED or any(key in one for one in found.values())]
    rows = [gap.table_row(name, task, one) for name, one in found.items()]
    views = list(dict.fromkeys(view for side in sides for view in side.views(task)))
    changes = {f"{after.name} - {before.name}": gap.change(before, after, task, seed=seed)
               for before, after in pairs if task in before.tasks() and task in after.tasks()}
    return {
        "name": task, "views": views, "n": rows[0]["n"], "groups": rows[0]["n_groups"], "chance": rows[0]["chance"],
        "accuracy": [(row["run"], row["n_seeds"], [gap.within(row["views"].get(view)) for view in views],
                      gap.points(row["unparsed"])) for row in rows],
        "gaps": [(name, *(gap.within(one.get(key), "gap", True) for key in differences), _shapley(one))
                 for name, one in found.items()],
        "differences": [TITLES[key] for key in differences],
        "changes": [_change_row(name, one, differences) for name, one in changes.items()],
        "warnings": [(name, one["warnings"]) for name, one in found.items() if one["warnings"]],
        "missing": list(dict.fromkeys(text for one in found.values() for text in one["missing"])),
        "figures": _figures(task, sides, rows, changes, views, prefix),
        **_sample(task, sides, views, sample),
    }


def _shapley(found: dict) -> str:
    one = found.get("shapley")
    return gap.within(one, "image_share") if one and one["image_share"] is not None else "-"


def _change_row(name: str, one: dict, differences: Sequence[str]) -> dict:
    return {
        "name": name, "verdict": one["verdict"],
        "cells": [gap.within(one.get(key), "change", True) for key in differences]
        + [gap.within(one["views"].get(view), "change", True) for view in ("both", "text", "vision")]
        + [gap.closed(one.get("gap")).removesuffix(" %")],
        "seeds": [gap.points(value, True) for value in one.get("gap", {}).get("seeds", {}).get("values", ())],
    }


def _figures(task: str, sides: Sequence[Side], rows: list[dict], changes: dict, views: list[str],
             prefix: str) -> list[str]:
    figures = [(plots.gap_figure(rows, title=f"{task}: the gap of every run"), "gap of every run")]
    moved = {name: _moves(one) for name, one in changes.items()}
    if any(moved.values()):
        figures.append((plots.change_figure(moved, title=f"{task}: what changed"), "changes with intervals"))
    chance = rows[0]["chance"]
    if set(views) - {"both", "text", "vision", "blind"}:
        bars = {row["run"]: {view: row["views"][view] for view in views if view in row["views"]} for row in rows}
        figures.append((plots.bar_figure(bars, title=f"{task}: accuracy per view", chance=chance), "accuracy per view"))
    view = "vision" if "vision" in views else views[0]
    kinds = {side.name: _kinds(side, task, view) for side in sides if view in side.views(task)}
    if len({kind for one in kinds.values() for kind in one}) > 1:
        figures.append((plots.bar_figure(kinds, title=f"{task}: accuracy in {view} per kind of question"),
                        f"accuracy in {view} per kind of question"))
    return [plots.inline(svg, f"{prefix}f{number}", f"{task}: {label}") for number, (svg, label) in enumerate(figures)]


def _moves(one: dict) -> dict[str, plots.Point]:
    shown = (("gap", "gap"), ("image_gain", "image gain"), ("rendered_gap", "rendered gap"))
    found = {name: one[key] for key, name in shown if key in one}
    found.update({view: one["views"][view] for view in ("both", "text", "vision", "blind") if view in one["views"]})
    return {name: (part["change"], part["low"], part["high"]) for name, part in found.items()}


def _kinds(side: Side, task: str, view: str) -> dict[str, plots.Point]:
    """Accuracy per meta.kind; items without a kind are left out."""
    items, correct = side.items(task), side.correct(task, view)
    kinds = [(row.get("meta") or {}).get("kind") for row in items]
    result = {}
    for kind in sorted({str(kind) for kind in kinds if kind is not None}):
        chosen = np.array([str(one) == kind for one in kinds])
        groups = [row["group"] for row, keep in zip(items, chosen) if keep]
        one = stats.accuracy(correct[:, chosen], clusters=groups)
        result[kind] = (one.value, one.low, one.high)
    return result


def _sample(task: str, sides: Sequence[Side], views: list[str], size: int) -> dict:
    """A fixed sample: up to half of it items that the runs answer differently, the rest from the others.

    The answers compared are those to the picture alone, where that view was asked.
    """
    cards = [_card(task, sides, views, row) for row in sides[0].items(task)]
    cards.sort(key=lambda card: hashlib.sha256(card["id"].encode()).hexdigest())
    differ, same = ([card for card in cards if card["differs"] is state] for state in (True, False))
    first = min(len(differ), max(size // 2, size - len(same)))
    shown = differ[:first] + same[:size - first]
    facts = _facts(sides, task)
    for card in shown:
        card["pictures"] = [(said, *picture(sides, task, image)) for said, image in _shown(sides[0], task, card["id"])]
        card["facts"] = facts.get(card["id"])
    return {"cards": shown, "differing": len(differ), "compared": "vision" if "vision" in views else "any view",
            "kinds": sorted({card["kind"] for card in shown if card["kind"]})}


def _card(task: str, sides: Sequence[Side], views: list[str], row: dict) -> dict:
    answers = []
    for side in sides:
        cells = []
        for view in views:
            found = [run.rows.get((task, view), {}).get(row["id"]) for run in side.runs]
            cells.append([_answer(one) for one in found if one is not None])
        answers.append((side.name, cells))
    said = [[sorted((one["said"], one["right"]) for one in cell) for cell in cells] for _, cells in answers]
    # runs with several seeds differ when what they say differs, not how often they were asked
    differs = any(len({tuple(sorted(set(run[place]))) for run in said if run[place]}) > 1
                  for place, view in enumerate(views) if view == "vision" or "vision" not in views)
    kind = (row.get("meta") or {}).get("kind")
    return {"id": row["id"], "kind": "" if kind is None else str(kind), "question": row.get("question", ""),
            "options": list(row.get("options") or row.get("choices") or ()), "gold": row["gold"],
            "answers": answers, "differs": differs,
            # an answer that is nothing but the choice has been shown already
            "texts": [(f"{name}, {view}:", one["text"]) for name, cells in answers for view, cell in zip(views, cells)
                      for one in cell if one["text"].strip() not in ("", one["said"])]}


def _shown(side: Side, task: str, item: str) -> list[tuple[str, str | None]]:
    """(caption, path) of an item's pictures. The caption names the views where not all of them show the same pictures."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for view in side.views(task):
        shown = groups.setdefault(as_tuple(side.runs[0].rows[task, view][item].get("image")), [])
        shown += [view] if view not in NO_PICTURE else []
    groups = {paths: shown for paths, shown in groups.items() if shown} or groups
    return [(", ".join(shown) if len(groups) > 1 else "", path) for paths, shown in groups.items() for path in paths or (None,)]


def _answer(row: dict) -> dict:
    return {"said": "unparsed" if row["pred"] is None else str(row["pred"]), "right": row["correct"],
            "text": row.get("text") or "", "cut": row.get("finish") == "length"}


def _facts(sides: Sequence[Side], task: str) -> dict[str, str]:
    """Facts in words by item, while the file of problems is still the one that was asked; else nothing."""
    recorded = sides[0].runs[0].info["tasks"].get(task, {})
    try:
        if file_sha256(recorded["data"]) == recorded["sha256"]:
            return {one.id: one.facts for one in read_problems(recorded["data"], verify="none") if one.facts}
    except (KeyError, OSError, ProblemError):
        pass
    return {}


def picture(sides: Sequence[Side], task: str, image: str | None) -> tuple[Picture | None, str]:
    """(picture, "") or (None, why there is no picture). It is looked for under the `root` that run.json names."""
    if not image:
        return None, "this problem has no picture"
    reason = "run.json names no folder of pictures"
    for run in (run for side in sides for run in side.runs):
        root = run.info["tasks"].get(task, {}).get("root")
        if root is None:
            continue
        for base in (Path(root), run.folder / root):
            try:
                path = (base / image).resolve()
                if not path.is_relative_to(base.resolve()):
                    return None, "its path leaves the folder of pictures"
                if path.is_file():
                    return _embed(path), ""
            # a loop of links, a name with a zero byte or too long, or what Pillow's readers raise on a broken file
            except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
                return None, f"the picture cannot be read ({type(error).__name__})"
        reason = f"picture not found: {image}"
    return None, reason


def _embed(path: Path) -> Picture:
    # Written anew, never copied: a photograph's metadata (place, camera) does not belong on a page that is sent around.
    with Image.open(path, formats=FORMATS) as file:
        photo = file.format == "JPEG"
        shown = ImageOps.exif_transpose(file)
        shown.thumbnail((SIDE_PIXELS, SIDE_PIXELS))
        if shown.mode not in ("RGB", "RGBA", "L", "LA", "P"):
            shown = shown.convert("RGB")
        out = io.BytesIO()
        if photo:
            shown.convert("RGB").save(out, "JPEG", quality=88)
        else:
            shown = shown.convert("RGBA")
            Image.frombytes("RGBA", shown.size, shown.tobytes()).save(out, "PNG", optimize=True)
    kind = "jpeg" if photo else "png"
    factor = max(1, COLUMN_PIXELS // max(shown.size))
    return Picture(f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}",
                   shown.width * factor, shown.height * factor, factor > 1)


def parse_runs(words: Sequence[str]) -> list[Side]:
    """NAME=DIR[,DIR...] -> sides. Raises AnswersError for a word of another form or a name that is given twice."""
    sides = []
    for word in words:
        name, equals, folders = word.partition("=")
        if not (name and equals and folders):
            raise AnswersError(f"--runs takes NAME=DIR[,DIR...], not '{word}'")
        if name in {side.name for side in sides}:
            raise AnswersError(f"the run '{name}' is given twice; join its seeds with commas")
        sides.append(read_side(name, folders))
    return sides


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description="One self-contained HTML page.")
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=DIR[,DIR...]",
                        help="output folders of eval.run; the first run is the one the others are compared with")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--sample", type=int, default=SAMPLE, help=f"items to show per task ({SAMPLE})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    args = parser.parse_args(argv)
    try:
        page = build(parse_runs(args.runs), sample=args.sample, seed=args.seed)
    except (AnswersError, stats.StatsError) as error:
        sys.exit(f"error: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8", errors="replace", newline="\n")  # answers may hold lone surrogates
    print(f"wrote {args.out.as_posix()}")


if __name__ == "__main__":
    main()
