"""Running train.py from tests, in this process and in others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from training.build import arguments_of, build_trainer
from training.collate import load_encoder
from training.config import load_recipe
from training.model import load_base, prepare
from training.plan import Plan

ROOT = Path(__file__).parent.parent


def run(path: Path, *arguments: str) -> Path:
    """train.py in this process; returns the run folder."""
    train.main([str(path), *arguments])
    overrides = [text for text in arguments if not text.startswith("--")]
    return Path(load_recipe(path, overrides).run_dir)


def refusal(path: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        train.main([str(path), *arguments])
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("error: "), caught.value.code
    return caught.value.code


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    adapter = run_dir / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run_dir / "model" / "model.safetensors")


def same(one: dict, two: dict) -> bool:
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


def trainer_of(path, overrides=(), **arguments):
    """The trainer as train.py builds it."""
    recipe = load_recipe(path, overrides)
    encoder = load_encoder(recipe.model)
    return build_trainer(recipe, Plan(recipe), encoder, prepare(load_base(recipe.model), recipe, encoder), arguments_of(recipe, **arguments))


def start(path: Path, *arguments: str, command: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command, "train.py", str(path), *arguments],
        cwd=ROOT,
        text=True,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_in_two_processes(path: Path, *arguments: str) -> None:
    """train.py under the launcher, two ranks on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    process = start(path, *arguments, command=command)
    try:
        _, said = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its workers, which are in process groups of their own
            process.wait(timeout=60)
    assert process.returncode == 0, said[-3000:]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    output = "\n".join(process.communicate(timeout=10)) if process.poll() is not None else "(still running)"
    pytest.fail(f"step {step} was not reached: {output[-2000:]}")
