"""The table of balance methods, from summaries and costs made by hand."""

import json

import pytest

from eval import readme
from eval.balance_page import block


def interval(value: float) -> dict:
    return {"low": value - 0.01, "high": value + 0.01}


def summary(ending: str, changes: dict[tuple[str, str], float], shares: dict[str, float]) -> dict:
    names = sorted({name for pair in changes for name in pair} | set(shares))
    return {
        "control": f"plain{ending}", "headline": "twins",
        "runs": [{"name": name + ending, "seeds": [{"steps": 600 if name == "plain-long" else 240}]} for name in names],
        "tasks": {"twins": {
            "runs": {name + ending: {"shapley": {"image_share": shares.get(name), **interval(shares.get(name, 0.5))}} for name in names},
            "changes": [{"before": a + ending, "after": b + ending, "gap": {"change": value, **interval(value)}}
                        for (a, b), value in changes.items()]}}}


def cost(**ratios: float) -> dict:
    return {"device": "cpu", "clock": "processor time", "threads": 1, "recipes": [
        {"name": name.replace("_", "-"), "ratio": ratio, "ratio_low": ratio - 0.05, "ratio_high": ratio + 0.05, "repeats": 5}
        for name, ratio in ratios.items()]}


MIX = summary("", {("plain", "miles"): -0.01, ("plain-long", "miles"): 0.02, ("plain", "mnl"): -0.03, ("plain-long", "mnl"): 0.04},
              {"plain": 0.4, "miles": 0.41, "mnl": 0.42})
FULL = summary("-full-text", {("plain", "mnl"): -0.2}, {"plain": 0.1, "mnl": 0.3})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_cells():
    lines = block(cost(plain=1.0, miles=1.1, mnl=2.5, sam=2.0), {"mix": MIX, "full-text": FULL})
    header, _, plain, miles, mnl, sam = (cells(line) for line in lines[:6])
    assert header[:5] == ["recipe", "time of a step", "mix: gap against plain", "at the same compute", "image's Shapley share"]
    assert plain == ["`plain`", "1.00 [0.95, 1.05]", "-", "-", "40.0 [39.0, 41.0]", "-", "-", "10.0 [9.0, 11.0]"]
    # at 1.1 plain steps the control has the same compute; at 2.5 it is the longer one
    assert miles[2:5] == ["-1.0 [-2.0, +0.0]", "-1.0 [-2.0, +0.0]", "41.0 [40.0, 42.0]"] and miles[5:] == ["-"] * 3
    assert mnl[2:4] == ["-3.0 [-4.0, -2.0]", "+4.0 [+3.0, +5.0]"]
    assert mnl[5:] == ["-20.0 [-21.0, -19.0]", "-", "30.0 [29.0, 31.0]"]
    assert sam[2:] == ["-"] * 6, "what was not measured is no number"
    assert "600 steps in place of 240" in lines[-1]


def test_without_a_longer_control():
    lines = block(cost(plain=1.0, mnl=2.5), {"full-text": FULL})
    assert lines[-1].endswith("not measured.")


def test_block_of_a_document(tmp_path):
    for folder, one in (("balance_mix", MIX), ("balance_full_text", FULL)):
        (tmp_path / "results" / folder).mkdir(parents=True)
        (tmp_path / "results" / folder / "summary.json").write_text(json.dumps(one))
    (tmp_path / "results" / "balance_mix" / "cost.json").write_text(json.dumps(cost(plain=1.0, mnl=2.5)))
    text = readme.generate("balance results/balance_mix results/balance_full_text", tmp_path)
    assert "mix: gap against plain" in text and "full-text: gap against plain" in text and "`mnl`" in text
    with pytest.raises(readme.ReadmeError, match="cannot read"):
        readme.generate("robustness results/balance_mix", tmp_path)
