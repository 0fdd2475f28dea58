"""LoRA by token type: by hand, against PEFT's, and through checkpointing, caches, second adapters and optimizer groups."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from modeling.token_lora import TokenLinear, TokenLoraConfig, TokenTypes, connect, has_token_lora, modality_of
from training.config import RecipeError, load_recipe
from training.model import add_answer_logits, load_base, parameter_groups, prepare, tower_table, unwrap
from training.preference_trainer import as_reference

from .conftest import assistant, merged, picture, user

RANKS = {"vision": {"rank": 2}, "merger": {"rank": 3}, "language": {"rank": 4}}


@pytest.fixture
def build(recipe_file):
    """A recipe by token type with changes, and the model made ready for it; `noise` takes B away from 0."""
    def make(*, noise=0.0, by_token=True, **changes):
        recipe = load_recipe(recipe_file(**merged({"lora": {**RANKS, "by_token": by_token}}, changes)))
        torch.manual_seed(0)
        model = prepare(load_base(recipe.model), recipe)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name and noise:
                parameter.data.normal_(generator=generator, std=noise)
        return recipe, model
    return make


@pytest.fixture(scope="session")
def batch(encoder):
    """Two rows: a picture of 9 image tokens and words; words alone."""
    batch = encoder.batch([encoder.encode([user("What?", 1), assistant("red")], (picture(84, 84),)),
                           encoder.encode([user("Is it?"), assistant("no")])])
    assert (batch["input_ids"] == encoder.image_id).sum(1).tolist() == [9, 0]
    return {**batch, "labels": batch["input_ids"].clone()}


@pytest.fixture(scope="session")
def words(encoder):
    batch = encoder.batch([encoder.encode([user("Is 12 > 3?"), assistant("yes")])])
    return {**batch, "labels": batch["input_ids"].clone()}


def language(model, kind: str) -> dict[str, torch.Tensor]:
    """Parameters of the language tower of one kind: lora_A, lora_A_image, lora_B."""
    return {name: p for name, p in model.named_parameters() if f".{kind}.default." in name and ".language_model." in name}


def gradients(model, *batches) -> dict[str, torch.Tensor]:
    """Of the summed losses, every forward pass before the first backward pass."""
    model.zero_grad(set_to_none=True)
    sum(model(**batch).loss for batch in batches).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- one layer -----------------------------------------------------------------------------------------------------------

def layer(r: int = 1, alpha: int = 2, **settings) -> TokenLinear:
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return TokenLinear(base, "default", config=LoraConfig(**settings), r=r, lora_alpha=alpha, target_name="there")


def test_forward_by_hand():
    """Scaling 2, x = (3, 5). Text: A x = 3, twice B 3 = (6, -6). Image: A x = 10, twice B 10 = (20, -20)."""
    made = layer()
    made.lora_A["default"].weight.data = torch.tensor([[1.0, 0.0]])
    made.lora_A_image["default"].weight.data = torch.tensor([[0.0, 2.0]])
    made.lora_B["default"].weight.data = torch.tensor([[1.0], [-1.0]])
    made.token_types = TokenTypes()
    made.token_types.image = torch.tensor([[False, True]])
    x = torch.tensor([[[3.0, 5.0], [3.0, 5.0]]])
    assert made(x).tolist() == [[[9.0, -1.0], [23.0, -15.0]]]
    made.enable_adapters(False)
    assert torch.equal(made(x), x)


def test_what_a_layer_refuses():
    made, x = layer(), torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="types of the tokens are not known.*input_ids"):
        made(x)
    made.token_types = TokenTypes()
    made.token_types.image = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"known for \(1, 3\) tokens, but there are \(1, 2\)"):
        made(x)
    with pytest.raises(ValueError, match="adapter_names"):
        made(x, adapter_names=["default"])
    for merge in (made.merge, lambda: made.get_delta_weight("default")):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(made.base_layer.weight, torch.eye(2)) and not made.merged
    for settings in ({"use_dora": True}, {"init_lora_weights": "gaussian"}):
        with pytest.raises(ValueError, match="no variants"):
            layer(**settings)


def test_initial_weights_are_like_peft_s_and_touch_no_generator():
    torch.manual_seed(3)
    by_token, after = layer(r=64), torch.rand(1)
    torch.manual_seed(3)
    again = layer(r=64)
    torch.manual_seed(3)
    base = nn.Linear(2, 2, bias=False)
    plain = Linear(base, "default", config=LoraConfig(), r=64, lora_alpha=2)
    assert torch.equal(torch.rand(1), after) and torch.equal(plain.lora_A["default"].weight, by_token.lora_A["default"].weight)
    image, text = by_token.lora_A_image["default"].weight, by_token.lora_A["default"].weight
    assert torch.equal(image, again.lora_A_image["default"].weight) and not torch.equal(image, text)
    bound = 1 / 2**0.5          # kaiming_uniform with a = sqrt(5): 1 / sqrt(width)
    for weight in (image, text):
        assert 0.9 * bound < weight.abs().max() < bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    torch.manual_seed(4)
    assert not torch.equal(image, layer(r=64).lora_A_image["default"].weight)


# --- the model -----------------------------------------------------------------------------------------------------------

def test_a_fresh_adapter_is_the_base_and_the_rest_starts_as_without(build, batch):
    recipe, model = build()
    _, plain = build(by_token=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, load_base(recipe.model)(**batch).logits)
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    extra = set(ours) - set(theirs)
    assert set(theirs) <= set(ours) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert extra == set(language(model, "lora_A_image")) and len(extra) == 14
    assert all(ours[name].requires_grad for name in extra)
    images = list(language(model, "lora_A_image").values())
    assert all(not torch.equal(images[0], other) for other in images[1:] if other.shape == images[0].shape)


def test_only_the_language_tower_is_by_token_type(build):
    _, model = build()
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, Linear)}
    assert {kind for name, kind in kinds.items() if ".visual." in name} == {Linear}
    assert {kind for name, kind in kinds.items() if ".language_model." in name} == {TokenLinear}


def test_each_a_learns_from_its_own_tokens_alone(build, batch, words):
    _, model = build(noise=0.1)
    found = gradients(model, words)
    assert all(not found[name].any() for name in language(model, "lora_A_image"))
    assert all(found[name].any() for kind in ("lora_A", "lora_B") for name in language(model, kind))
    found = gradients(model, batch)
    assert all(found[name].any() for kind in ("lora_A", "lora_A_image", "lora_B") for name in language(model, kind))
    # The last layer's feed-forward of a token reaches no other: with labels on one type, only that type's A learns there.
    last = [name for name in found if ".layers.1.mlp." in name]
    image = batch["input_ids"] == unwrap(model).config.image_token_id
    for kind, other, labelled in (("lora_A_image", "lora_A", image), ("lora_A", "lora_A_image", ~image)):
        predicts = torch.zeros_like(image)
        predicts[:, 1:] = labelled[:, :-1]          # a token's logits are for the next one's label
        found = gradients(model, {**batch, "labels": batch["labels"].masked_fill(~predicts, -100)})
        assert all(found[name].any() for name in last if f".{kind}." in name)
        assert all(not found[name].any() for name in last if f".{other}." in name)


def test_equal_as_are_plain_lora(build, batch):
    _, model = build(noise=0.1)
    _, plain = build(noise=0.1, by_token=False)
    for name, parameter in language(model, "lora_A_image").items():
        parameter.data.copy_(model.get_parameter(name.replace("lora_A_image", "lora_A")).data)
    ours, theirs = gradients(model, batch), gradients(plain, batch)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    for name, gradient in theirs.items():
        image = name.replace("lora_A.", "lora_A_image.")
        both = ours[name] + ours[image] if image != name and image in ours else ours[name]
        torch.testing.assert_close(both, gradient, rtol=1e-4, atol=1e-5)
    for parameter in language(model, "lora_A_image").values():
        parameter.data.neg_()
    with torch.no_grad():
        difference = (model(**batch).logits - plain(**batch).logits).abs().amax(-1)
    assert difference[0].max() > 1e-3 and difference[1].max() < 1e-4, "only the row with the picture changes"


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_recomputes_with_the_tokens_of_its_own_pass(build, batch, words, reentrant):
    """Two forward passes are alive at once, with other shapes and with the same shape and other types."""
    _, model = build(noise=0.1)
    as_words = batch["input_ids"][:1].clone()
    as_words[as_words == unwrap(model).config.image_token_id] = words["input_ids"][0, 0]
    same_shape = {"input_ids": as_words, "attention_mask": batch["attention_mask"][:1], "labels": as_words}
    with_picture = {**batch, **{key: batch[key][:1] for key in same_shape}, "mm_token_type_ids": batch["mm_token_type_ids"][:1]}
    views = (batch, words, with_picture, same_shape)
    model.train()
    stock = gradients(model, *views)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = count_runs(unwrap(model).model.language_model.layers[0].self_attn)
    found = gradients(model, *views)
    assert len(runs) == 2 * len(views), "nothing was recomputed"
    assert set(found) == set(stock)
    for name, gradient in stock.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def count_runs(module: nn.Module) -> list:
    runs = []
    module.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_generation_with_a_cache_is_generation_without(build, encoder):
    _, model = build(noise=0.3)
    batch = encoder.batch([encoder.encode([user("What?", 1)], (picture(84, 84),), generate=True),
                           encoder.encode([user("Is it?")], generate=True)], side="left")
    said = [model.eval().generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cache, eos_token_id=-1,
                                  pad_token_id=encoder.pad_id, output_logits=True, return_dict_in_generate=True)
            for cache in (True, False)]
    assert torch.equal(said[0].sequences, said[1].sequences)
    for with_cache, without in zip(said[0].logits, said[1].logits):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        base = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=encoder.pad_id)
    assert not torch.equal(base, said[0].sequences), "the adapter changes nothing, so nothing was compared"


def test_embeddings_without_ids_are_refused_unless_the_adapter_is_off(build, words):
    _, model = build(noise=0.1)
    embeddings = unwrap(model).get_input_embeddings()(words["input_ids"])
    with torch.no_grad():
        model(**words)          # leaves nothing behind that the next pass could take for its own
        with pytest.raises(ValueError, match="input_ids, not with inputs_embeds alone"):
            model(inputs_embeds=embeddings, attention_mask=words["attention_mask"])
        with pytest.raises(ValueError, match="are not known"):
            unwrap(model).model.language_model(inputs_embeds=embeddings)
        with model.disable_adapter():
            model(inputs_embeds=embeddings, attention_mask=words["attention_mask"])


def test_merging_is_refused_before_anything_changes(build, batch):
    _, model = build(noise=0.1)
    with torch.no_grad():
        before = model(**batch).logits
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        assert torch.equal(model(**batch).logits, before)
        assert not any(module.merged for module in model.modules() if isinstance(module, Linear))


def test_a_second_adapter_has_its_own_weights_for_image_tokens(build, batch):
    """As TRL's DPOTrainer makes its reference: a copy of every weight of `default` called `ref`."""
    recipe, model = build(noise=0.1)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    with torch.no_grad():
        first = model(**batch).logits
        for parameter in language(model, "lora_A_image").values():
            parameter.data.neg_()
        changed = model(**batch).logits
        with as_reference(model):
            assert model.active_adapter == "ref" and torch.equal(model(**batch).logits, first)
        assert torch.equal(model(**batch).logits, changed) and not torch.equal(changed[0], first[0])
        model.delete_adapter("ref")
        assert not any(".ref." in name for name, _ in model.named_parameters())
        with as_reference(model):
            assert torch.equal(model(**batch).logits, load_base(recipe.model)(**batch).logits)
        assert torch.equal(model(**batch).logits, changed)


def test_a_copy_of_the_model_is_a_model_of_its_own(build, batch):
    _, model = build(noise=0.1)
    other = copy.deepcopy(model)
    layers = [unwrap(one).model.language_model.layers[0] for one in (model, other)]
    assert layers[1].self_attn.token_types is layers[1].mlp.up_proj.token_types is not layers[0].self_attn.token_types
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_answer_logits_carry_what_they_are_made_of(build, batch):
    _, model = build(noise=0.1)
    add_answer_logits(unwrap(model))
    labels = batch["labels"].clone()
    labels[:, :-3] = -100
    out = model(**{**batch, "labels": labels}, answer_logits=True)
    (hidden,) = out.hidden_states
    assert hidden.shape == (int((labels[:, 1:] != -100).sum()), 32)
    assert torch.equal(unwrap(model).lm_head(hidden), out.logits)


def test_video_tokens_are_image_tokens(build, words):
    _, model = build(noise=0.1)
    seen = []
    attention = unwrap(model).model.language_model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: seen.append(attention.token_types.image))
    ids = words["input_ids"].clone()
    ids[0, 2], ids[0, 4] = unwrap(model).config.video_token_id, unwrap(model).config.image_token_id
    with torch.no_grad():
        model(input_ids=ids)
    assert seen[0][0].nonzero()[:, 0].tolist() == [2, 4]


# --- recipes and groups --------------------------------------------------------------------------------------------------

def test_modality_of():
    prefix = "base_model.model.model."
    cases = {
        f"{prefix}visual.blocks.0.attn.qkv.lora_A.default.weight": ("image", "image"),
        f"{prefix}visual.merger.mlp.0.lora_B.default.weight": ("image", "image"),
        f"{prefix}language_model.layers.0.mlp.up_proj.lora_A.default.weight": ("text", "text"),
        f"{prefix}language_model.layers.0.mlp.up_proj.lora_A_image.default.weight": ("image", "image"),
        f"{prefix}language_model.layers.0.mlp.up_proj.lora_B.default.weight": ("text", "shared"),
        "model.visual.patch_embed.proj.weight": ("image", "image"),
        "lm_head.weight": ("text", "shared"),
        "base_model.model.mender.proxy.weight": ("shared", "shared"),
    }
    assert {name: (modality_of(name, False), modality_of(name, True)) for name in cases} == cases


def kinds(groups: list[dict]) -> list[tuple]:
    return [(group["tower"], group["modality"], group["lr"], group["weight_decay"]) for group in groups]


def test_groups_by_token_type(build):
    rates = {"optim": {"lr": {"vision": 1e-3, "merger": 2e-3, "language": 3e-3}, "weight_decay": 0.1}}
    recipe, model = build(**rates)
    groups = parameter_groups(model, recipe)
    assert kinds(groups) == [("vision", "image", 1e-3, 0.1), ("merger", "image", 2e-3, 0.1), ("language", "image", 3e-3, 0.1),
                             ("language", "text", 3e-3, 0.1), ("language", "shared", 3e-3, 0.1)]
    for group, kind in zip(groups[2:], ("lora_A_image", "lora_A", "lora_B")):
        assert {id(p) for p in group["params"]} == {id(p) for p in language(model, kind).values()}


@pytest.mark.parametrize("lora", (RANKS, None))
def test_groups_without_are_one_per_tower_and_kind_of_decay(build, lora):
    """In the order of towers, vectors before matrices, parameters in the model's order; nothing but the modality is new."""
    recipe, model = build(by_token=False, lora=lora, optim={"weight_decay": 0.1})
    groups = parameter_groups(model, recipe)
    decays = (0.1,) if lora else (0.0, 0.1)
    assert kinds(groups) == [(tower, modality, 1e-3, decay) for tower, modality in (
        ("vision", "image"), ("merger", "image"), ("language", "text")) for decay in decays]
    assert all(set(group) == {"params", "tower", "modality", "lr", "weight_decay"} for group in groups)
    place = {id(p): number for number, p in enumerate(model.parameters())}
    assert all([place[id(p)] for p in group["params"]] == sorted(place[id(p)] for p in group["params"]) for group in groups)


def test_added_modules_have_groups_of_their_own(build):
    recipe, model = build(optim={"weight_decay": 0.1})
    mender = nn.Linear(2, 2)
    unwrap(model).mender = mender
    groups = parameter_groups(model, recipe)[-2:]
    assert kinds(groups) == [("language", "shared", 1e-3, 0.0), ("language", "shared", 1e-3, 0.1)]
    assert [group["params"] for group in groups] == [[mender.bias], [mender.weight]]

    class Faster:               # as a recipe whose balance method has a `rate`
        lora, optim, balance = recipe.lora, recipe.optim, type("Lnln", (), {"rate": 10.0})

    assert [lr for _, _, lr, _ in kinds(parameter_groups(model, Faster))] == [1e-3] * 5 + [1e-2] * 2


def test_the_table_says_so(build):
    recipe, model = build()
    rows = list(zip(*(column.cells for column in tower_table(model, recipe).columns)))
    assert [row[4] for row in rows] == ["2", "3", "4 by token type"] and rows[2][3] == "14"


def test_a_recipe_in_which_it_would_change_nothing_is_refused(recipe_file):
    with pytest.raises(RecipeError, match="lora.by_token: changes nothing"):
        load_recipe(recipe_file(lora={"by_token": True, "language": {"rank": 0}}))


def test_without_a_language_tower_nothing_is_by_token_type(tiny):
    from transformers import Qwen2_5_VLForConditionalGeneration

    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny)
    model = get_peft_model(base, TokenLoraConfig(target_modules=r".*visual\.merger\.mlp\.[02]"))
    assert isinstance(model, PeftModel) and not has_token_lora(model)
    assert connect(model) is model
