"""Every recipe that ships loads and trains a few steps; a new one is found by a glob, never by a list."""

import json
from functools import partial
from pathlib import Path

import pytest

import train
from data_prep.twins.__main__ import write
from training.callbacks import COMPLETE
from training.config import Preference, load_pipeline, load_recipe
from training.mixture import Mixture
from training.pair_mixture import PairMixture
from training.strict import read_yaml

from .pairs_for_tests import pairs_of, written

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in ("mixtures", "pipelines", "launch"))
PIPELINES = sorted((ROOT / "recipes" / "pipelines").glob("*.yaml"))
MIXTURES = sorted((ROOT / "recipes" / "mixtures").glob("*.yaml"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder where every file that a mixture names exists, filled with twins and pairs about them."""
    place = tmp_path_factory.mktemp("workplace")
    write(place / "twins", {"train": 48, "val": 12, "test": 12}, seed=1)
    written(place / "twins", pairs_of(place / "twins", 40), "train.pairs.jsonl")
    write(place / "preference", {"train": 48}, seed=1)
    written(place / "preference", pairs_of(place / "preference", 40), "train.jsonl")
    for mixture in MIXTURES:
        for source in read_yaml(mixture)["sources"].values():
            file = Path(source.get("problems") or source["pairs"])
            folder = place / file.parent
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.symlink_to(place / ("twins" if "problems" in source or file.parent.name == "twins" else "preference"))
    factors = {f"balance/factor_{side}": factor for side, factor in (("image", 1.5), ("text", 0.5))}
    for path in RECIPES:
        if folder := getattr(load_recipe(ROOT / path).balance, "of", None):     # of a run that it follows
            (place / folder.replace("{seed}", "0")).mkdir(parents=True)
            (place / folder.replace("{seed}", "0") / "metrics.jsonl").write_text(json.dumps(factors) + "\n")
    return place


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_trains(path, workplace, monkeypatch, capsys) -> None:
    monkeypatch.chdir(workplace)
    run_dir = workplace / "runs" / path.with_suffix("")
    words = [f"model.name={ROOT / 'assets' / 'tiny'}", "model.dtype=float32", "model.max_pixels=null", "data.workers=0", "steps=3",
             "batch=4", "micro_batch=2", "optim.warmup_steps=0", "save.every=1", "log_every=1", f"run_dir={run_dir}",
             "model.adapter=null"]
    if getattr(load_recipe(ROOT / path).balance, "probe", None) is not None:
        words += ["balance.probe.items=4"]
    train.main([str(ROOT / path), *words])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["loss"] < 20 for row in rows)
    assert (run_dir / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert (run_dir / "checkpoints" / "checkpoint-3" / COMPLETE).exists()
    recipe = load_recipe(ROOT / path, words)
    rate = rows[0]["lr_language" if "lr_language" in rows[0] else "lr_language_text"]
    assert rate == pytest.approx(recipe.optim.lr.language * rows[0].get("balance/factor_text", 1))


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.name)
def test_mixture_loads(path, workplace, monkeypatch) -> None:
    monkeypatch.chdir(workplace)
    pairs = any("pairs" in source for source in read_yaml(path)["sources"].values())
    assert len((partial(PairMixture, preference=Preference()) if pairs else Mixture)(path, seed=0, draws=10)) == 10


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_pipeline(path, workplace, monkeypatch, capsys) -> None:
    """Each part starts from the adapter that the one before it left."""
    monkeypatch.chdir(workplace)
    first, *later = load_pipeline(path)
    assert later and all(recipe.model.adapter == f"{before.run_dir}/adapter" for before, recipe in zip([first, *later], later))
    words = [f"model.name={ROOT / 'assets' / 'tiny'}", "model.dtype=float32", "model.max_pixels=null", "data.workers=0", "steps=1",
             "batch=4", "micro_batch=2", "optim.warmup_steps=0", f"seed={7 + PIPELINES.index(path)}"]
    train.main([str(path), *words])
    for recipe in load_pipeline(path, words):
        assert json.loads((Path(recipe.run_dir) / "run.json").read_text())["finished"]
    train.main([str(path), *words, "--resume"])
    assert capsys.readouterr().out.count("is finished") == len(later) + 1


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_dry_run(path, workplace, monkeypatch, capsys) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("training.model.load_base", lambda *a: pytest.fail("a dry run loads no weights"))
    train.main([str(ROOT / path), f"model.name={ROOT / 'assets' / 'tiny'}", "--dry-run"])
    shown = capsys.readouterr().out
    for word in ("learning rate", "vision", "merger", "language", "answer", "memory", "image tokens per picture"):
        assert word in shown, word
