"""Towers: which parameters each holds, what LoRA touches, and what freezes."""

import re
from collections import Counter

import pytest
import torch

from training.config import TOWERS, Lora, Rank, RecipeError, load_recipe
from training.model import (
    count_parameters,
    empty_base,
    load_base,
    lora_config,
    parameter_groups,
    prepare,
    tower_of,
    tower_table,
    unwrap,
)

from .conftest import assistant, merged, picture, user

LEAVES = {
    "vision": {"qkv", "proj", "gate_proj", "up_proj", "down_proj"},
    "merger": {"0", "2"},
    "language": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}


def lora(vision: int, merger: int, language: int) -> dict:
    return {"vision": {"rank": vision}, "merger": {"rank": merger}, "language": {"rank": language}}


def rates(vision: float, merger: float, language: float) -> dict:
    return {"lr": {"vision": vision, "merger": merger, "language": language}}


@pytest.fixture
def build(recipe_file):
    """A recipe with changes, and the model made ready for it."""

    def make(**changes):
        recipe = load_recipe(recipe_file(**changes))
        torch.manual_seed(0)
        return recipe, prepare(load_base(recipe.model), recipe)

    return make


def adapters(model) -> dict[str, int]:
    """Adapted module's name -> rank of its adapter."""
    return {
        name.removesuffix(".lora_A.default").removeprefix("base_model.model."): module.weight.shape[0]
        for name, module in model.named_modules()
        if name.endswith(".lora_A.default")
    }


def test_every_parameter_is_in_exactly_one_tower(build):
    recipe, model = build()
    base = unwrap(model)
    of = {id(parameter): tower_of(name) for name, parameter in model.named_parameters()}
    visual = base.model.visual
    merger = {id(p) for p in visual.merger.parameters()}
    vision = {id(p) for p in visual.parameters()} - merger
    language = {id(p) for p in base.model.language_model.parameters()} | {id(p) for p in base.lm_head.parameters()}
    assert {tower: {i for i, t in of.items() if t == tower} for tower in TOWERS} == {
        "vision": vision,
        "merger": merger,
        "language": language,
    }
    counts = count_parameters(model)
    assert sum(numbers["total"] for numbers in counts.values()) == sum(p.numel() for p in model.parameters())
    grouped = [id(p) for group in parameter_groups(model, recipe) for p in group["params"]]
    assert Counter(grouped) == Counter(id(p) for p in model.parameters() if p.requires_grad)
    assert all(of[id(p)] == group["tower"] for group in parameter_groups(model, recipe) for p in group["params"])


@pytest.mark.parametrize("ranks", ((2, 3, 4), (0, 3, 0), (5, 0, 0), (0, 0, 6), (0, 2, 4)))
def test_lora_hits_what_it_names_with_its_rank(build, ranks):
    _, model = build(lora=lora(*ranks))
    hit = adapters(model)
    linear = {
        name
        for name, module in unwrap(model).named_modules()
        if isinstance(module, torch.nn.Linear) and "lora" not in name
    }
    for tower, rank in zip(TOWERS, ranks):
        mine = {name: r for name, r in hit.items() if tower_of(name) == tower}
        expected = {
            name.removesuffix(".base_layer") for name in linear if tower_of(name) == tower and "lm_head" not in name
        }
        assert set(mine) == (expected if rank else set())
        assert set(mine.values()) <= {rank}
        assert {name.rpartition(".")[2] for name in mine} == (LEAVES[tower] if rank else set())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)


def test_the_patch_embedding_is_never_adapted(build):
    """Its Conv3d is called `proj`, as the linear layers of the blocks are."""
    _, model = build(lora=lora(2, 2, 2))
    assert isinstance(unwrap(model).model.visual.patch_embed.proj, torch.nn.Conv3d)
    assert not any("patch_embed" in name for name in adapters(model))


def test_alpha_per_tower(build):
    _, model = build(lora=merged(lora(2, 3, 4), {"merger": {"alpha": 9}, "language": {"alpha": 0.5}}))
    scaling = {
        tower_of(name): module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    assert scaling == {"vision": 2, "merger": 3, "language": 0.125}


def test_patterns_name_the_modules_of_the_big_model_too():
    """Names of the released 3B checkpoint's classes, not of the small one alone."""
    config = lora_config(Lora(Rank(2), Rank(3), Rank(4)), TOWERS)
    hits = {
        "model.visual.blocks.31.attn.qkv": True,
        "model.visual.blocks.0.mlp.down_proj": True,
        "model.visual.merger.mlp.2": True,
        "model.language_model.layers.35.self_attn.k_proj": True,
        "model.visual.patch_embed.proj": False,
        "lm_head": False,
        "model.visual.merger.ln_q": False,
        "model.visual.merger.mlp.1": False,
        "model.language_model.embed_tokens": False,
        "model.language_model.layers.35.mlp": False,
    }
    assert {name: bool(re.fullmatch(config.target_modules, name)) for name in hits} == hits


@pytest.mark.parametrize("frozen", TOWERS)
@pytest.mark.parametrize("by", ("rank", "rate", "rate of all weights"))
def test_rank_0_and_rate_0_freeze(build, frozen, by):
    ranks, lr = lora(2, 2, 2), rates(0.1, 0.1, 0.1)
    if by == "rank":
        ranks[frozen]["rank"] = 0
    else:
        lr["lr"][frozen] = 0
    _, model = build(lora=None if by == "rate of all weights" else ranks, optim=lr)
    trained = {tower for tower, numbers in count_parameters(model).items() if numbers["trained"]}
    assert trained == set(TOWERS) - {frozen}
    if by == "rate of all weights":
        assert all(p.requires_grad == (tower_of(name) != frozen) for name, p in model.named_parameters())


def test_weight_decay_spares_vectors(build):
    recipe, model = build(lora=None, optim={"weight_decay": 0.1})
    for group in parameter_groups(model, recipe):
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_a_model_of_another_kind_is_refused(recipe_file, tmp_path):
    from transformers import Qwen2Config

    Qwen2Config().save_pretrained(tmp_path / "other")
    recipe = load_recipe(recipe_file(model={"name": str(tmp_path / "other")}))
    for load in (load_base, empty_base):
        with pytest.raises(RecipeError, match="qwen2_5_vl is needed"):
            load(recipe.model)


def test_attention_that_is_not_installed_is_refused(recipe_file):
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash attention is installed")
    with pytest.raises(RecipeError, match="model.attention: .*FlashAttention2"):
        load_base(load_recipe(recipe_file(model={"attention": "flash_attention_2"})).model)


def test_an_empty_base_counts_as_the_loaded_one(build):
    recipe, model = build(lora=lora(2, 3, 4))
    empty = prepare(empty_base(recipe.model), recipe)
    assert count_parameters(empty) == count_parameters(model)
    assert all(p.is_meta for p in unwrap(empty).model.language_model.embed_tokens.parameters())


def test_tower_table(build):
    recipe, model = build(lora=lora(0, 3, 4), optim=rates(1e-3, 2e-3, 3e-5))
    cells = list(zip(*(column.cells for column in tower_table(model, recipe).columns)))
    trained = count_parameters(model)
    assert [row[0] for row in cells] == list(TOWERS)
    assert cells[0][2:] == ("0", "-", "frozen", "-")
    assert cells[1][2:] == (f"{trained['merger']['trained']:,}", "2", "3", "0.002")
    assert cells[2][3:] == ("14", "4", "3e-05")
    base = count_parameters(load_base(recipe.model))
    assert [row[1] for row in cells] == [f"{base[tower]['total']:,}" for tower in TOWERS]


class Backward:
    """Counts backward passes through modules."""

    def __init__(self, *modules) -> None:
        self.calls = 0
        for module in modules:
            module.register_full_backward_hook(self.count)

    def count(self, *_) -> None:
        self.calls += 1


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("merger", (0, 3))
def test_a_frozen_vision_tower_costs_no_backward_and_changes_no_gradient(
    build, encoder, monkeypatch, checkpointing, merger
):
    batch = encoder.batch([encoder.encode([user("What?", 1), assistant("red")], (picture(84, 84),))])
    batch["labels"] = batch["input_ids"].clone()

    def gradients(freeze: bool) -> tuple[dict, int]:
        if not freeze:
            monkeypatch.setattr("training.model.freeze_vision", lambda *args, **kwargs: None)
        _, model = build(lora=lora(0, merger, 4))
        monkeypatch.undo()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=generator, std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        counter = Backward(*unwrap(model).model.visual.blocks)
        model(**batch).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, counter.calls

    frozen, calls = gradients(True)
    stock, stock_calls = gradients(False)
    assert calls == 0
    assert not checkpointing or stock_calls > 0, "the trap this guards against is gone; freeze_vision may go too"
    assert set(frozen) == set(stock) and all(torch.equal(frozen[name], stock[name]) for name in stock)
    assert all(gradient.abs().sum() > 0 for gradient in frozen.values())


def test_freezing_the_vision_tower_changes_no_logits(build, encoder):
    batch = encoder.batch([encoder.encode([user("What?", 1)], (picture(84, 84),))])
    recipe, model = build(lora=lora(0, 0, 4))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, load_base(recipe.model)(**batch).logits, rtol=0, atol=0)
