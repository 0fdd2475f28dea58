"""The table of balance methods: what each changes against plain training at the same steps and the same compute, and its cost."""

from __future__ import annotations

from collections.abc import Mapping

from eval import gap
from eval.show import table_lines

PLAIN, LONG = "plain", "plain-long"     # the control, and the same with more steps: the compute of the dearest methods
CHEAP = 1.15                            # a method whose step costs at most this much of a plain one has the control's compute


def block(cost: Mapping, bases: Mapping[str, Mapping]) -> list[str]:
    """Markdown lines of the table and of the sentences below it.

    Args:
        cost: what benchmarks.balance_cost wrote.
        bases: summaries of eval.readme by what the methods were added to. Runs are called by their recipe, with one common ending
            (which may be empty) per summary; the control is `plain` with that ending, and `plain-long` the longer one.
    """
    header = ["recipe", "time of a step"]
    for base in bases:
        header += [f"{base}: gap against plain", "at the same compute", "image's Shapley share"]
    rows = []
    for one in cost["recipes"]:
        row = [f"`{one['name']}`", f"{one['ratio']:.2f} [{one['ratio_low']:.2f}, {one['ratio_high']:.2f}]"]
        for summary in bases.values():
            row += _cells(summary, one["name"], one["ratio"])
        rows.append(row)
    steps = sorted({(run["name"].startswith(LONG), run["seeds"][0]["steps"]) for summary in bases.values() for run in summary["runs"]
                    if run["seeds"][0]["steps"] and run["name"].startswith(PLAIN)})
    text = (f"Time of a step: {cost['clock']}, median and range over {cost['recipes'][-1]['repeats']} blocks against plain blocks beside "
            "them in one run "
            f"({cost['device']}, {cost['threads']} thread{'s' * (cost['threads'] != 1)}). Changes of the gap in points, with 95 % "
            "intervals paired by item and clustered by group; negative is better. Same compute: ")
    longer = [count for long, count in steps if long]
    text += (f"a step of at most {CHEAP:g} plain ones has the compute of the control, and dearer ones are held against plain training "
             f"of {longer[0]} steps in place of {steps[0][1]}." if longer else "not measured.")
    return [*table_lines(tuple(header), [tuple(row) for row in rows]), "", text]


def _cells(summary: Mapping, name: str, ratio: float) -> tuple[str, str, str]:
    """Change of the gap at the same steps, at the same compute, and the share; "-" for what was not measured."""
    task = gap.numbers(summary["tasks"][summary["headline"]])
    ending = summary["control"].removeprefix(PLAIN)
    run = task["runs"].get(name + ending)
    if run is None:
        return "-", "-", "-"
    changes = {(one["before"], one["after"]): one for one in task["changes"]}

    def against(control: str) -> str:
        change = changes.get((control + ending, name + ending))
        return gap.within(change["gap"], "change", True) if change else "-"

    share = run.get("shapley")
    same = against(PLAIN)
    return (same, same if ratio <= CHEAP else against(LONG),
            gap.within((share["image_share"], share["low"], share["high"])) if share else "-")
