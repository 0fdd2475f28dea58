"""The generated parts of the documentation: python -m eval.readme [--check]

Rewrites what stands between `<!-- generated: WHAT -->` and `<!-- end -->` in README.md and recipes/README.md. WHAT is
`recipes` (a table of the recipes) or a folder of results, such as `results/demo`, with the name of a task behind it
when another one than --task is meant, or `curve`, `case study` or `robustness` and such a folder (the tables of those
commands of eval), or `balance` and the folders of what balance methods were added to (eval.balance_page). Draws gap.svg
beside every results/*/summary.json, and curve.svg and robustness.svg beside the JSON of that name. --check writes nothing
and exits 1 naming what is out of date.

    python -m eval.readme --collect results/demo --control full-text base=DIR full-text=DIR,DIR,DIR no-text=DIR,DIR,DIR

writes results/demo/summary.json from output folders of eval.run (one per training seed) before it does the same. Every
run is compared with the first and with the control.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml
from tqdm import tqdm

from data_prep.provenance import write_json
from eval import balance_page, case_page, curve, gap, plots, robustness, stats
from eval.answers import SETTINGS, AnswersError, Side, check_pair
from eval.parents import parents, rounded
from eval.report import CONTROL, pairs_of, parse_runs
from eval.show import TITLES, table_lines

DOCUMENTS = ("README.md", "recipes/README.md")
BLOCK = re.compile(r"(?<=<!-- generated: )(?P<what>[^\n]+?) -->\n(?P<body>.*?)(?=<!-- end -->)", re.S)
VIEWS = ("both", "text", "vision", "blind")
KEPT = ("n", "n_groups", "n_seeds", "left_out", "chance", "views", *gap.DIFFERENCES, "shapley", "warnings")
CHANGES = ("views", *gap.DIFFERENCES, "verdict")
TITLE = "Accuracy per view; the bar is the gap, both - vision"


class ReadmeError(ValueError):
    """Results that may not be collected or documents that cannot be generated; the message is one sentence."""


def collect(sides: Sequence[Side], *, task: str | None = None, control: str | None = None, seed: int = 0,
            allow_dirty: bool = False) -> dict:
    """The content of summary.json: every run with its parents, every task's numbers, the changes of `pairs_of`.

    task: the one that the README's figure and table show when they name none; default: the first. control: name of the
    run that is one; default: the run called full-text, if there is one.
    Raises ReadmeError for a control that is no run, AnswersError for a run without its parents (commit, recipe, finished
    training) or from a changed working tree, and for runs that were not measured alike on the same items.
    """
    given = [side.name for side in sides]
    if control not in (None, *given):
        raise ReadmeError(f"no run is called {control}, so it cannot be the control; there are {', '.join(given)}")
    if control is None and CONTROL in given:
        control = CONTROL
    runs = [{"name": side.name, "seeds": [parents(run, allow_dirty=allow_dirty) for run in side.runs]} for side in sides]
    for run in runs:
        seeds = [one["seed"] for one in run["seeds"]]
        if len(set(seeds)) < len(seeds) or len({one["recipe"] for one in run["seeds"]}) > 1:
            raise ReadmeError(f"the runs of {run['name']} are not one recipe with seeds that differ: "
                              + ", ".join(f"{one['recipe']} {one['seed']}" for one in run["seeds"]))
    pairs = pairs_of(sides, control)
    for before, after in pairs:
        check_pair(before, after)
    names = sorted(set.intersection(*(set(side.tasks()) for side in sides)))
    if not names or task not in (None, *names):
        raise ReadmeError(f"tasks that all runs hold: {', '.join(names) or 'none'}" + (f"; not {task}" if task else ""))
    tasks = {}
    for name in names:
        measured = {side.name: gap.measure(side, name, seed=seed) for side in _bar(sides, f"{name}: runs")}
        tasks[name] = {
            "runs": {run: {key: found[key] for key in KEPT if key in found} for run, found in measured.items()},
            "changes": [{"before": before.name, "after": after.name,
                         **{key: value for key, value in gap.change(before, after, name, seed=seed).items()
                            if key in CHANGES}} for before, after in _bar(pairs, f"{name}: changes")],
        }
    dirty = any(one[key] for run in runs for one in run["seeds"] for key in ("dirty", "training_dirty"))
    settings = {key: sides[0].runs[0].info[key] for key in SETTINGS}
    return rounded(gap.plain({"runs": runs, "control": control, "headline": task or names[0], "tasks": tasks,
                              "dirty": dirty, "settings": settings, "margin": gap.MARGIN, "bootstrap_seed": seed}))


def _bar(things: Sequence, name: str) -> tqdm:
    return tqdm(things, desc=name, mininterval=1)


def results_block(summary: Mapping, task: str) -> list[str]:
    """The README's table of one task and the sentence below it."""
    rows, control = _rows(summary, task), _control(summary)
    differences = [key for key in gap.DIFFERENCES if any(row.get(key) for row in rows)]
    cells, most = [], max(row["n_seeds"] for row in rows)
    for row in rows:
        change = _change(summary, task, row["run"]) or {}
        # The base is one model; of trained runs it is said when one has fewer seeds than the others.
        fewer = row is not rows[0] and row["n_seeds"] < most
        cells.append((f"`{row['run']}`" + (f" ({row['n_seeds']} seed{'s' * (row['n_seeds'] > 1)})" if fewer else ""),
                      *(gap.points(row["views"][view][0]) if view in row["views"] else "-" for view in VIEWS),
                      *(gap.within(row.get(key), sign=True) for key in differences),
                      gap.within(change.get("gap"), "change", True), gap.closed(change.get("gap")).removesuffix(" %")))
    header = ("run", *VIEWS, *(TITLES[key] for key in differences),
              f"change of the gap against `{control}`", "closed %")
    return [*table_lines(header, cells), "", _sentence(summary, task, rows)]


def _control(summary: Mapping) -> str:
    """The run that the others are held against: the control, or the first run where there is none."""
    names = [run["name"] for run in summary["runs"]]
    control = summary.get("control", "control")     # summaries older than the key gave the control this name
    return control if control in names else names[0]


def _change(summary: Mapping, task: str, run: str) -> dict | None:
    """What changed from the control to the run; None for the control, and for a base that comes before it."""
    pair = _control(summary), run
    one = next((one for one in summary["tasks"][task]["changes"] if (one["before"], one["after"]) == pair), None)
    return gap.numbers(one) if one is not None and "gap" in one else None


def _best(summary: Mapping) -> tuple[str | None, int, str]:
    """(the run whose gap on the headline task changes to the lowest against the control, how many it was chosen from, which).

    Among those that closed it well, where there are any: a gap may also fall because the words are answered worse. One run for
    all tasks: a best one per task would be chosen by each task's luck.
    """
    measured = summary["tasks"][summary["headline"]]["runs"]
    most = max(one["n_seeds"] for one in measured.values())     # a run with fewer seeds than the others may be best by luck
    found = {name: _change(summary, summary["headline"], name) for name, one in measured.items() if one["n_seeds"] == most}
    well = {name: one for name, one in found.items() if one is not None and one["verdict"]["word"] == "closed well"}
    change = {name: one["gap"]["change"] for name, one in (well or found).items() if one is not None}
    return min(change, key=change.__getitem__, default=None), len(change), " that closed it well" if well else ""


def _sentence(summary: Mapping, task: str, rows: Sequence[Mapping]) -> str:
    last = rows[-1]
    size = (f"{last['n']:,} items in {last['n_groups']:,} groups (task `{task}`, chance {gap.points(last['chance'])}); "
            "accuracies and differences in points, with 95 % intervals paired by item and clustered by group.")
    if left_out := summary["tasks"][task]["runs"][last["run"]].get("left_out"):
        size += f" Left out of all numbers: {gap.left_out_words(left_out)}."
    if summary["dirty"]:
        size += " Made from a working tree with uncommitted changes."
    before, (after, many, which) = _control(summary), _best(summary)
    found = _change(summary, task, after) if after else None
    if found is None:
        return size
    on = "" if task == summary["headline"] else f" on `{summary['headline']}`"
    chosen = f", the lowest gap of {many} runs{which}{on}," if many > 1 else ""
    moved = ", ".join(f"`{view}` {gap.within(found['views'][view], 'change', True)}"
                      for view in ("vision", "both", "text") if view in found["views"])
    trained = [one for run in summary["runs"] if run["name"] in (before, after) for one in run["seeds"] if one["recipe"]]
    seeds, steps = (sorted({one[key] for one in trained}) for key in ("seed", "steps"))
    per_seed = [gap.points(value, True) for value in found["gap"]["seeds"]["values"]]
    text = [f"From `{before}` to `{after}`{chosen} the gap changes by {gap.within(found['gap'], 'change', True)}, which "
            f"closes {gap.closed(found['gap'])} of it ({found['verdict']['word']}). Accuracy changes: {moved}."]
    if "image_gain" in found:
        text.append(f"The image gain changes by {gap.within(found['image_gain'], 'change', True)}.")
    if trained:
        several = len(per_seed) > 1
        text.append(f"{len(seeds)} training seed{'s' if several else ''}, {' or '.join(map(str, steps))} optimizer steps "
                    "each" + (f"; change of the gap per seed: {', '.join(per_seed)}." if several else "."))
    return " ".join([*text, size])


def figure(summary: Mapping, task: str) -> str:
    """gap.svg, with the stamp of its numbers as its last line."""
    return plots.gap_figure(_rows(summary, task), title=TITLE) + _stamp(summary, task)


def _stamp(summary: Mapping, task: str) -> str:
    return plots.stamp([TITLE, *_rows(summary, task)])


def _rows(summary: Mapping, task: str) -> list[dict]:
    """Rows as eval.gap.table gives them, runs in the order in which they were named."""
    if task not in summary["tasks"]:
        raise ReadmeError(f"the summary holds no task {task}; it holds {', '.join(summary['tasks'])}")
    names = [run["name"] for run in summary["runs"]]
    return [gap.table_row(name, task, gap.numbers(summary["tasks"][task]["runs"][name])) for name in names]


def recipes_block(root: Path) -> list[str]:
    """The table of recipes/README.md: one row per recipe, found by a glob, in the words of its header."""
    rows, named = [], {}
    for path in recipe_files(root):
        named.setdefault(header(path).get("Result"), set()).add(name_of(path))
        base, keys = differences(path)
        head, place = header(path), path.relative_to(root / "recipes").as_posix()
        differs = f"`{base}` in {', '.join(f'`{key}`' for key in keys)}" if base else "-"
        rows.append((f"[{place.removesuffix('.yaml')}]({place})", head.get("Idea", "-"), differs,
                     _result(root, path, head.get("Result", "-"))))
    # A summary may show what a recipe started from, which is another one's result.
    for text in named:
        _check_recipes(root, text or "", set().union(*named.values()))
    return table_lines(("recipe", "idea", "differs from", "result"), rows)


def _check_recipes(root: Path, text: str, names: set[str]) -> None:
    """Raise ReadmeError when a summary holds a run of a recipe that none of those naming it is: its row would be lost."""
    if not text.endswith("summary.json") or not (root / text).is_file():
        return
    for run in _read(root / text)["runs"]:
        if (recipe := run["seeds"][0]["recipe"]) not in (None, *names):
            raise ReadmeError(f"{text}: the run {run['name']} is of the recipe {recipe}, but no recipe is "
                              f"called that; there are {', '.join(sorted(names))}")


def name_of(recipe: Path) -> str:
    """The recipe's name, which its runs record."""
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))["name"]


def recipe_files(root: Path) -> list[Path]:
    """Every recipe below recipes/; mixtures, pipelines and examples of launching are none."""
    return sorted(path for path in (root / "recipes").rglob("*.yaml") if path.parent.name not in ("mixtures", "pipelines", "launch"))


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
    """The recipe's gap, its change against the control and a link, where its header names a summary; "none yet" while
    that holds no run of the recipe. Else the header's words.

    Runs are found by the recipe that their training recorded, so a run may be called otherwise.
    """
    path = root / text
    if path.name != "summary.json" or not path.is_file():
        return text
    summary, recipe_name = _read(path), name_of(recipe)
    runs = [run["name"] for run in summary["runs"] if run["seeds"][0]["recipe"] == recipe_name]
    if not runs:
        return "none yet"
    name = recipe_name if recipe_name in runs else runs[0]
    if len(runs) > 1 and name != recipe_name:
        raise ReadmeError(f"{text}: the runs {', '.join(runs)} are all of the recipe {recipe_name}; call one of them that")
    row = next(row for row in _rows(summary, summary["headline"]) if row["run"] == name)
    change = _change(summary, summary["headline"], name)
    against = f"; against `{_control(summary)}` {gap.within(change['gap'], 'change', True)}" if change else ""
    return f"gap {gap.within(row['gap'], sign=True)}{against} ([numbers](../{text}))"


def generate(what: str, root: Path) -> str:
    """The text of one block."""
    if what == "recipes":
        lines = recipes_block(root)
    elif what.startswith("curve results/"):
        lines = curve.block(_read(root / what.removeprefix("curve ").strip() / "curve.json"))
    elif what.startswith("case study results/"):
        lines = case_page.block(_read(root / what.removeprefix("case study ").strip() / "case_study.json"))
    elif what.startswith("robustness results/"):
        lines = robustness.block(_read(root / what.removeprefix("robustness ").strip() / "robustness.json"))
    elif what.startswith("balance results/"):
        folders = what.split()[1:]
        bases = {Path(folder).name.replace("balance_", "").replace("_", "-"): _read(root / folder / "summary.json") for folder in folders}
        lines = balance_page.block(_read(root / folders[0] / "cost.json"), bases)
    else:
        folder, _, task = what.partition(" ")
        if not folder.startswith("results/"):
            raise ReadmeError(f"nothing is generated under the name '{what}'; there are recipes, results/..., curve results/..., "
                              "case study results/..., robustness results/... and balance results/... results/...")
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
    found, documents = [], [name for name in DOCUMENTS if (root / name).is_file()]
    if not documents:
        raise ReadmeError(f"neither {' nor '.join(DOCUMENTS)} is here; run this in the repository's root")
    # all of them before the first is written, so that an error leaves none of them new beside old ones
    for name, (text, stale) in [(name, rewritten(root / name, root)) for name in documents]:
        found += [f"{name}: the block '{what}'" for what in stale]
        if stale and not check:
            (root / name).write_text(text, encoding="utf-8", newline="\n")
    for drawn, stamp, draw in _figures(root):
        if not drawn.is_file() or not drawn.read_text(encoding="utf-8").endswith(stamp):
            found.append(f"the figure {drawn.relative_to(root).as_posix()}")
            if not check:
                drawn.write_text(draw(), encoding="utf-8", newline="\n")
    return found


def _figures(root: Path) -> Iterator[tuple[Path, str, Callable[[], str]]]:
    """(path, last line of a figure that is up to date, what draws it) of every figure beside committed results."""
    for path in sorted((root / "results").glob("*/summary.json")):
        summary = _read(path)
        task = summary["headline"]
        yield path.with_name("gap.svg"), _stamp(summary, task), partial(figure, summary, task)
    for path in sorted((root / "results").glob("*/curve.json")):
        found = _read(path)
        yield path.with_suffix(".svg"), curve.stamp(found), partial(curve.figure, found)
    for path in sorted((root / "results").glob("*/robustness.json")):
        found = _read(path)
        yield path.with_suffix(".svg"), robustness.stamp(found), partial(robustness.figure, found)


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
    parser.add_argument("--control", metavar="NAME", help=f"with --collect: the control among the runs (default: {CONTROL})")
    parser.add_argument("--allow-dirty", action="store_true", help="collect runs of a changed working tree, and say so")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("runs", nargs="*", metavar="NAME=DIR[,DIR...]",
                        help="with --collect: output folders of eval.run, the base model first")
    args = parser.parse_args(argv)
    if (args.collect is None) != (not args.runs) or (args.check and args.collect):
        parser.error("--collect DIR needs runs behind it and stands without --check")
    if args.control and not args.collect:
        parser.error("--control NAME needs --collect DIR")
    return args


def main(argv: Sequence[str] | None = None, root: Path = Path(".")) -> None:
    args = parse(argv)
    try:
        if args.collect:
            summary = collect(parse_runs(args.runs), task=args.task, control=args.control, seed=args.seed,
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
