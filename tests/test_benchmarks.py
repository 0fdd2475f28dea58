"""Shapes and memory: the published sizes, and an estimate that can be compared with what was measured."""

import json

import pytest
import torch

from benchmarks import memory, shapes
from data_prep.encode import Encoder
from training.memory import forget_peak_memory, peak_memory_gb, resident_gb
from transformers import Qwen2_5_VLForConditionalGeneration

from .test_recipes import ROOT


@pytest.mark.parametrize("shape, parameters", (("3b", 3_754_622_976), ("7b", 8_292_166_656)))
def test_shapes_have_the_published_size(shape, parameters, encoder):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(shapes.config(shape, encoder))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_folder_without_weights_is_enough_for_a_dry_run(tiny, tmp_path, recipe_file, capsys):
    import train

    shapes.main(["3b", "--out", str(tmp_path / "3b"), "--like", str(tiny), "--no-weights"])
    assert not list((tmp_path / "3b").glob("*.safetensors"))
    Encoder(tmp_path / "3b")
    train.main([str(recipe_file(views={"both": 1.0}, model={"name": str(tmp_path / "3b"), "dtype": "bfloat16"})), "--dry-run"])
    # 3.75 billion weights of two bytes are 7 GB; on a CPU the libraries come on top of them.
    assert 7.0 < memory.estimated_gb(capsys.readouterr().out) < 12


def test_peak_memory_is_that_of_the_process():
    forget_peak_memory()
    before = peak_memory_gb()
    assert before == pytest.approx(resident_gb(), abs=0.1)
    block = torch.ones(2**26)       # a quarter of a GB
    del block
    assert 0.2 < peak_memory_gb() - before < 0.5
    forget_peak_memory()
    assert peak_memory_gb() < before + 0.2


def test_estimate_and_measurement_are_written(recipe_file, tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(ROOT)
    path = recipe_file(steps=2)
    memory.main([str(path), "--out", str(tmp_path / "memory.json")])
    found = json.loads((tmp_path / "memory.json").read_text())
    assert 0.2 < found["measured_gb"] < 3 and 0.2 < found["estimated_gb"] < 3 and len(found["loss"]) == 2
    assert found["estimate_to_measured_ratio"] == pytest.approx(found["estimated_gb"] / found["measured_gb"], rel=1e-3)
    with pytest.raises(SystemExit, match="error: .*no such key; did you mean 'steps'"):
        memory.main([str(path), "step=1", "--out", str(tmp_path / "memory.json")])
    with pytest.raises(ValueError, match="no estimate"):
        memory.estimated_gb("nothing")
