"""Exports: what is in the folders, that they compute what was trained, what their cards say, and what is refused."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from data_prep import pairs
from data_prep.answerer import Answerer
from data_prep.encode import Encoder
from data_prep.problem import read_problems, render, write_problems
from data_prep.provenance import file_sha256, weights_fingerprint
from modeling.adapters import EXTRAS, WEIGHTS
from training import export as exporting
from training.config import Lora, Rank
from training.export import main
from training.licences import ExportError, Source, licence_metadata, licence_warnings, non_commercial, place
from training.merge import tensors, write_merged
from training.model import lora_config

from .conftest import merged as with_changes
from .conftest import picture, user
from .running import run

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
NC = "CC-BY-NC-4.0"


def trained(folder: Path, name: str, base: Path, problems: Path, **changes) -> Path:
    """The run folder of a short training. Its adapter changes every module: after so few steps hardly anything would show."""
    (folder / f"{name}-mixture.yaml").write_text(yaml.safe_dump(
        {"sources": {"mine": {"problems": str(problems), "views": {"vision": 0.5, "both": 0.5}}}}))
    rank = {"rank": 4}
    values = {"name": name, "model": {"name": str(base), "dtype": "float32"}, "data": {"mixture": f"{name}-mixture.yaml"},
              "lora": {"vision": rank, "merger": rank, "language": rank}, "run_dir": str(folder / "runs" / name), "steps": 2,
              "optim": {"lr": {"vision": 1e-3, "merger": 1e-3, "language": 1e-3}}, "batch": 2, "micro_batch": 2,
              "save": {"every": 1}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(with_changes(values, changes)))
    begun = run(path)
    for file in begun.glob(f"**/{WEIGHTS}"):
        strengthen(file)
    return begun


def strengthen(file: Path) -> None:
    """Fill each LoRA B with numbers of a size that matters."""
    torch.manual_seed(0)
    save_file({name: 0.02 * torch.randn(one.shape) if "lora_B" in name else one for name, one in load_file(file).items()}, file)


@pytest.fixture(scope="module")
def mixed(twins) -> Path:
    """The twins, one row in four of them for non-commercial use only."""
    problems = read_problems(twins / "train.jsonl", verify="none")
    write_problems(twins / "mixed.jsonl", [replace(problem, license=problem.license if i % 4 else NC)
                                           for i, problem in enumerate(problems)])
    return twins / "mixed.jsonl"


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, mixed) -> Path:
    """A run on the embedded model with LoRA on all towers, and a checkpoint of each of its two steps."""
    return trained(tmp_path_factory.mktemp("lora"), "mine", TINY, mixed)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, tiny, twins) -> Path:
    return trained(tmp_path_factory.mktemp("small"), "small", tiny, twins / "train.jsonl")


@pytest.fixture
def broken(small_run, tmp_path) -> Path:
    """A copy of a run to be changed."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("error: "), caught.value.code
    return caught.value.code


def exported(run: Path, out: Path, *words) -> Path:
    main([str(run), "--out", str(out), *map(str, words)])
    assert not list(out.parent.glob("*.part")) and not list(out.parent.glob("*.old"))
    return out


def model_of(folder: Path, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **{"dtype": "float32", **options})


def logits(model, encoder: Encoder) -> torch.Tensor:
    """On a picture, a question, and a text alone."""
    rows = [encoder.encode([user("What colour is it?", 1)], (picture(84, 112),)), encoder.encode([user("Which one?")], ())]
    with torch.no_grad():
        return model.eval()(**encoder.batch(rows)).logits


# --- weights -------------------------------------------------------------------------------------------------------------

def test_a_merged_model_is_the_base_with_the_adapter_and_other_weights_only(lora_run, tmp_path):
    out = exported(lora_run, tmp_path / "merged", "--merge")
    encoder = Encoder(TINY)
    before, unmerged = model_of(TINY), PeftModel.from_pretrained(model_of(TINY), lora_run / "adapter")
    base, adapted, found = logits(before, encoder), logits(unmerged, encoder), logits(model_of(out), Encoder(out))
    torch.testing.assert_close(found, adapted, rtol=1e-5, atol=1e-5)
    # Sums in another order differ by a few 1e-6 of logits of 10 and more; in float64 only the merged weights are rounded.
    exact = [logits(model.double(), encoder) for model in (model_of(out), unmerged)]
    torch.testing.assert_close(*exact, rtol=0, atol=1e-5)
    assert (adapted - base).abs().max() > 0.1

    assert tensors(out) == tensors(TINY)        # names, shapes and types of the published layout
    old, new = load_file(TINY / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    adapters = {re.sub(r"^base_model\.model\.model\.(language_model)?", lambda m: "model" if m[1] else "", name)
                .replace(".lora_A", "") for name in load_file(lora_run / "adapter" / WEIGHTS) if "lora_A" in name}
    assert changed == adapters and {name.split(".")[0] for name in changed} == {"model", "visual"}
    assert any(".merger." in name for name in changed)
    copied = {path.name for path in TINY.iterdir()} - {"model.safetensors", "README.md", "build.json"}
    assert {path.name for path in out.iterdir()} == {*copied, "model.safetensors", "README.md"}
    assert all((out / name).read_bytes() == (TINY / name).read_bytes() for name in copied)


def test_plain_peft_loads_an_exported_adapter(lora_run, tmp_path):
    out = exported(lora_run, tmp_path / "adapter")
    loaded, own = (PeftModel.from_pretrained(model_of(TINY), folder) for folder in (out, lora_run / "adapter"))
    assert torch.equal(logits(loaded, Encoder(out)), logits(own, Encoder(TINY)))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(TINY) and config["peft_type"] == "LORA"
    assert not (out / "config.json").exists()       # which would make it a model of its own


def test_the_answerer_loads_both(lora_run, mixed, tmp_path):
    prompts = [render(problem, "vision") for problem in read_problems(mixed)[:4]]
    merged, adapter = exported(lora_run, tmp_path / "merged", "--merge"), exported(lora_run, tmp_path / "adapter")
    found = [Answerer(*words, dtype="float32").likelihoods(prompts) for words in ((str(merged),), (str(TINY), str(adapter)))]
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_weights_are_merged_in_float32_and_cast_once(tmp_path):
    """A bfloat16 base whose head is not tied, and another scale in each tower."""
    config = model_of(TINY).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    ranks = Lora(vision=Rank(2, 6.0), merger=Rank(3, 1.0), language=Rank(4, 16.0))
    adapted = get_peft_model(model_of(tmp_path / "base", dtype="auto"), lora_config(ranks, ("vision", "merger", "language")))
    adapted.save_pretrained(tmp_path / "adapter")
    strengthen(tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

    assert tensors(tmp_path / "out") == tensors(tmp_path / "base") and "lm_head.weight" in tensors(tmp_path / "out")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    lora, seen = load_file(tmp_path / "adapter" / WEIGHTS), 0
    for name, weight in old.items():
        key = f"base_model.model.model.{re.sub('^model', 'language_model', name)}".removesuffix(".weight")
        if f"{key}.lora_A.weight" in lora:
            scale = 1 / 3 if "merger" in name else 3 if name.startswith("visual") else 4
            delta = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"] * scale
            weight, seen = (weight.float() + delta).bfloat16(), seen + 1
        assert torch.equal(new[name], weight), name
    assert 2 * seen == len(lora)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_model_of_all_weights_is_copied_with_or_without_merge(tmp_path, tiny, twins):
    begun = trained(tmp_path, "all", tiny, twins / "train.jsonl", lora=None, steps=1)
    outs = [exported(begun, tmp_path / name, *words) for name, words in (("one", ()), ("two", ("--merge",)))]
    for out in outs:
        assert tensors(out) == tensors(tiny)
        assert torch.equal(logits(model_of(out), Encoder(out)), logits(model_of(begun / "model"), Encoder(tiny)))
        assert (out / "tokenizer_config.json").read_bytes() == (tiny / "tokenizer_config.json").read_bytes()
    assert not torch.equal(logits(model_of(outs[0]), Encoder(tiny)), logits(model_of(tiny), Encoder(tiny)))
    assert "fine-tuned" in card(outs[0]).text and card(outs[0]).data.library_name == "transformers"


def test_a_configuration_names_the_type_of_weights_trained_in_another(tmp_path):
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 4}}')
    exporting._set_dtype(tmp_path / "config.json", "float32")
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "torch_dtype": "float32", "text_config": {"dtype": "float32", "hidden_size": 4}}


def test_bounds_on_pictures_are_those_of_the_training(broken, tiny, tmp_path):
    file = broken / "recipe.yaml"
    file.write_text(file.read_text().replace("max_pixels: null", "max_pixels: 25088"))
    out = exported(broken, tmp_path / "out", "--merge")
    assert Encoder(out).pixel_bounds == {"min": 56 * 56, "max": 25088} != Encoder(tiny).pixel_bounds
    assert "bounds on a picture's size" in card(out).text


def test_a_checkpoint_is_exported(lora_run, tmp_path):
    out = exported(lora_run, tmp_path / "one", "--checkpoint", 1)
    assert (out / WEIGHTS).read_bytes() == (lora_run / "checkpoints" / "checkpoint-1" / WEIGHTS).read_bytes()
    assert "1 of 2 optimizer steps" in card(out).text
    said = refusal(lora_run, "--out", tmp_path / "x", "--checkpoint", 7)
    assert said.endswith("no whole checkpoint 7; whole checkpoints: 1, 2")


# --- cards ---------------------------------------------------------------------------------------------------------------

def test_the_card_says_what_it_is_and_under_which_licences(lora_run, mixed, tmp_path, capsys):
    out = exported(lora_run, tmp_path / "adapter")
    counts = Counter(problem.license for problem in read_problems(mixed))
    assert set(counts) == {NC, "CC0-1.0"}
    said = f"For non-commercial use only: {counts[NC]} rows of mine are under {NC}."
    assert f"warning: {said}" in capsys.readouterr().err
    found, text = card(out).data, card(out).text
    assert (found.license, found.library_name, found.base_model_relation) == (NC.lower(), "peft", "adapter")
    assert set(found.datasets) == {problem.source for problem in read_problems(mixed)} and "lora" in found.tags
    base = place(str(TINY))
    assert found.base_model is None and f"adapter for `{base}`" in text
    assert not any(path in text for path in (f"`{TINY}", str(tmp_path), str(lora_run)))
    assert f"> **{said}**" in text
    for name, count in counts.items():
        assert f"| mine | `mixed.jsonl` | {name} | {count} |" in text
    assert "2 of 2 optimizer steps of 2 conversations, seed 0" in text and "Nothing was measured on this model." in text
    written = yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.S)[1])
    recipe = yaml.safe_load((lora_run / "recipe.yaml").read_text())
    assert written["optim"] == recipe["optim"] and written["model"] == {**recipe["model"], "name": base}
    info = json.loads((lora_run / "run.json").read_text())
    assert all(digest in text for digest in info["data"].values()) and len(info["data"]) == 2
    assert f"torch {info['packages']['torch']}" in text and str(info["commit"] or "not known") in text
    assert "base_model.model." in text and "`--merge`" in text and "different scales" not in text

    merged = exported(lora_run, tmp_path / "merged", "--merge", "--base-name", "Qwen/Qwen2.5-VL-3B-Instruct")
    found = card(merged).data
    assert (found.base_model, found.base_model_relation) == ("Qwen/Qwen2.5-VL-3B-Instruct", "finetune")
    assert (found.license, found.library_name) == (NC.lower(), "transformers")
    assert "cast once to the base's float32" in card(merged).text


def test_scales_that_differ_are_told(broken, tmp_path):
    file = broken / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    first = next(iter(config["alpha_pattern"]))
    file.write_text(json.dumps({**config, "alpha_pattern": {**config["alpha_pattern"], first: 20}}))
    assert "different scales (alpha / rank: 2, 5)" in card(exported(broken, tmp_path / "out")).text


def test_the_base_s_own_licence_goes_along(broken, tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n# Base\n")
    (base / "LICENSE").write_text("Ask first.")
    recipe = (broken / "recipe.yaml").read_text()
    (broken / "recipe.yaml").write_text(recipe.replace(str(tiny), str(base)))
    out = exported(broken, tmp_path / "out", "--merge")
    found = card(out).data
    assert (found.license, found.license_name, found.license_link) == ("other", "qwen-research", "LICENSE")
    assert (out / "LICENSE").read_text() == "Ask first."
    assert "The base model's own licence, qwen-research, holds for this model too." in card(out).text
    (base / "README.md").write_text("---\n- no mapping\n---\n")
    found = card(exported(broken, tmp_path / "out", "--force"))
    assert found.data.license is None and "could not be read here" in found.text


FREE, STRICT, UNNAMED = (Counter({name: 2}) for name in ("MIT", NC, "unknown"))


@pytest.mark.parametrize("base, licences, expected", (
    ({"license": "apache-2.0"}, [FREE], {"license": "apache-2.0"}),
    ({"license_name": "qwen-research", "license_link": "https://x"}, [FREE],
     {"license": "other", "license_name": "qwen-research", "license_link": "https://x"}),
    (None, [FREE], {}),
    ({"license": "apache-2.0"}, [FREE, STRICT], {"license": "cc-by-nc-4.0"}),
    (None, [STRICT], {"license": "cc-by-nc-4.0"}),
    ({"license": "cc-by-nc-4.0"}, [STRICT], {"license": "cc-by-nc-4.0"}),
    ({"license": "other", "license_name": "qwen-research"}, [STRICT],
     {"license": "other", "license_name": "cc-by-nc-4.0-and-qwen-research"}),
    ({"license": "mit"}, [STRICT, Counter({"CC BY-NC-SA 4.0": 1})],
     {"license": "other", "license_name": "cc-by-nc-4.0-and-cc-by-nc-sa-4.0"}),
    ({"license": "mit"}, [Counter({"Research, non-commercial": 1})],
     {"license": "other", "license_name": "research-non-commercial"}),
    ({"license": "mit"}, [FREE, UNNAMED], {"license": "unknown"}),
    ({"license": "mit"}, [None], {"license": "unknown"}),
    ({"license": "mit"}, [None, STRICT], {"license": "cc-by-nc-4.0"}),
))
def test_the_card_s_licence(base, licences, expected):
    sources = [Source("s", "f", one) if one else Source("s", "f", unread="the file is not here") for one in licences]
    found = licence_metadata(ModelCardData(**base) if base else None, sources)
    assert found == expected and ModelCardData(**found).to_dict() == expected


@pytest.mark.parametrize("name", (NC, "cc-by-nc-sa-4.0", "CC_BY_NC 4.0", "noncommercial", "Non-commercial research", "MIT",
                                  "CC-BY-4.0", "OPEN-LICENCE-1", "research use, on request from the owners"))
def test_what_is_non_commercial_is_so_for_pairs_too(name, capsys):
    pairs._say_licences([SimpleNamespace(license=name)])
    assert bool(capsys.readouterr().out) == non_commercial(name)


def test_data_that_changed_or_went_say_nothing(broken, tiny, twins, tmp_path):
    own = shutil.copy(twins / "train.jsonl", tmp_path / "own.jsonl")
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"sources": {"one": {"problems": str(own), "views": {"vision": 1.0}}}}))
    recipe = yaml.safe_load((broken / "recipe.yaml").read_text())
    recipe["data"]["mixture"] = str(mixture)
    (broken / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    info = json.loads((broken / "run.json").read_text())

    def told() -> str:
        (broken / "run.json").write_text(json.dumps(info))
        found = card(exported(broken, tmp_path / "out", "--force"))
        assert found.data.license == "unknown"
        return found.text

    assert "The licences of mixture.yaml are not known: the file has changed since the training." in told()
    info["data"] = {str(mixture): file_sha256(mixture), str(own): "0" * 64}
    assert "The licences of own.jsonl are not known: the file has changed since the training." in told()
    Path(own).unlink()
    assert "The licences of own.jsonl are not known: the file is not here." in told()


def test_an_adapter_trained_on_from_another_is_complete_and_inherits_its_licences(lora_run, twins, mixed, tmp_path):
    changes = {"model": {"adapter": str(lora_run / "adapter")}, "steps": 1}
    begun = trained(tmp_path, "later", TINY, twins / "train.jsonl", **changes)
    out = exported(begun, tmp_path / "out", "--merge")
    alone = PeftModel.from_pretrained(model_of(TINY), begun / "adapter")
    torch.testing.assert_close(logits(model_of(out), Encoder(out)), logits(alone, Encoder(TINY)), rtol=1e-5, atol=1e-5)
    text = card(exported(begun, tmp_path / "adapter")).text
    assert "Complete in itself" in text and "mine (before, in mine)" in text
    assert card(out).data.license == NC.lower()

    strengthened = load_file(begun / "adapter" / WEIGHTS)       # the first one changes: what it was trained on is not known
    first = Path(shutil.copytree(lora_run / "adapter", tmp_path / "first"))
    recipe = yaml.safe_load((begun / "recipe.yaml").read_text())
    recipe["model"]["adapter"] = str(first)
    (begun / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    info = json.loads((begun / "run.json").read_text())
    info["data"][str(first)] = weights_fingerprint(first)
    (begun / "run.json").write_text(json.dumps(info))
    assert "the adapter's run folder is not here" in card(exported(begun, tmp_path / "b")).text
    save_file(strengthened, first / WEIGHTS)
    assert "the adapter has changed since the training" in card(exported(begun, tmp_path / "c")).text
    shutil.rmtree(first)
    found = card(exported(begun, tmp_path / "d"))
    assert "the adapter is not here" in found.text and found.data.license == "unknown"


# --- results -------------------------------------------------------------------------------------------------------------

def measure(vision: float) -> dict:
    views = {view: {"value": value, "low": value - 0.02, "high": value + 0.02} for view, value in
             (("both", 0.9), ("vision", vision), ("blind", 0.3))}
    gap = {"gap": 0.9 - vision, "low": 0.88 - vision, "high": 0.92 - vision}
    return {"n": 40, "n_groups": 20, "n_seeds": 1, "chance": 0.25, "views": views, "gap": gap}


CHANGE = {"views": {"vision": {"change": 0.3, "low": 0.2, "high": 0.4}, "both": {"change": -0.001, "low": None, "high": None}},
          "gap": {"change": -0.3, "low": -0.4, "high": -0.2}, "verdict": {"word": "closed well", "reason": "vision rose"}}


def gap_file(path: Path, **after) -> Path:
    """What eval.gap writes, of one task."""
    values = {"before": {"name": "base", "runs": [{"model": "base", "adapter": None, "adapter_sha256": None}]},
              "after": {"name": "mine", "runs": [{"model": "base", "adapter": "runs/x/adapter", **after}]},
              "tasks": {"twins": {"before": measure(0.5), "after": measure(0.8), "change": CHANGE}}}
    path.write_text(json.dumps(values))
    return path


def test_results_of_these_weights_are_in_the_card(small_run, tmp_path):
    file = gap_file(tmp_path / "gap.json", adapter_sha256=weights_fingerprint(small_run / "adapter"))
    text = card(exported(small_run, tmp_path / "a", "--results", file)).text
    assert "### twins: from base to mine" in text and "Nothing was measured" not in text
    assert "| accuracy, vision | 50.0 [48.0, 52.0] | 80.0 [78.0, 82.0] | +30.0 [+20.0, +40.0] |" in text
    assert "| accuracy, both | 90.0 [88.0, 92.0] | 90.0 [88.0, 92.0] | -0.1 |" in text
    assert "| accuracy, blind | 30.0 [28.0, 32.0] | 30.0 [28.0, 32.0] | - |" in text
    assert "| gap (both - vision) | +40.0 [+38.0, +42.0] | +10.0 [+8.0, +12.0] | -30.0 [-40.0, -20.0] |" in text
    assert "40 items in 20 groups, chance 25.0; closed well (vision rose)." in text

    other = gap_file(tmp_path / "other.json", adapter_sha256="0" * 64)
    said = refusal(small_run, "--out", tmp_path / "b", "--results", other)
    assert "other.json: was measured on runs/x/adapter, not on the weights that are exported" in said
    again = gap_file(tmp_path / "again.json", adapter=str(tmp_path / "a"), adapter_sha256="0" * 64)
    exported(small_run, tmp_path / "a", "--results", again, "--force")      # the exported folder itself was measured
    other.write_text('{"before": {}}')
    assert "is not what eval.gap writes" in refusal(small_run, "--out", tmp_path / "b", "--results", other)
    assert "no such file" in refusal(small_run, "--out", tmp_path / "b", "--results", tmp_path / "none.json")


def test_results_of_a_summary(small_run, tmp_path):
    file = tmp_path / "summary.json"

    def write(**seed) -> None:
        seeds = [{"model": "base", "recipe": "small", "adapter_sha256": digit * 64, **seed} for digit in "12"]
        file.write_text(json.dumps({
            "runs": [{"name": "base", "seeds": [{"model": "base", "recipe": None}]}, {"name": "mine", "seeds": seeds}],
            "tasks": {"twins": {"runs": {"base": measure(0.5), "mine": measure(0.8)},
                                "changes": [{"before": "base", "after": "mine", **CHANGE}]}}}))

    words = ("--summary", file, "--run", "mine", "--force")
    write()
    text = card(exported(small_run, tmp_path / "a", *words)).text
    assert "Measured on 2 trainings of this recipe, **not on these weights**" in text
    assert "| gap (both - vision) | +40.0 [+38.0, +42.0] | +10.0 [+8.0, +12.0] | -30.0 [-40.0, -20.0] |" in text
    write(adapter_sha256=weights_fingerprint(small_run / "adapter"))
    text = card(exported(small_run, tmp_path / "a", *words)).text
    assert "means over 2 training seeds, of which this model is one" in text and "not on these" not in text
    write(recipe="another")
    said = refusal(small_run, "--out", tmp_path / "a", *words)
    assert "mine is neither the model that is exported nor one of its recipe, small" in said
    assert "no run is called none; there are base, mine" in refusal(
        small_run, "--out", tmp_path / "b", "--summary", file, "--run", "none")


# --- what is refused -----------------------------------------------------------------------------------------------------

def test_an_unfinished_run_is_refused_and_its_checkpoints_are_not(broken, tmp_path):
    info = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps(
        {**info, "finished": False, "command": ["train.py", "small.yaml", "run_dir=a b", "--resume"]}))
    said = refusal(broken, "--out", tmp_path / "x")
    assert "is not finished; continue it with python train.py small.yaml 'run_dir=a b' --resume, or export a checkpoint with " \
           "--checkpoint N (whole checkpoints: 1, 2)" in said
    (broken / "checkpoints" / "checkpoint-2" / "complete").unlink()
    assert refusal(broken, "--out", tmp_path / "x", "--checkpoint", 2).endswith("whole checkpoints: 1")
    exported(broken, tmp_path / "x", "--checkpoint", 1)


def test_what_is_no_whole_run_is_refused(broken, tmp_path):
    assert "holds no recipe.yaml; a run folder of train.py is needed" in refusal(tmp_path, "--out", tmp_path / "x")
    (broken / "adapter" / WEIGHTS).unlink()
    assert f"{WEIGHTS}: is missing" in refusal(broken, "--out", tmp_path / "x")
    recipe = (broken / "recipe.yaml").read_text()
    (broken / "recipe.yaml").write_text(recipe.replace("\nsteps:", "\nstep:"))
    assert "recipe.yaml: step: no such key; did you mean 'steps'?" in refusal(broken, "--out", tmp_path / "x")
    (broken / "run.json").write_text("{")
    assert "run.json: cannot be read" in refusal(broken, "--out", tmp_path / "x")


@pytest.mark.parametrize("extras, why", (
    ({"token_lora": True}, "its language tower is adapted by token type"),
    ({"mender": {"slots": 2}}, "it adds modules to the model, which have no place in the base's weights"),
))
def test_adapters_that_are_more_than_peft_are_copied_and_not_merged(broken, tmp_path, extras, why):
    (broken / "adapter" / EXTRAS).write_text(json.dumps(extras))
    assert f"cannot be merged: {why}" in refusal(broken, "--out", tmp_path / "x", "--merge")
    assert not (tmp_path / "x").exists()
    out = exported(broken, tmp_path / "x")
    assert json.loads((out / EXTRAS).read_text()) == extras
    assert "**Plain PEFT is not enough**" in card(out).text and "Answerer(" in card(out).text
    assert "PeftModel" not in card(out).text
    (broken / "adapter" / EXTRAS).write_text('{"gate": 1}')
    assert "gate: is not known here; a newer version" in refusal(broken, "--out", tmp_path / "y")


def test_an_adapter_by_token_type_is_loaded_from_its_export(tmp_path, tiny, twins):
    begun = trained(tmp_path, "token", tiny, twins / "train.jsonl", lora={"by_token": True}, steps=1)
    assert "cannot be merged" in refusal(begun, "--out", tmp_path / "x", "--merge")
    out = exported(begun, tmp_path / "x")
    encoder = Encoder(tiny)
    found, own = (logits(Answerer(str(tiny), str(folder), dtype="float32").model, encoder)
                  for folder in (out, begun / "adapter"))
    assert torch.equal(found, own)


def test_an_adapter_that_is_not_of_this_model_or_does_nothing_is_not_merged(broken, tmp_path):
    file = broken / "adapter" / WEIGHTS
    weights = load_file(file)
    save_file({name.replace("language_model.layers.0", "language_model.layers.9"): one for name, one in weights.items()}, file)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        said = refusal(broken, "--out", tmp_path / "x", "--merge")
    assert "28 of its weights do not belong to this model, such as base_model." in said
    save_file({name: torch.zeros_like(one) if "lora_B" in name else one for name, one in weights.items()}, file)
    assert "no LoRA weight of it changes the model" in refusal(broken, "--out", tmp_path / "x", "--merge")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_there_is_not_overwritten(small_run, tiny, tmp_path):
    out = exported(small_run, tmp_path / "out")
    assert "exists already; --force replaces it" in refusal(small_run, "--out", out)
    exported(small_run, out, "--merge", "--force")
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    assert "is no exported folder, and is not replaced" in refusal(small_run, "--out", other, "--force")
    for needed in (small_run, small_run / "adapter", small_run.parent, tiny):
        assert "which is exported or needed for it" in refusal(small_run, "--out", needed, "--force")
    assert (small_run / "adapter" / WEIGHTS).is_file() and (other / "thesis.txt").is_file()


def test_an_export_that_fails_leaves_what_was_there(small_run, tmp_path, monkeypatch):
    out = exported(small_run, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fails(*_):
        raise ExportError("no card today")

    monkeypatch.setattr(exporting, "card_of", fails)
    assert refusal(small_run, "--out", out, "--merge", "--force") == "error: no card today"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("words", (
    ("--summary", "s.json"), ("--run", "x"), ("--public",), ("--results", "a", "--summary", "b", "--run", "c"),
    ("--push-to-hub", "not a name"), ("--base-name", "a/b/c"), ("--checkpoint", "last"),
))
def test_options_that_do_not_fit(words, small_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(small_run), "--out", str(tmp_path / "x"), *words])
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err


# --- the hub -------------------------------------------------------------------------------------------------------------

class Hub:
    """Stands for HfApi: what was asked of it, and one repository."""

    def __init__(self, private: bool | None = None, error: Exception | None = None) -> None:
        self.private, self.error, self.asked = private, error, []

    def create_repo(self, repo, *, private, exist_ok):
        self.asked.append(("create", repo, private))
        if self.private is None:
            self.private = private
        assert exist_ok

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        self.asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_pushing_is_private_unless_public_is_asked_for(small_run, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(exporting, "HfApi", lambda: hub)
    out = exported(small_run, tmp_path / "a", "--push-to-hub", "me/mine")
    assert hub.asked == [("create", "me/mine", True), ("upload", "me/mine", sorted(path.name for path in out.iterdir()))]
    assert '"me/mine"' in card(out).text

    hub = Hub(private=False)
    said = refusal(small_run, "--out", tmp_path / "b", "--push-to-hub", "me/mine")
    assert said == "error: --push-to-hub me/mine: is public already; --public uploads to it" and len(hub.asked) == 1
    assert (tmp_path / "b" / "README.md").is_file()
    exported(small_run, tmp_path / "c", "--push-to-hub", "me/mine", "--public")
    assert [one[0] for one in hub.asked] == ["create", "create", "upload"] and hub.asked[1][2] is False
    hub = Hub(error=ConnectionError("no way\nout"))
    assert refusal(small_run, "--out", tmp_path / "d", "--push-to-hub", "me/mine") == "error: --push-to-hub me/mine: no way out"


def test_warnings_name_what_is_open():
    sources = [Source("a", "a.jsonl", Counter({"unknown": 3, "MIT": 1})), Source("b", "b.jsonl", unread="the file is not here")]
    assert licence_warnings(sources) == ["The authors of a name no licence for 3 rows; ask them what is allowed.",
                                         "The licences of b.jsonl are not known: the file is not here."]
