"""The generated parts of the documentation: python -m eval.readme [--check]

Rewrites what stands between `<!-- generated: WHAT -->` and `<!-- end -->` in README.md and recipes/README.md. WHAT is
`recipes` (a table of the recipes) or a folder of results, such as `results/demo`, with the name of a task behind it
when another one than --task is meant. Draws gap.svg beside every results/*/summary.json. --check writes nothing and
exits 1 naming what is out of date.

    python -m eval.readme --collect results/demo base=DIR control=DIR,DIR,DIR vision-centric=DIR,DIR,DIR

writes results/demo/summary.json from output folders of eval.run (one per training seed) before it does the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from data_prep.provenance import file_sha256, write_json
from eval import gap, plots, stats
from eval.answers import AnswersError, Run, Side, check_pair
from eval.report import CONTROL, pairs_of, parse_runs
from eval.show import table_lines

DOCUMENTS = ("README.md", "recipes/README.md")
BLOCK = re.compile(r"(?<=<!-- generated: )(?P<what>[^\n]+?) -->\n(?P<body>.*?)(?=<!-- end -->)", re.S)
VIEWS = ("text", "both", "vision", "blind")
KEPT = ("n", "n_groups", "n_seeds", "chance", "views", *gap.DIFFERENCES, "shapley", "warnings")
CHANGES = ("views", *gap.DIFFERENCES, "verdict")
TITLE = "Accuracy per view; the bar is the gap, both - vision"


class ReadmeError(ValueError):
    """Results that may not be collected or documents that cannot be generated; the message is one sentence."""


def collect(sides: Sequence[Side], *, task: str | None = None, seed: int = 0, allow_dirty: bool = False) -> dict:
    """The content of summary.json: every run with its parents, every task's numbers, every pair's changes.

    task: the one that the README's figure and table show when they name none; default: the first.
    Raises ReadmeError for a run without its parents (commit, recipe, finished training) or from a changed working tree,
    AnswersError for runs that were not measured alike on the same items.
    """
    runs = [{"name": side.name, "seeds": [_parents(run, allow_dirty) for run in side.runs]} for side in sides]
    for run in runs:
        seeds = [parents["seed"] for parents in run["seeds"]]
        if len(set(seeds)) < len(seeds) or len({parents["recipe"] for parents in run["seeds"]}) > 1:
            raise ReadmeError(f"the runs of {run['name']} are not one recipe with seeds that differ: "
                              + ", ".join(f"{parents['recipe']} {parents['seed']}" for parents in run["seeds"]))
    pairs = pairs_of(sides)
    for before, after in pairs:
        check_pair(before, after)
    names = sorted(set.intersection(*(set(side.tasks()) for side in sides)))
    if not names or task not in (None, *names):
        raise ReadmeError(f"tasks that all runs hold: {', '.join(names) or 'none'}" + (f"; not {task}" if task else ""))
    tasks = {}
    for name in names:
        measured = {side.name: gap.measure(side, name, seed=seed) for side in sides}
        tasks[name] = {
            "runs": {run: {key: found[key] for key in KEPT if key in found} for run, found in measured.items()},
            "changes": [{"before": before.name, "after": after.name,
                         **{key: value for key, value in gap.change(before, after, name, seed=seed).items()
                            if key in CHANGES}} for before, after in pairs],
        }
    dirty = any(parents[key] for run in runs for parents in run["seeds"] for key in ("dirty", "training_dirty"))
    settings = {key: sides[0].runs[0].info[key] for key in ("parser", "mode", "max_new_tokens", "pixels")}
    return _rounded(gap.plain({"runs": runs, "headline": task or names[0], "tasks": tasks, "dirty": dirty,
                               "settings": settings, "margin": gap.MARGIN, "bootstrap_seed": seed}))


def _parents(run: Run, allow_dirty: bool) -> dict:
    """Where one run comes from: the evaluation's run.json and, behind an adapter, the run folder of its training."""
    info, where = run.info, run.folder.as_posix()
    found = {
        **{key: info.get(key) for key in ("commit", "dirty", "packages", "python", "device", "seed", "model_sha256",
                                          "adapter_sha256", "revision")},
        "model": _place(info["model"]), "eval_seconds": info.get("seconds"),
        "data_sha256": {task: one["sha256"] for task, one in info["tasks"].items()},
        "recipe": None, "recipe_sha256": None, "steps": None, "training_data_sha256": None, "training_seconds": None,
        "training_commit": None, "training_dirty": False, "training_device": None, "training_packages": None,
    }
    if info.get("adapter"):
        training, recipe = info.get("training"), Path(info["adapter"]).parent / "recipe.yaml"
        if not training or not recipe.is_file():
            raise ReadmeError(f"{where}: no run.json and recipe.yaml beside the adapter {info['adapter']}, so its "
                              "training is not known")
        if not training.get("finished"):
            raise ReadmeError(f"{where}: the training of {info['adapter']} was not finished")
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        if info.get("seed") not in (None, values["seed"]):
            raise ReadmeError(f"{where}: seed {info['seed']} was recorded, but {recipe} says {values['seed']}")
        found |= {
            "seed": values["seed"], "recipe": values["name"], "recipe_sha256": file_sha256(recipe),
            "steps": values["steps"], "training_seconds": training.get("seconds"),
            "training_data_sha256": {_place(name): one for name, one in training.get("data", {}).items()},
            "training_commit": training.get("commit"), "training_dirty": training.get("dirty"),
            "training_device": training.get("device"), "training_packages": training.get("packages"),
        }
    commits = [found["commit"], *([found["training_commit"]] if found["recipe"] else [])]
    if not allow_dirty and not all(commits):
        raise ReadmeError(f"{where}: no commit was recorded (--allow-dirty collects it all the same)")
    if not allow_dirty and (found["dirty"] or found["training_dirty"]):
        raise ReadmeError(f"{where}: made from a working tree with uncommitted changes (--allow-dirty collects it all "
                          "the same, and says so)")
    return found


def _place(name: str) -> str:
    """A path without the machine it is on; hub ids and relative paths as they are."""
    path = Path(name)
    if not path.is_absolute():
        return name
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def _rounded(value):
    """Floats to six significant digits: more of them would say nothing and would change with the machine."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def results_block(summary: Mapping, task: str) -> list[str]:
    """The README's table of one task and the sentence below it."""
    rows = _rows(summary, task)
    cells = [(f"`{row['run']}`",
              *(gap.points(row["views"][view][0]) if view in row["views"] else "-" for view in VIEWS),
              gap.within(row["gap"], sign=True), gap.within(row["image_gain"], sign=True)) for row in rows]
    header = ("run", *VIEWS, "gap (both - vision)", "image gain (vision - blind)")
    return [*table_lines(header, cells), "", _sentence(summary, task, rows)]


def _sentence(summary: Mapping, task: str, rows: Sequence[Mapping]) -> str:
    last = rows[-1]
    size = (f"{last['n']:,} items in {last['n_groups']:,} groups (task `{task}`, chance {gap.points(last['chance'])}); "
            "accuracies and differences in points, with 95 % intervals paired by item and clustered by group.")
    if summary["dirty"]:
        size += " Made from a working tree with uncommitted changes."
    *others, after = [run["name"] for run in summary["runs"]]
    before = CONTROL if CONTROL in others else others[0] if others else None
    changes = summary["tasks"][task]["changes"]
    one = next((one for one in changes if (one["before"], one["after"]) == (before, after)), None)
    if one is None or "gap" not in one:
        return size
    found = _nan(one)
    moved = ", ".join(f"`{view}` {gap.within(found['views'][view], 'change', True)}"
                      for view in ("vision", "both", "text") if view in found["views"])
    trained = [parents for run in summary["runs"] if run["name"] in (before, after) for parents in run["seeds"]
               if parents["recipe"]]
    seeds, steps = (sorted({parents[key] for parents in trained}) for key in ("seed", "steps"))
    per_seed = [gap.points(value, True) for value in found["gap"]["seeds"]["values"]]
    text = [f"From `{before}` to `{after}` the gap changes by {gap.within(found['gap'], 'change', True)}, which closes "
            f"{gap.closed(found['gap'])} of it ({found['verdict']['word']}). Accuracy changes: {moved}."]
    if trained:
        many = len(per_seed) > 1
        text.append(f"{len(seeds)} training seed{'s' if many else ''}, {' or '.join(map(str, steps))} optimizer steps "
                    "each" + (f"; change of the gap per seed: {', '.join(per_seed)}." if many else "."))
    return " ".join([*text, size])


def figure(summary: Mapping, task: str) -> str:
    """gap.svg. Its last line holds a hash of the numbers drawn, so that a check needs no second drawing."""
    return plots.gap_figure(_rows(summary, task), title=TITLE) + _stamp(summary, task)


def _stamp(summary: Mapping, task: str) -> str:
    text = json.dumps([TITLE, *_rows(summary, task)], sort_keys=True)
    return f"<!-- numbers {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _rows(summary: Mapping, task: str) -> list[dict]:
    """Rows as eval.gap.table gives them, runs in the order in which they were named."""
    if task not in summary["tasks"]:
        raise ReadmeError(f"the summary holds no task {task}; it holds {', '.join(summary['tasks'])}")
    names = [run["name"] for run in summary["runs"]]
    return [gap.table_row(name, task, _nan(summary["tasks"][task]["runs"][name])) for name in names]


def _nan(value):
    """The same with None as nan, which is what eval.gap wrote it for."""
    if isinstance(value, dict):
        return {key: _nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_nan(one) for one in value]
    return math.nan if value is None else value


def recipes_block(root: Path) -> list[str]:
    """The table of recipes/README.md: one row per recipe, found by a glob, in the words of its header."""
    rows = []
    for path in recipe_files(root):
        base, keys = differences(path)
        head, place = header(path), path.relative_to(root / "recipes").as_posix()
        differs = f"`{base}` in {', '.join(f'`{key}`' for key in keys)}" if base else "-"
        rows.append((f"[{place.removesuffix('.yaml')}]({place})", head.get("Idea", "-"), differs,
                     _result(root, path, head.get("Result", "-"))))
    return table_lines(("recipe", "idea", "differs from", "result"), rows)


def recipe_files(root: Path) -> list[Path]:
    """Every recipe below recipes/; mixtures are no recipes."""
    return sorted(path for path in (root / "recipes").rglob("*.yaml") if path.parent.name != "mixtures")


def header(path: Path) -> dict[str, str]:
    """The words of a recipe's first comment: {"Idea": ..., "Differs": ..., "Run": ..., "Result": ...}."""
    found: dict[str, str] = {}
    name = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if start := re.fullmatch(r"# ([A-Z][a-z]+)  +(.+)", line):
            name = start[1]
            found[name] = start[2].strip()
        elif name is not None:
            found[name] += " " + line.lstrip("# ").strip()
    return found


def differences(path: Path) -> tuple[str | None, list[str]]:
    """(base, keys in which the recipe differs from it, without the name), or (None, []) for a recipe without a base."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = values.pop("base", None)
    if base is None:
        return None, []
    theirs = dict(_flat(yaml.safe_load((path.parent / base).read_text(encoding="utf-8"))))
    return base, [key for key, value in _flat(values) if key != "name" and (key not in theirs or theirs[key] != value)]


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _result(root: Path, recipe: Path, text: str) -> str:
    """The recipe's gap and a link, where its header names a summary that holds it; else the header's words."""
    path = root / text
    if path.name != "summary.json" or not path.is_file():
        return text
    summary, name = _read(path), yaml.safe_load(recipe.read_text(encoding="utf-8"))["name"]
    row = next((row for row in _rows(summary, summary["headline"]) if row["run"] == name), None)
    if row is None:
        raise ReadmeError(f"{recipe}: Result: {text} holds no run {name}")
    return f"gap {gap.within(row['gap'], sign=True)} ([numbers](../{text}))"


def generate(what: str, root: Path) -> str:
    """The text of one block."""
    if what == "recipes":
        lines = recipes_block(root)
    else:
        folder, _, task = what.partition(" ")
        if not folder.startswith("results/"):
            raise ReadmeError(f"nothing is generated under the name '{what}'; there are recipes and results/...")
        summary = _read(root / folder / "summary.json")
        lines = results_block(summary, task.strip() or summary["headline"])
    return "\n".join(["", *lines, "", ""])


def rewritten(document: Path, root: Path) -> tuple[str, list[str]]:
    """(the document with its blocks as they should be, the blocks that are not). ReadmeError: an open block."""
    text, stale = document.read_text(encoding="utf-8"), []
    if not text.count("<!-- generated: ") == text.count("<!-- end -->") == len(BLOCK.findall(text)):
        raise ReadmeError(f"{document.relative_to(root)}: a generated block begins or ends twice")

    def fill(match: re.Match) -> str:
        body = generate(match["what"], root)
        if body != match["body"]:
            stale.append(match["what"])
        return f"{match['what']} -->\n{body}"

    return BLOCK.sub(fill, text), stale


def update(root: Path, *, check: bool) -> list[str]:
    """Bring every document and figure up to date, or only look. Returns what is (or was) out of date."""
    found = []
    if not any((root / name).is_file() for name in DOCUMENTS):
        raise ReadmeError(f"neither {' nor '.join(DOCUMENTS)} is here; run this in the repository's root")
    for name in DOCUMENTS:
        if not (root / name).is_file():
            continue
        text, stale = rewritten(root / name, root)
        found += [f"{name}: the block '{what}'" for what in stale]
        if stale and not check:
            (root / name).write_text(text, encoding="utf-8", newline="\n")
    for path in sorted((root / "results").glob("*/summary.json")):
        drawn, summary = path.with_name("gap.svg"), _read(path)
        task = summary["headline"]
        if not drawn.is_file() or not drawn.read_text(encoding="utf-8").endswith(_stamp(summary, task)):
            found.append(f"the figure {drawn.relative_to(root).as_posix()}")
            if not check:
                drawn.write_text(figure(summary, task), encoding="utf-8", newline="\n")
    return found


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReadmeError(f"cannot read {path}: {error}") from None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.readme", description="Generated parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming what is out of date")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="first write DIR/summary.json from these runs")
    parser.add_argument("--task", help="with --collect: the task of the README's figure and table (default: the first)")
    parser.add_argument("--allow-dirty", action="store_true", help="collect runs of a changed working tree, and say so")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("runs", nargs="*", metavar="NAME=DIR[,DIR...]",
                        help="with --collect: output folders of eval.run, the base model first")
    args = parser.parse_args(argv)
    if (args.collect is None) != (not args.runs) or (args.check and args.collect):
        parser.error("--collect DIR needs runs behind it and stands without --check")
    return args


def main(argv: Sequence[str] | None = None, root: Path = Path(".")) -> None:
    args = parse(argv)
    try:
        if args.collect:
            summary = collect(parse_runs(args.runs), task=args.task, seed=args.seed,
                              allow_dirty=args.allow_dirty)
            args.collect.mkdir(parents=True, exist_ok=True)
            write_json(args.collect / "summary.json", summary)
            print(f"wrote {(args.collect / 'summary.json').as_posix()}")
        found = update(root, check=args.check)
    except (ReadmeError, AnswersError, stats.StatsError) as error:
        sys.exit(f"error: {error}")
    if args.check and found:
        sys.exit(f"out of date: {'; '.join(found)}. Run python -m eval.readme")
    for one in found:
        print(f"brought up to date: {one}")


if __name__ == "__main__":
    main()
