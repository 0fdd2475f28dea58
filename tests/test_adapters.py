"""Adapter folders with more in them than PEFT writes: saved, loaded, damaged, and used in training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from data_prep.answerer import Answerer, ModelError
from data_prep.encode import Encoder
from modeling.adapters import EXTRAS, MENDER, WEIGHTS, load_adapter, load_mender, read_extras, save_extras
from modeling.mender import attach, settings_for
from modeling.token_lora import has_token_lora
from training.config import RecipeError, load_recipe
from training.model import load_base, prepare, unwrap

from .conftest import merged, picture, user
from .pairs_for_tests import pairs_of, written
from .running import same, trainer_of

TINY = Path(__file__).parent.parent / "assets" / "tiny"
RANK = {"rank": 4}
LORA = {"vision": RANK, "merger": RANK, "language": RANK}


@pytest.fixture
def build(recipe_file):
    """A recipe with changes and its model, whose adapter already changes something."""
    def make(*, by_token=True, model=TINY, **changes):
        settings = {"lora": {**LORA, "by_token": by_token}, "model": {"name": str(model)}}
        recipe = load_recipe(recipe_file(**merged(settings, changes)))
        torch.manual_seed(0)
        prepared = prepare(load_base(recipe.model), recipe)
        for name, parameter in prepared.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        return recipe, prepared
    return make


@pytest.fixture
def saved(build, tmp_path):
    """A folder with such an adapter, and what its model answers."""
    def make(*, by_token=True, model=TINY) -> tuple[Path, torch.Tensor]:
        _, made = build(by_token=by_token, model=model)
        folder = tmp_path / f"adapter-{by_token}"
        made.save_pretrained(folder)
        save_extras(made, folder)
        return folder, answers(made)
    return make


def answers(model) -> torch.Tensor:
    """Logits on a picture and a question."""
    encoder = Encoder(unwrap(model).config._name_or_path)
    with torch.no_grad():
        return model.eval()(**encoder.batch([encoder.encode([user("What colour?", 1)], (picture(84, 84),))])).logits


def base() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)


# --- what is written and read --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trainable", (False, True))
def test_saved_and_loaded_answers_are_the_same_to_the_last_bit(saved, trainable):
    folder, before = saved()
    assert json.loads((folder / EXTRAS).read_text()) == {"token_lora": True} and not (folder / MENDER).exists()
    assert sum("lora_A_image" in name for name in load_file(folder / WEIGHTS)) == 7 * len(base().model.language_model.layers)
    loaded = load_adapter(base(), folder, trainable=trainable)
    assert torch.equal(answers(loaded), before)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == ({name for name, _ in loaded.named_parameters() if "lora_" in name} if trainable else set())
    again = folder.with_name("again")
    loaded.save_pretrained(again)
    save_extras(loaded, again)
    assert same(load_file(again / WEIGHTS), load_file(folder / WEIGHTS)) and read_extras(again) == read_extras(folder)
    first, second = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, again))
    assert first == second and first["token_lora"] is True


def test_a_plain_adapter_has_no_extras_and_is_what_peft_loads(saved):
    folder, before = saved(by_token=False)
    assert not (folder / EXTRAS).exists() and "token_lora" not in json.loads((folder / "adapter_config.json").read_text())
    loaded = load_adapter(base(), folder)
    assert torch.equal(answers(loaded), before) and not has_token_lora(loaded)
    assert torch.equal(answers(PeftModel.from_pretrained(base(), folder)), before)


def test_peft_alone_warns_about_a_folder_it_cannot_read_in_full(saved):
    folder, before = saved()
    with pytest.warns(UserWarning, match="token_lora"):
        plain = PeftModel.from_pretrained(base(), folder)
    assert not torch.equal(answers(plain), before)


def test_a_checkpoint_s_weights_for_image_tokens_come_back(saved, build):
    """The trainer resumes by PEFT's own load_adapter, into the adapter that is there already."""
    folder, before = saved()
    _, model = build()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(answers(model), before)


def test_a_mender_is_saved_and_loaded_with_its_settings(saved):
    folder, before = saved()
    made = load_adapter(base(), folder)
    mender = attach(unwrap(made), settings_for(unwrap(made).config, slot_id=5, end_id=6, slots=2, inner=8))
    nn.init.normal_(mender.out.weight)
    save_extras(made, folder)
    assert read_extras(folder) == {"token_lora": True, "mender": mender.settings}

    def with_slots(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor([[8, 9, 5, 5, 10, 11, 12]])).logits

    for trainable in (False, True):
        loaded = load_adapter(base(), folder, trainable=trainable)
        assert torch.equal(with_slots(loaded), with_slots(made)) and torch.equal(answers(loaded), before)
        assert {p.requires_grad for p in unwrap(loaded).mender.parameters()} == {trainable}
    nn.init.zeros_(unwrap(loaded).mender.out.weight)
    assert not torch.equal(with_slots(loaded), with_slots(made))
    load_mender(loaded, folder)
    assert torch.equal(with_slots(loaded), with_slots(made))


def test_a_mender_that_does_not_fit_is_refused(saved):
    folder, _ = saved()
    made = load_adapter(base(), folder)
    mender = attach(unwrap(made), settings_for(unwrap(made).config, slot_id=5, end_id=6, slots=2, inner=8))
    save_extras(made, folder)
    weights = load_file(folder / MENDER)
    save_file({name: weights[name] for name in weights if name != "out.bias"}, folder / MENDER)
    with pytest.raises(ValueError, match=rf"{MENDER}: .*[Mm]issing key.*out.bias"):
        load_adapter(base(), folder)
    save_file({**weights, "out.bias": torch.zeros(1)}, folder / MENDER)
    with pytest.raises(ValueError, match=rf"{MENDER}: .*size mismatch"):
        load_adapter(base(), folder)
    (folder / MENDER).write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=MENDER):
        load_adapter(base(), folder)
    (folder / MENDER).unlink()
    with pytest.raises(ValueError, match=rf"{MENDER}: is missing"):
        load_adapter(base(), folder)
    (folder / EXTRAS).write_text(json.dumps({"token_lora": True, "mender": {**mender.settings, "width": 1}}))
    with pytest.raises(ValueError, match="mender: width"):
        load_adapter(base(), folder)


@pytest.mark.parametrize("text, message", (
    ("{", "cannot be read"),
    ("[]", "a mapping is needed"),
    ('{"token_lora": true, "gate": 1}', "gate: is not known here; a newer version"),
    ('{"token_lora": 1}', "token_lora: must be true or false, not 1"),
    ('{"mender": true}', "mender: must be a mapping, not True"),
    ('{"token_lora": true, "token_lora": false}', "given twice"),
))
def test_extras_are_read_strictly(tmp_path, text, message):
    (tmp_path / EXTRAS).write_text(text)
    with pytest.raises(ValueError, match=f"{EXTRAS}: .*{message}"):
        load_adapter(base(), tmp_path)


def test_halves_of_folders_are_refused(saved, tmp_path):
    folder, _ = saved()
    plain, _ = saved(by_token=False)
    shutil.copy(folder / EXTRAS, plain / EXTRAS)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: has no weights for image tokens, but .*{EXTRAS} says token_lora"):
        load_adapter(base(), plain)
    (folder / EXTRAS).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS}: has weights for image tokens, but .*{EXTRAS} does not say"):
        load_adapter(base(), folder)
    (folder / WEIGHTS).write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=WEIGHTS):
        load_adapter(base(), folder)
    (tmp_path / EXTRAS).write_text('{"token_lora": true}')
    with pytest.raises(ValueError, match="adapter_config.json: is missing"):
        load_adapter(base(), tmp_path)
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_adapter(base(), tmp_path / "nowhere")


# --- who loads them ------------------------------------------------------------------------------------------------------

def test_the_answerer_loads_them(saved):
    folder, before = saved()
    asked = Answerer(str(TINY), str(folder), dtype="float32")
    assert has_token_lora(asked.model) and torch.equal(answers(asked.model), before)
    (folder / EXTRAS).write_text('{"gate": 1}')
    with pytest.raises(ModelError, match="--adapter .*newer version"):
        Answerer(str(TINY), str(folder))


@pytest.mark.parametrize("by_token", (True, False))
def test_training_goes_on_with_the_same_kind_of_adapter_alone(saved, recipe_file, by_token):
    folder, before = saved(by_token=by_token)

    def prepared(wanted: bool):
        recipe = load_recipe(recipe_file(lora={**LORA, "by_token": wanted}, model={"name": str(TINY), "adapter": str(folder)}))
        return prepare(load_base(recipe.model), recipe)

    assert torch.equal(answers(prepared(by_token)), before)
    with pytest.raises(RecipeError, match=f"adapter-{by_token}.*lora.by_token must be {str(by_token).lower()}"):
        prepared(not by_token)


def test_preferences_are_trained_against_a_copy_of_both_kinds_of_weights(saved, recipe_file, twins, tiny):
    """The log-ratios of the first step are exact zeros: the reference has its own weights for image tokens."""
    folder, _ = saved(model=tiny)
    pairs = written(twins, pairs_of(twins, 4), "adapters.jsonl")
    rates = {"lr": {"vision": 0.0, "merger": 0.0, "language": 1e-2}}
    trainer = trainer_of(recipe_file(
        sources={"twins": {"pairs": str(pairs), "rate": 1.0}}, preference={"conditional": 1.0}, steps=2, optim=rates,
        lora={**LORA, "by_token": True}, model={"adapter": str(folder)}))
    model = trainer.model
    begun = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    moved = {name for name, value in begun.items() if not torch.equal(model.get_parameter(name), value)}
    assert any("lora_A_image.ref." in name for name in begun)
    # Nothing but the keys and values of an image token in the last layer reaches an answer.
    idle = {name for name in begun if ".layers.1." in name and "lora_A_image" in name and not any(
        part in name for part in ("k_proj", "v_proj"))}
    assert moved == {name for name in begun if ".default." in name and ".language_model." in name} - idle
