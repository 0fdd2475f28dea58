"""The run folder: what is in it, what may be resumed, and that a resumed run ends where a straight one does."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

import train
from training import callbacks
from training import model as model_module
from training.config import load_recipe

from .running import metrics, refusal, run, same, start, wait_for_step, weights


def test_run_folder(recipe_file, twins, tiny, tmp_path):
    import hashlib

    path = recipe_file(steps=4, log_every=2, turns=2)
    run_dir = run(path, "seed=3")
    info = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    assert {"commit", "dirty", "packages", "data", "seconds", "finished", "command", "device"} <= set(info)
    assert info["finished"] is True and info["seconds"] > 0 and info["steps"] == 4
    assert info["packages"]["torch"] == torch.__version__
    data = twins / "train.jsonl"
    assert info["data"][str(data)] == hashlib.sha256(data.read_bytes()).hexdigest()
    recorded = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    assert recorded == load_recipe(path, ["seed=3"]).to_dict() and recorded["seed"] == 3
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert all({"loss", "grad_norm", "token_accuracy", "examples_per_s", "seconds"} <= set(row) for row in rows)
    assert list((run_dir / "tensorboard").glob("events*"))
    assert not list(run_dir.rglob("*.part"))
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_a_finished_run_is_not_run_again(recipe_file, monkeypatch, capsys):
    path = recipe_file()
    run_dir = run(path)
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    monkeypatch.setattr(model_module, "load_base", lambda *_: pytest.fail("weights were loaded"))
    run(path, "--resume")
    assert "is finished" in " ".join(capsys.readouterr().out.split())
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_a_second_run_into_the_same_folder_is_refused(recipe_file):
    path = recipe_file()
    run_dir = run(path)
    before = weights(run_dir)
    message = refusal(path)
    assert "already holds a run" in message and "--resume" in message and str(run_dir) in message
    assert same(weights(run_dir), before)


def test_resuming_with_another_recipe_is_refused(recipe_file):
    run_dir = run(recipe_file())
    message = refusal(recipe_file(optim={"lr": {"merger": 5e-4}}), "--resume")
    assert str(run_dir) in message and "optim.lr.merger (0.001 then, 0.0005 now)" in message
    assert "lr.vision" not in message
    assert "lora" in refusal(recipe_file(lora=None), "--resume")


def after_steps(monkeypatch, action) -> None:
    """Calls `action(step)` after every optimizer step of a run."""
    original = callbacks.Metrics.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        action(state.global_step)

    monkeypatch.setattr(callbacks.Metrics, "on_step_end", on_step_end)


class Crash(Exception):
    pass


def crash():
    raise Crash


def interrupted(path: Path, monkeypatch, step: int) -> None:
    """A run that dies after a step, before that step's checkpoint or line of metrics."""
    with monkeypatch.context() as patch:
        after_steps(patch, lambda now: now == step and crash())
        with pytest.raises(Crash):
            run(path)


def test_resuming_with_other_data_is_refused(recipe_file, twins, tmp_path, monkeypatch):
    shutil.copytree(twins, tmp_path / "data")
    data = tmp_path / "data" / "train.jsonl"
    path = recipe_file(problems=data, steps=4, save={"every": 1})
    interrupted(path, monkeypatch, 3)
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:-1]), encoding="utf-8")
    message = refusal(path, "--resume")
    assert str(data) in message and "data changed" in message
    data.write_text("".join(lines), encoding="utf-8")
    mixture = path.with_name("recipe-mixture.yaml")
    spec = mixture.read_text(encoding="utf-8")
    mixture.write_text(spec.replace("0.6", "0.5").replace("both: 0.2", "both: 0.3"), encoding="utf-8")
    assert mixture.name in refusal(path, "--resume")
    mixture.write_text(spec, encoding="utf-8")
    assert json.loads((run(path, "--resume") / "run.json").read_text())["finished"]


def test_a_run_that_never_began_leaves_nothing_to_resume(recipe_file, tmp_path):
    """A mistake in the data must not make the corrected command fail."""
    path = recipe_file(problems=tmp_path / "late.jsonl")
    assert "late.jsonl" in refusal(path)
    run(recipe_file())


LONG = dict(
    steps=12,
    batch=4,
    micro_batch=2,
    save={"every": 5},
    optim={"schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.01},
    lora={"dropout": 0.1},
    turns=2,
)


@pytest.mark.parametrize("all_weights", (False, True))
def test_resuming_gives_the_same_weights(recipe_file, monkeypatch, all_weights):
    """With dropout, a schedule and a place between checkpoints; metrics.jsonl ends up as if nothing had happened."""
    changes = {**LONG, "lora": None} if all_weights else LONG
    straight = run(recipe_file(name="straight", **changes))
    path = recipe_file(name="cut", **changes)
    interrupted(path, monkeypatch, 8)
    run_dir = Path(load_recipe(path).run_dir)
    assert [row["step"] for row in metrics(run_dir)][-1] == 7
    assert not (run_dir / "adapter").exists() and not (run_dir / "model").exists()
    # What a process leaves that died while it wrote: a newer checkpoint without the mark, and half a line of metrics.
    half = run_dir / "checkpoints" / "checkpoint-10"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert callbacks.last_checkpoint(run_dir).name == "checkpoint-5"
    done = []
    with monkeypatch.context() as patch:
        after_steps(patch, done.append)
        run(path, "--resume")
    assert done == list(range(6, 13)), "what was done before the checkpoint was done again"
    assert same(weights(straight), weights(run_dir))
    timing = ("examples_per_s", "seconds", "peak_memory_gb")
    assert [{k: v for k, v in row.items() if k not in timing} for row in metrics(run_dir)] == [
        {k: v for k, v in row.items() if k not in timing} for row in metrics(straight)
    ]
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 13))
    seconds = [row["seconds"] for row in metrics(run_dir)]
    assert seconds == sorted(seconds)


def test_resuming_a_run_that_only_lacks_its_end(recipe_file, monkeypatch):
    """Killed after the last checkpoint and before the adapter was written."""
    path = recipe_file(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda *_: crash())
        with pytest.raises(Crash):
            run(path)
    assert [row["step"] for row in metrics(run(path, "--resume"))] == [1, 2]
    assert same(weights(run(path, "--resume")), weights(run(recipe_file(name="straight", steps=2))))


def test_old_checkpoints_go_only_after_the_new_one_is_whole(recipe_file, monkeypatch):
    path = recipe_file(steps=4, save={"every": 1, "keep": 1})
    whole = []
    original = callbacks.MarkComplete.on_save

    def on_save(self, args, state, control, **kwargs):
        whole.append(callbacks.last_checkpoint(Path(args.output_dir).parent))
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.MarkComplete, "on_save", on_save)
    run_dir = run(path)
    assert [place and place.name for place in whole] == [None, "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_ctrl_c_and_kill_9(recipe_file):
    """Ctrl-C (to the process group, as a terminal does it; with a worker), kill -9, and the same weights as without."""
    long = {**LONG, "steps": 40, "save": {"every": 10}, "data": {"workers": 1}}
    path = recipe_file(name="killed", **long)
    run_dir = Path(load_recipe(path).run_dir)
    process = start(path)
    wait_for_step(process, run_dir, 13)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"stopped; continue with: python train.py {path} --resume" in said and "Traceback" not in said
    assert not (run_dir / "adapter").exists() and json.loads((run_dir / "run.json").read_text())["finished"] is False

    process = start(path, "--resume")
    wait_for_step(process, run_dir, 24)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.communicate()
    reached = max(row["step"] for row in metrics(run_dir))
    assert 24 <= reached < 40 and not (run_dir / "adapter").exists()

    run(path, "--resume")
    straight = run(recipe_file(name="straight", **{**long, "data": {"workers": 0}}))
    assert same(weights(run_dir), weights(straight))
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 41))
