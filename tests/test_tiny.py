"""The embedded model: what it must be able to do, how large it may be, and that its build runs."""

import json
from pathlib import Path

import pytest

from data_prep.answerer import Answerer
from data_prep.problem import View, read_problems, render
from data_prep.twins.__main__ import write
from training import tiny

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny"


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("twins")
    write(folder, {"test": 96}, seed=7)
    problems = read_problems(folder / "test.jsonl", verify="none")
    answerer = Answerer(str(TINY))
    found = {}
    for view in ("both", "text", "vision", "blind"):
        prompts = [render(problem, view) for problem in problems]
        scores = [row for start in range(0, len(prompts), 64) for row in answerer.likelihoods(prompts[start:start + 64])]
        right = [prompt.choices[row.index(max(row))] == prompt.answer for prompt, row in zip(prompts, scores)]
        found[view] = sum(right) / len(right)
    return found


def test_reads_words(accuracy) -> None:
    assert accuracy["text"] >= 0.90


def test_shows_the_gap(accuracy) -> None:
    assert accuracy["both"] - accuracy["vision"] >= 0.25


def test_sees_something(accuracy) -> None:
    """About 450 problems: three standard errors are 7 points."""
    assert accuracy["vision"] >= accuracy["blind"] + 0.07


def test_size() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8e6
    assert (TINY / "README.md").exists()


def test_config_is_the_committed_recipe() -> None:
    built = json.loads((TINY / "build.json").read_text())
    assert built["stages"] == json.loads(json.dumps([stage._asdict() for stage in tiny.STAGES]))


def test_build_runs_and_continues(tmp_path, monkeypatch) -> None:
    """The whole build, with stages of two steps; a second call starts from what the first left."""
    stages = [stage._replace(steps=2, batch=4, warmup=1) for stage in tiny.STAGES]
    monkeypatch.setattr(tiny, "STAGES", stages)
    words = ["--out", str(tmp_path / "tiny"), "--work", str(tmp_path / "work")]
    tiny.main(words)
    first = (tmp_path / "tiny" / "model.safetensors").read_bytes()
    (tmp_path / "work" / stages[-1].name / "model.safetensors").unlink()
    tiny.main(words)
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == first


def test_stream_shows_what_render_shows() -> None:
    """The stream draws its pictures itself; its messages must be those of `render` all the same."""
    stage = tiny.STAGES[-1]._replace(rates={"both": 1.0})
    messages, images, _ = tiny.TwinStream(stage, 0).conversation(5)
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert messages[0]["content"][1]["text"].startswith("Facts: ")
    assert len(images) == 1 and len(messages) % 2 == 0
    for message in messages[2::2]:
        assert [part["type"] for part in message["content"]] == ["text"]
        assert "Facts:" not in message["content"][0]["text"]


def test_stream_never_shows_what_is_kept_for_tests() -> None:
    stream = tiny.TwinStream(tiny.STAGES[-1], 0)
    for number in range(200):
        rng_world = stream.world(number)
        assert rng_world.split == "train"


def test_views_of_the_stream_are_views() -> None:
    for stage in tiny.STAGES:
        assert sum(stage.rates.values()) == pytest.approx(1)
        assert set(stage.rates) <= {*View.__members__, "copy", "describe"}
