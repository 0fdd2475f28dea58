"""eval.curve: slopes worked by hand, a gap that opens and one that closes, and refusals that name the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.provenance import weights_fingerprint
from eval import curve, plots, readme
from tests.test_gap import write_run

BASE = {"both": 0.9, "text": 0.9, "vision": 0.7, "blind": 0.5}
# (both, vision) after 40 and 80 steps; the gap goes from 20 to 25 and 35, and from 20 to 15 and 5
RIGHT = {"full-text": {40: (0.95, 0.7), 80: (0.95, 0.6)}, "no-text": {40: (0.9, 0.75), 80: (0.9, 0.85)}}


def point(folder: Path, name: str, seed: int, step: int, right: dict[str, float] | None = None, **options) -> Path:
    """A training run, its checkpoint after `step` steps (of 80), and the evaluation of that: without a record of the training."""
    run = folder / "runs" / f"{name}-seed{seed}"
    adapter = run / "adapter" if step == 80 else run / "checkpoints" / f"checkpoint-{step}"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(f'{{"step": {step}}}', encoding="utf-8")
    (run / "recipe.yaml").write_text(f"name: {name}\nseed: {seed}\nsteps: 80\n", encoding="utf-8")
    (run / "run.json").write_text(json.dumps({"commit": "1" * 40, "dirty": False, "finished": True, "seconds": 33.5,
                                              "device": "cpu", "data": {}, "packages": {}}), encoding="utf-8")
    both, vision = RIGHT[name][step]
    info = {"adapter": str(adapter), "adapter_sha256": weights_fingerprint(adapter), "seed": None, "training": None}
    return write_run(folder / "answers" / f"{name}-{step}-seed{seed}", right or {**BASE, "both": both, "vision": vision},
                     seed=seed, **{"n": 80, **options, "info": {**info, **options.get("info", {})}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and two recipes with two seeds at 0, 40 and 80 steps."""
    folder = tmp_path_factory.mktemp("curve")
    write_run(folder / "answers" / "base", BASE, n=80, info={"seed": None})
    for name in RIGHT:
        for step in (40, 80):
            for seed in (0, 1):
                point(folder, name, seed, step)
    return folder


def word(folder: Path, name: str, *steps: int, seeds=(0, 1)) -> str:
    parts = [f"0:{folder}/answers/base", *(f"{step}:" + "+".join(f"{folder}/answers/{name}-{step}-seed{seed}" for seed in seeds)
                                             for step in steps)]
    return f"{name}={','.join(parts)}"


@pytest.fixture(scope="module")
def found(folder):
    curve.main(["--out", str(folder / "results" / "demo" / "curve.json"), word(folder, "full-text", 40, 80),
                word(folder, "no-text", 80, 40)])
    return json.loads((folder / "results" / "demo" / "curve.json").read_text(encoding="utf-8"))


# ---- slopes ----------------------------------------------------------------------------------------------------------

def test_slopes_by_hand():
    """Steps 0, 50, 100 have the weights -1, 0, 1 per 100 steps; 0, 30, 60, 150 have (-60, -30, 0, 90) / 126."""
    gaps = [np.array([[0.0, 1, 0]]), np.array([[1.0, 1, 0]]), np.array([[1.0, 0, 0]])]
    assert curve.slopes([0, 50, 100], gaps) == pytest.approx(np.array([[1.0, -1, 0]]))
    gaps = [np.array([[one]]) for one in (0.1, 0.2, 0.2, 0.4)]
    assert curve.slopes([0, 30, 60, 150], gaps) == pytest.approx(np.array([[(-60 * 0.1 - 30 * 0.2 + 90 * 0.4) / 126]]))


def test_the_mean_slope_is_the_slope_of_the_mean_and_a_base_stands_for_all_seeds():
    rng, steps = np.random.default_rng(0), [0, 10, 40, 90]
    gaps = [rng.integers(-1, 2, (1, 60)).astype(float)] + [rng.integers(-1, 2, (3, 60)).astype(float) for _ in steps[1:]]
    per_item = curve.slopes(steps, gaps)
    assert per_item.shape == (3, 60)
    assert per_item.mean() == pytest.approx(100 * np.polyfit(steps, [one.mean() for one in gaps], 1)[0])
    for seed in range(3):
        line = [gaps[0][0].mean(), *(one[seed].mean() for one in gaps[1:])]
        assert per_item[seed].mean() == pytest.approx(100 * np.polyfit(steps, line, 1)[0])


# ---- numbers ---------------------------------------------------------------------------------------------------------

def test_numbers_per_step(found):
    ordinary, other = found["recipes"]
    assert (ordinary["name"], other["name"]) == ("full-text", "no-text")
    assert [one["step"] for one in other["points"]] == [0, 40, 80]         # sorted, however they were given
    assert [one["n_seeds"] for one in ordinary["points"]] == [1, 2, 2]
    assert [one["gap"]["gap"] for one in ordinary["points"]] == pytest.approx([0.20, 0.25, 0.35])
    assert [one["gap"]["gap"] for one in other["points"]] == pytest.approx([0.20, 0.15, 0.05])
    assert [one["views"]["vision"]["value"] for one in ordinary["points"]] == pytest.approx([0.7, 0.7, 0.6])
    assert [one["views"]["both"]["value"] for one in ordinary["points"]] == pytest.approx([0.9, 0.95, 0.95])
    assert set(ordinary["points"][0]["views"]) == {"both", "text", "vision"}
    start, middle, last = (one["change"] for one in ordinary["points"])
    assert start is None and middle["change"] == pytest.approx(0.05) and last["change"] == pytest.approx(0.15)
    assert last["d_both"] == pytest.approx(0.05) and last["d_vision"] == pytest.approx(-0.10)
    assert last["low"] < 0.15 < last["high"] and last["seeds"]["values"] == pytest.approx([0.15, 0.15])
    # steps 0, 40, 80 have the weights -1.25, 0, 1.25 per 100 steps
    assert ordinary["slope"]["value"] == pytest.approx(1.25 * 0.15) and other["slope"]["value"] == pytest.approx(-1.25 * 0.15)
    assert ordinary["slope"]["seeds"]["values"] == pytest.approx([1.25 * 0.15] * 2)
    assert (found["n"], found["n_groups"], found["chance"], found["task"], found["dirty"]) == (80, 40, 0.5, "twins", False)


def test_intervals_are_paired_and_clustered(found):
    """With these weights the slope is 1.25 times the last change, item by item, and so is its interval."""
    for recipe in found["recipes"]:
        slope, last = recipe["slope"], recipe["points"][-1]["change"]
        for key in ("low", "high", "se"):
            assert slope[key] == pytest.approx(1.25 * last[key], rel=1e-4)
        assert slope["n_clusters"] == last["n_clusters"] == 40 and slope["high"] - slope["low"] > 0.05


def test_clusters_widen_the_interval_of_the_slope(tmp_path, folder):
    """All items of a group answered alike: half as many independent ones, so the interval is about sqrt(2) wider."""
    widths = []
    for size in (1, 2):
        names = []
        for name, right in (("base", {"both": 0.9, "vision": 0.7}), ("tuned", {"both": 0.9, "vision": 0.5})):
            def doubled(rows):
                """Each second item answers as the first one of its pair."""
                for first, second in zip(rows[::2], rows[1::2]):
                    second.update(correct=first["correct"], pred=second["gold"] if first["correct"] else "neither")
                return rows

            info = {"adapter": str(folder / "runs" / "full-text-seed0" / "adapter"), "seed": 0, "training": {
                "commit": "1" * 40, "dirty": False, "finished": True}} if name == "tuned" else {}
            names.append(write_run(tmp_path / f"{name}{size}", right, n=400, group_size=size, edit=doubled, info=info))
        found = curve.measure(curve.parse_curves([f"a=0:{names[0]},80:{names[1]}"]))["recipes"][0]["slope"]
        widths.append(found["high"] - found["low"])
    assert 1.25 < widths[1] / widths[0] < 1.6


def test_parents_of_checkpoints(found, folder):
    start, middle, last = (one["parents"] for one in found["recipes"][0]["points"])
    assert [one["steps"] for one in start + middle + last] == [None, 40, 40, 80, 80]
    assert [one["seed"] for one in middle] == [0, 1] and {one["recipe"] for one in middle + last} == {"full-text"}
    assert {one["training_commit"] for one in middle + last} == {"1" * 40} and middle[0]["training_seconds"] is None
    assert last[0]["training_seconds"] == 33.5 and len(middle[0]["recipe_sha256"]) == 64
    assert str(folder) not in json.dumps(found)


def test_the_text_view_may_be_missing(folder, tmp_path):
    right = {"both": 0.9, "vision": 0.7}
    base = write_run(tmp_path / "base", right, n=80, info={"seed": None})
    run = point(tmp_path, "full-text", 0, 40, right={"both": 0.9, "vision": 0.7})
    found = curve.measure(curve.parse_curves([f"full-text=0:{base},40:{run}"]))
    assert [set(one["views"]) for one in found["recipes"][0]["points"]] == [{"both", "vision"}] * 2
    assert found["recipes"][0]["points"][0]["n_seeds"] == 1


def test_the_same_runs_write_the_same_bytes(folder, found, tmp_path):
    curve.main(["--out", str(tmp_path / "again.json"), word(folder, "full-text", 40, 80), word(folder, "no-text", 40, 80)])
    for suffix in (".json", ".svg"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (folder / "results" / "demo" / f"curve{suffix}").read_bytes()


# ---- documents -------------------------------------------------------------------------------------------------------

def test_block_and_figure_are_kept_up_to_date(folder, found):
    path, drawn = folder / "results" / "demo" / "curve.json", folder / "results" / "demo" / "curve.svg"
    fresh, document = path.read_text(encoding="utf-8"), folder / "README.md"
    document.write_text("<!-- generated: curve results/demo -->\n<!-- end -->\n", encoding="utf-8")
    assert readme.update(folder, check=True) == ["README.md: the block 'curve results/demo'"]
    readme.main([], folder)
    text = document.read_text(encoding="utf-8")
    assert "| recipe | gap at step 0 | gap at the end | change | slope per 100 steps |\n" in text
    number = r"([+-][\d.]+) \[[+-][\d.]+, [+-][\d.]+\]"
    for name, numbers in (("full-text", ("+20.0", "+35.0", "+15.0", "+18.8")), ("no-text", ("+20.0", "+5.0", "-15.0", "-18.8"))):
        row = re.search(rf"^\| `{name}` \| {number} \| {number} \(step 80\) \| {number} \| {number} \|$", text, re.M)
        assert row and row.groups() == numbers
    assert "the gap opens under `full-text`; closes under `no-text`. Measured at steps 0, 40, 80, 2 training seeds." in text
    assert "80 items in 40 groups (task `twins`, chance 50.0)" in text and "uncommitted" not in text
    readme.main(["--check"], folder)
    changed = json.loads(fresh)
    changed["recipes"][0]["points"][1]["gap"]["gap"] = 0.26
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"out of date: the figure results/demo/curve.svg\. Run"):
        readme.main(["--check"], folder)
    path.write_text(fresh, encoding="utf-8")
    assert drawn.read_text(encoding="utf-8").startswith("<?xml") and readme.update(folder, check=True) == []


def test_a_change_that_may_be_none_is_not_called_one(found):
    changed = json.loads(json.dumps(found))
    changed["recipes"][0]["points"][-1]["change"].update(low=-0.01)
    changed["recipes"][1]["points"][-1]["change"].update(low=None, high=None)
    text = curve.block(changed)[-1]
    assert "the gap does not change measurably under `full-text`, `no-text`." in text
    assert "| -15.0 |" in curve.block(changed)[3]       # no interval to show


def test_figure_has_a_line_per_recipe_and_view():
    points = [{"step": step, "gap": (0.3, 0.2, 0.4), "both": (0.9, 0.8, 1.0), "vision": (0.6, float("nan"), float("nan"))}
              for step in (0, 50)]
    svg = plots.curve_figure({f"recipe {n}": points for n in range(8)})
    assert svg == plots.curve_figure({f"recipe {n}": points for n in range(8)})
    assert svg.count('id="FillBetweenPolyCollection_') == 8 * 3      # a band for the gap, both and vision
    with pytest.raises(ValueError, match="no points"):
        plots.curve_figure({"a": []})


# ---- refusals --------------------------------------------------------------------------------------------------------

def refused(folder: Path, message: str, *words: str) -> None:
    out = folder / "refused" / "curve.json"
    with pytest.raises(SystemExit, match=message) as caught:
        curve.main(["--out", str(out), *words])
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)
    assert not out.parent.exists()


@pytest.mark.parametrize("text", ("full-text", "=0:x", "a=", "a=x", "a=0", "a=0:", "a=-1:x", "a=0:x,", "a=zero:x"))
def test_words_of_another_form(tmp_path, text):
    refused(tmp_path, "given as NAME=STEP:DIR|cannot read x", text)


def test_steps_and_names(folder, tmp_path):
    base = f"{folder}/answers/base"
    refused(tmp_path, "a: step 0 is given twice; join its seeds with", f"a=0:{base},0:{base}")
    refused(tmp_path, "a: a curve needs step 0, where training starts, and a later step; it has 0", f"a=0:{base}")
    refused(tmp_path, "it has 40, 80", word(folder, "full-text", 40, 80).replace(f"0:{base},", "", 1))
    refused(tmp_path, "the recipe 'full-text' is given twice", *[word(folder, "full-text", 40)] * 2)
    refused(tmp_path, "cannot read .*none/run.json", f"a=0:{base},40:{folder}/none")


@pytest.mark.parametrize("change, message", (
    (lambda text: text.replace("40:", "30:"), "full-text-40-seed0 is given as step 30, but its adapter has made 40"),
    (lambda text: text.replace("80:", "90:"), "full-text-80-seed0 is given as step 90, but its adapter has made 80"),
    (lambda text: re.sub(r"0:(\S+?),40:\S+?,", r"40:\1,0:\1,", text), "base is given as step 40, but its adapter has made 0"),
    (lambda text: re.sub(r"80:(\S+)\+(\S+)", r"80:\2+\1", text),
     r"same seeds, each once .*: full-text 0, full-text 1 \(step 40\) against full-text 1, full-text 0 \(step 80\)"),
    (lambda text: re.sub(r"80:(\S+)\+(\S+)", r"80:\1", text), r"full-text 1 \(step 40\) against full-text 0 \(step 80\)"),
    (lambda text: text.replace("full-text-80-seed1", "no-text-80-seed1"), "not one recipe with the same seeds"),
    (lambda text: re.sub(r"full-text-(\d+)-seed1", r"no-text-\1-seed1", text), "not one recipe with the same seeds"),
    (lambda text: text.replace("full-text-40", "no-text-40"), "not one recipe with the same seeds"),
))
def test_runs_that_are_not_those_of_the_curve(folder, tmp_path, change, message):
    text = word(folder, "full-text", 40, 80)
    assert change(text) != text
    refused(tmp_path, message, change(text))


@pytest.mark.parametrize("options, message", (
    ({"info": {"parser": 2}}, "differ in parser"),
    ({"n": 60}, "do not pair up"),
    ({"right": {"both": 0.9, "text": 0.9}}, "full-text at step 40: task twins was not asked in the view vision"),
    ({"info": {"dirty": True}}, "uncommitted changes"),
    ({"info": {"commit": None}}, "no commit was recorded"),
    ({"info": {"adapter_sha256": "0" * 64}}, "checkpoint-40 has changed since it was evaluated"),
    ({"info": {"adapter": "gone/checkpoints/checkpoint-40"}}, "no run.json and recipe.yaml beside the adapter gone/"),
))
def test_runs_that_cannot_be_compared(tmp_path, folder, options, message):
    run = point(tmp_path, "full-text", 0, 40, **options)
    refused(tmp_path, message, f"full-text=0:{folder}/answers/base,40:{run}")


def test_one_training_is_not_two_seeds(tmp_path, folder):
    again = shutil.copytree(folder / "answers" / "full-text-40-seed0", tmp_path / "again")
    refused(tmp_path, r"each once .*: full-text 0, full-text 0 \(step 40\)",
            f"{word(folder, 'full-text', 40, seeds=(0,))}+{again}")


@pytest.mark.parametrize("key", ("model_sha256", "revision"))
def test_another_base_model(tmp_path, folder, key):
    run = point(tmp_path, "full-text", 0, 40, info={key: "ab" * 32})
    refused(tmp_path, "full-text-40-seed0 is of another base model than step 0", f"full-text=0:{folder}/answers/base,40:{run}")


def test_a_recipe_that_changed_between_two_steps(tmp_path, folder):
    runs = [point(tmp_path / str(step), "full-text", 0, step) for step in (40, 80)]
    recipe = tmp_path / "80" / "runs" / "full-text-seed0" / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8") + "batch: 8\n", encoding="utf-8")
    refused(tmp_path, "seed 0 was trained by another recipe.yaml at step 80 than at step 40",
            f"full-text=0:{folder}/answers/base,40:{runs[0]},80:{runs[1]}")


def test_recipes_measured_in_other_ways_do_not_share_a_figure(tmp_path, folder):
    pixels = {"pixels": {"min": 3136, "max": 3136}}
    write_run(tmp_path / "answers" / "base", BASE, n=80, info={"seed": None, **pixels})
    point(tmp_path, "no-text", 0, 40, info=pixels)
    refused(tmp_path, "differ in pixels", word(folder, "full-text", 40), word(tmp_path, "no-text", 40, seeds=(0,)))


def test_a_changed_working_tree_can_be_allowed_and_is_said(tmp_path, folder):
    run = point(tmp_path, "full-text", 0, 40, info={"dirty": True})
    curve.main(["--out", str(tmp_path / "x.json"), "--allow-dirty", f"full-text=0:{folder}/answers/base,40:{run}"])
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found["dirty"] is True and "uncommitted changes" in curve.block(found)[-1]


def test_an_unknown_task_and_a_wrong_file(folder, tmp_path, capsys):
    refused(tmp_path, "tasks that all runs hold: twins; not maths", "--task", "maths", word(folder, "full-text", 40))
    with pytest.raises(SystemExit):
        curve.main(["--out", str(tmp_path / "curve.svg"), word(folder, "full-text", 40)])
    assert "ends in .json" in capsys.readouterr().err
