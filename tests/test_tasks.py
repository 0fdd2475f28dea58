"""Every task meets four fake models: an oracle, a constant, a blind one and gibberish."""

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from data_prep.problem import possible_views, read_problems
from data_prep.sources import mathverse, mmmu_pro, nlvr, pgps9k, puzzlevqa
from data_prep.twins.__main__ import write
from eval import gap
from eval import run as eval_run
from eval.answers import read_side
from eval.tasks import TASKS, TaskError, find_task
from tests.fakes import FAKES, Fake, blind, constant, oracle
from tests.study import library  # noqa: F401
from tests.test_study_mathverse import mathverse_copy, verse
from tests.test_study_mmmu_pro import item, mmmu_copy, screenshot
from tests.test_study_pgps9k import geometry, owners_folder

REAL = os.environ.get("EVENSIGHT_REALDATA")
VIEWS = ("both", "vision", "text", "blind")


@pytest.fixture(scope="module")
def data(tmp_path_factory, library) -> Path:  # noqa: F811
    """A data folder with the files of every task that can be made here: of the hub's data sets, small ones in their form."""
    folder, copies = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("copies")
    write(folder / "twins", {"test": 160, "test_new": 80}, seed=3)
    items = [item(n, answer="ABCDEFGHIJ"[n % 10]) for n in range(20)]
    verses = [verse(n, "ABCD"[n % 4], width=40 + n) for n in range(8)]
    verses += [verse(n, f"{n}.5", "free-form", width=40 + n) for n in range(300, 305)]
    for rows in verses:  # a prompt is asked once, so no two problems may read alike
        for row in rows:
            row["question"] = row["question"].replace("gamma", f"gamma{row['problem_index']}")
    geometries = {n: geometry(n, f"t_{n}.png") for n in range(300, 313)}
    for adapter, copy in (
        (mmmu_pro, mmmu_copy(library, copies / "mmmu_pro", items, [screenshot(row) for row in items])),
        (mathverse, mathverse_copy(library, copies / "mathverse", *verses)),
        (pgps9k, owners_folder(copies / "pgps9k", {}, geometries)),
    ):
        adapter.main(["--from", str(copy), "--out", str(folder / copy.name)])
    if REAL:
        nlvr.main(["--from", f"{REAL}/nlvr", "--out", str(folder / "nlvr"), "--test-share", "0.3"])
        puzzlevqa.main(["--from", f"{REAL}/puzzlevqa", "--out", str(folder / "puzzlevqa"), "--test-share", "0.9"])
    return folder


def ask(data: Path, out: Path, task: str, say, *extra: str) -> Fake:
    fake = Fake(say)
    words = ["--model", "fake", "--tasks", task, "--views", ",".join(VIEWS), "--data", str(data), "--out", str(out), *extra]
    args = eval_run.parse(words)
    eval_run.run(args, lambda: fake)
    return fake


def available(task: str, data: Path) -> None:
    if not (data / TASKS[task].file).exists():
        pytest.skip(f"{task}: EVENSIGHT_REALDATA, a folder of the downloaded data sets, is not set")


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_fakes(task, mode, data, tmp_path) -> None:
    available(task, data)
    rows = {}
    for name, say in FAKES.items():
        ask(data, tmp_path / name, task, say, "--mode", mode, "--limit", "100")
        rows[name] = json_rows(tmp_path / name)
    views = [view for view in VIEWS if any(row["view"] == view for row in rows["oracle"])]
    assert {"vision", "blind"} <= set(views)

    def share(name: str, view: str, test) -> float:
        return float(np.mean([test(row) for row in rows[name] if row["view"] == view]))

    accuracy = {name: {view: share(name, view, lambda row: row["correct"]) for view in views} for name in FAKES}
    unparsed = {name: {view: share(name, view, lambda row: row["pred"] is None) for view in views} for name in FAKES}
    # Equal prompts are asked once, so items that only their pictures tell apart get one answer where no picture is shown.
    golds = defaultdict(set)
    for row in rows["oracle"]:
        golds[row["view"], row["question"], str(row["options"])].add(row["gold"])
    wrong = [row for row in rows["oracle"] if not row["correct"]]
    assert {row["view"] for row in wrong} <= {"text", "blind"}
    assert all(len(golds[row["view"], row["question"], str(row["options"])]) > 1 for row in wrong)
    if mode == "generate":
        assert set(accuracy["gibberish"].values()) == {0.0}
        assert all(row["pred"] is None for row in rows["gibberish"] if row["choices"])
    chance = float(np.mean([1 / len(row["choices"]) if row["choices"] else 0 for row in rows["blind"]]))
    groups = len({row["group"] for row in rows["blind"]})
    for name in ("constant", "blind"):
        assert set(unparsed[name].values()) == {0.0}
        said = defaultdict(set)
        for row in rows[name]:
            if row["view"] not in row["meta"].get("published", {}):  # there a data set has words of its own
                said[row["id"]].add(row["pred"])
        assert set(map(len, said.values())) == {1}, "a view changed the answers of a model that does not look"
        assert abs(accuracy[name]["blind"] - chance) <= 4 * np.sqrt(chance * (1 - chance) / groups), chance
    result = gap.compare(read_side("blind", str(tmp_path / "blind")), read_side("oracle", str(tmp_path / "oracle")))
    assert json.dumps(gap.plain(result))


def json_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_constant_is_told_from_always_right(data, tmp_path) -> None:
    """A metric that reads the labels where it should read the predictions would not see who is asked."""
    ask(data, tmp_path / "a", "twins", oracle)
    ask(data, tmp_path / "b", "twins", constant)
    first, second = ({row["id"]: row["pred"] for row in json_rows(tmp_path / name)} for name in "ab")
    assert first != second


def test_resume_asks_only_what_is_missing(data, tmp_path) -> None:
    out = tmp_path / "out"
    whole = ask(data, out, "twins", blind).asked
    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:10]) + lines[10][:30])        # as kill -9 leaves it
    assert ask(data, out, "twins", blind).asked == whole - 10
    again = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    assert sorted(again) == sorted(lines)
    assert ask(data, out, "twins", blind).asked == 0


def test_other_settings_are_refused(data, tmp_path) -> None:
    ask(data, tmp_path / "out", "twins", blind)
    with pytest.raises(TaskError, match="mode"):
        ask(data, tmp_path / "out", "twins", blind, "--mode", "generate")


def test_a_changed_picture_is_asked_again(tmp_path) -> None:
    write(tmp_path / "twins", {"test": 8, "test_new": 1}, seed=3)
    out = tmp_path / "out"
    whole = ask(tmp_path, out, "twins", blind).asked
    problem = read_problems(tmp_path / "twins" / "test.jsonl")[0]
    from PIL import Image

    Image.new("RGB", (84, 84)).save(problem.root / problem.image)
    touched = sum(1 for p in read_problems(tmp_path / "twins" / "test.jsonl") if p.image == problem.image)
    (out / "run.json").unlink()
    assert ask(tmp_path, out, "twins", blind).asked == 2 * touched < whole      # both and vision show the picture


def test_limit_keeps_groups_whole(data, tmp_path) -> None:
    ask(data, tmp_path / "out", "twins", blind, "--limit", "50")
    rows = json_rows(tmp_path / "out")
    every = read_problems(data / "twins" / "test.jsonl")
    asked = {row["id"] for row in rows}
    assert 40 <= len(asked) <= 50
    groups = {row["group"] for row in rows}
    assert asked == {problem.id for problem in every if problem.group in groups}


def test_views_of_an_item_stand_together(data, tmp_path) -> None:
    """A run that is cut short must be short in every view alike."""
    args = eval_run.parse(["--model", "fake", "--tasks", "twins", "--data", str(data), "--out", str(tmp_path)])
    problems = read_problems(data / "twins" / "test.jsonl")[:5]
    asked = [(find_task("twins"), p, view, None) for p in problems for view in possible_views(p) if view.value in VIEWS]
    order = [(request.problem.id, request.view.value) for request in eval_run._requests(asked, "")]
    assert order == [(p.id, view) for p in problems for view in VIEWS]
    assert args.views == ",".join(VIEWS)


@pytest.mark.parametrize("words, message", [
    (["--tasks", "twinz"], "no such task: twinz; tasks: .*twins"),
    (["--tasks", "missing.jsonl"], "no such file of problems: missing.jsonl"),
    (["--tasks", "twins", "--views", "both,visoin"], "no such view: visoin; views: both, vision"),
    (["--tasks", "nlvr", "--data", "nowhere"], "task nlvr: no such file: nowhere/nlvr/test.jsonl"),
])
def test_errors_are_sentences(words, message, tmp_path) -> None:
    args = eval_run.parse(["--model", "fake", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(TaskError, match=message):
        eval_run.run(args, lambda: pytest.fail("a model was loaded before the words were checked"))
    assert not (tmp_path / "out").exists()
