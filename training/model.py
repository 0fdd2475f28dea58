"""Qwen2.5-VL and its towers: loading, LoRA per tower, and the table of what is trained."""

import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from math import prod
from operator import itemgetter
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput

from data_prep.encode import SLOT_TOKEN, Encoder
from modeling import adapters
from modeling.mender import attach, settings_for
from modeling.token_lora import TokenLoraConfig, connect, has_token_lora, modality_of
from training.config import TOWERS, Lora, Model, Recipe, RecipeError
from training.sharding import shape_of

# The linear layers of each tower. Bare suffixes would not do: `gate_proj` is in the vision blocks as well as in the
# language layers, and `proj` is also the patch embedding, a Conv3d.
LORA_TARGETS = {
    "vision": r"visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj))",
    "merger": r"visual\.merger\.mlp\.[02]",
    "language": r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate_proj|up_proj|down_proj))",
}
MODALITIES = ("image", "text", "shared")


def tower_of(name: str) -> str:
    """The tower that a parameter or module belongs to, by its name. Every parameter is in exactly one."""
    if re.search(r"(^|\.)visual\.merger\.", name):
        return "merger"
    if re.search(r"(^|\.)visual\.", name):
        return "vision"
    return "language"


def load_config(model: Model) -> AutoConfig:
    config = AutoConfig.from_pretrained(model.name, revision=model.revision)
    if config.model_type != "qwen2_5_vl":
        raise RecipeError(f"model.name: {model.name} is a {config.model_type}; a qwen2_5_vl is needed")
    return config


def load_base(model: Model) -> Qwen2_5_VLForConditionalGeneration:
    """The pretrained model, frozen. RecipeError when it is another kind of model or its attention is not installed."""
    load_config(model)
    try:
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model.name, revision=model.revision, dtype=model.dtype, attn_implementation=model.attention, **quantization(model))
    except ImportError as error:
        raise RecipeError(f"model.attention: {' '.join(str(error).split())}") from error
    if conversions := getattr(base, "_weight_conversions", None):
        # Loading under ZeRO-3 also keeps changes of names that the file did not need; undone on saving, nothing could read the names.
        base._weight_conversions = [one for one in conversions if one.was_used()]
    return base.requires_grad_(False)


def quantization(model: Model) -> dict[str, Any]:
    """The arguments of from_pretrained that quantise the language tower's linear layers, as the recipe says."""
    if model.quantize is None:
        return {}
    # "visual" alone would skip nothing: the library compares whole names from the root.
    common = {"llm_int8_skip_modules": ["model.visual", "lm_head"]}
    if model.quantize == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **common)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                    bnb_4bit_compute_dtype=getattr(torch, model.dtype), **common)
    where = {"device_map": {"": torch.cuda.current_device()}} if torch.cuda.is_available() else {}
    return {"quantization_config": config, **where}


def empty_base(model: Model) -> Qwen2_5_VLForConditionalGeneration:
    """The model's shape without its weights, for counting: nothing is downloaded but the configuration."""
    with torch.device("meta"):
        base = Qwen2_5_VLForConditionalGeneration(load_config(model))
    return base.to(getattr(torch, model.dtype)).requires_grad_(False)


def lora_config(lora: Lora, towers: Iterable[str]) -> LoraConfig:
    """One PEFT configuration for all towers, with a rank and an alpha for each."""
    towers = list(towers)
    rank = {tower: getattr(lora, tower).rank for tower in towers}
    alpha = {tower: 2 * rank[tower] if getattr(lora, tower).alpha is None else getattr(lora, tower).alpha for tower in towers}
    patterns = {tower: rf".*{LORA_TARGETS[tower]}" for tower in towers}
    return (TokenLoraConfig if lora.by_token else LoraConfig)(
        task_type="CAUSAL_LM", r=rank[towers[0]], lora_alpha=alpha[towers[0]], lora_dropout=lora.dropout, bias="none",
        target_modules="|".join(patterns.values()),
        rank_pattern={patterns[tower]: rank[tower] for tower in towers},
        alpha_pattern={patterns[tower]: alpha[tower] for tower in towers})


def prepare(base: Qwen2_5_VLForConditionalGeneration, recipe: Recipe, encoder: Encoder | None = None) -> nn.Module:
    """Make trainable what the recipe trains: LoRA on each tower with a rank, or all parameters when `lora` is null; and what its
    balance method adds to the model.

    encoder: of the same model. It is told of the slots that such modules fill; needed where there are some.

    Raises:
        RecipeError: a tower that the recipe trains ends up without a trained parameter, or one that it freezes with one.
    """
    towers = [tower for tower in TOWERS if recipe.trains(tower)]
    if recipe.lora is None:
        model: nn.Module = base
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(tower_of(name) in towers)
    elif recipe.model.adapter is None:
        model = get_peft_model(base, lora_config(recipe.lora, towers))
        if has_token_lora(model):
            connect(model)
    else:
        model = load_adapter(base, recipe.model.adapter, towers, by_token=recipe.lora.by_token)
    add_modules(unwrap(model), recipe, encoder)
    found = {tower for tower, numbers in count_parameters(model).items() if numbers["trained"]}
    if found != set(towers):
        raise RecipeError(f"{recipe.name}: trains {', '.join(sorted(found))}, but the recipe says {', '.join(towers)}")
    if "vision" not in towers:
        freeze_vision(unwrap(model), merger="merger" in towers)
    return model


def add_modules(base: Qwen2_5_VLForConditionalGeneration, recipe: Recipe, encoder: Encoder | None) -> None:
    """Give the model the modules that the recipe's balance method adds, or train on those that its adapter has; without such a
    method an adapter's modules stay as they are.

    Raises:
        RecipeError: the tokenizer has no token for slots, the language tower is frozen, whose pace they follow, or the adapter
            has others.
    """
    balance = recipe.active_balance
    wanted = None if balance is None else balance.modules()
    there = getattr(base, "mender", None)
    if wanted is not None:
        if not recipe.trains("language"):
            raise RecipeError(f"balance: the modules of {balance.method} learn at a multiple of the language tower's pace, which is frozen")
        if encoder.slot_id is None:
            raise RecipeError(f"balance: the tokenizer has no {SLOT_TOKEN} for the slots that {balance.method} fills")
        if there is None:
            settings = settings_for(base.config, slot_id=encoder.slot_id, end_id=encoder.end_id, seed=recipe.seed, **wanted)
            there = attach(base, settings)
        elif differing := [key for key, value in wanted.items() if there.settings[key] != value]:
            raise RecipeError(f"model.adapter: {recipe.model.adapter}: its modules differ from the recipe's in {', '.join(differing)}")
    if there is not None:
        there.requires_grad_(wanted is not None)
        encoder.slots = there.slots


def load_adapter(base: Qwen2_5_VLForConditionalGeneration, folder: str, towers: Collection[str], *,
                 by_token: bool = False) -> PeftModel:
    """The base with a trained adapter, to go on training it on some towers; on the others it stays as it is.

    Raises:
        RecipeError: it cannot be loaded, or changes nothing, which is what one made for another model looks like, or it is
            `by_token` (LoRA by token type) where the recipe is not, or the other way round.
    """
    try:
        model = adapters.load_adapter(base, folder, trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"model.adapter: {folder}: {' '.join(str(error).split())[:500]}") from error
    if not any(bool(parameter.any()) for name, parameter in model.named_parameters() if "lora_B" in name):
        raise RecipeError(f"model.adapter: {folder}: no LoRA weight of it changes the model; was it made for another one?")
    if has_token_lora(model) != by_token:
        raise RecipeError(f"model.adapter: {folder}: its language tower is {'not ' if by_token else ''}adapted by token type, so "
                          f"lora.by_token must be {str(not by_token).lower()}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and tower_of(name) in towers)
    return model


def add_answer_logits(base: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let `base(..., labels=labels, answer_logits=True)` return logits of shape (trained tokens, vocabulary), row after row: those
    that predict the labels, and no others. `hidden_states` holds one tensor: the (trained tokens, width) that they are made of.

    A forward of the model like any other, so that wrappers (PEFT, DDP, DeepSpeed) see it.
    """
    original = base.forward

    @functools.wraps(type(base).forward)
    def forward(*args, answer_logits: bool = False, **kwargs):
        if not answer_logits:
            return original(*args, **kwargs)
        trained = kwargs.pop("labels")[:, 1:] != -100
        hidden = base.model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1][trained]
        return CausalLMOutput(logits=base.lm_head(hidden), hidden_states=(hidden,))

    base.forward = forward


def add_shared_pictures(base: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let `base(..., pictures=rows)` show a picture in several rows and encode it once.

    pictures: (slots,) for every picture that the rows show, row after row, its place among those of `image_grid_thw`. Then
    `pixel_values` and `image_grid_thw` hold each distinct picture once. features: what `picture_features` made of them, where it
    is known already. Log-probabilities and gradients are those of the rows with pictures of their own.

    blank: encode a blank picture that no row shows, so that the vision tower runs, and has a gradient of zeros, here too. It
    takes the way of a picture: made inside the forward pass, before the language tower's graph, and added, times 0, to what that
    tower reads, so that every module runs, and every gradient is made, that a picture causes, in the same order. ZeRO-2 takes
    gradients for each other's when ranks do not make them in the same order (deepspeedai/DeepSpeed#2343), and ZeRO-3 gathers
    weights for those that are made.

    A forward of the model like any other, so that wrappers (PEFT, DDP, DeepSpeed) see it. Call it after TRL's fused head is added.
    """
    original = base.forward

    @functools.wraps(type(base).forward)
    def forward(*args, pictures: torch.Tensor | None = None, features: tuple[torch.Tensor, ...] | None = None, blank: bool = False,
                **kwargs):
        unseen = 0 * blank_features(base, kwargs["input_ids"].device).sum() if blank else None
        if pictures is not None:
            grid, pixels = kwargs.pop("image_grid_thw", None), kwargs.pop("pixel_values", None)
            if len(pictures):
                found = picture_features(base, pixels, grid) if features is None else features
                shown = tuple(found[i] for i in pictures.tolist())
                kwargs |= {"image_grid_thw": grid[pictures],
                           "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=shown)}}
        if unseen is None:
            return original(*args, **kwargs)

        def add(module, inputs, named):
            return inputs, {**named, "inputs_embeds": named["inputs_embeds"] + unseen.to(named["inputs_embeds"].dtype)}

        hook = base.model.language_model.register_forward_pre_hook(add, prepend=True, with_kwargs=True)
        try:
            return original(*args, **kwargs)
        finally:
            hook.remove()

    base.forward = forward


def blank_features(base: Qwen2_5_VLForConditionalGeneration, device: torch.device) -> torch.Tensor:
    """(1, hidden): a blank picture of one image token."""
    vision, side = base.config.vision_config, base.config.vision_config.spatial_merge_size
    pixels = torch.zeros(side**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2, device=device)
    return picture_features(base, pixels, torch.tensor([[1, side, side]], device=device))[0]


def picture_features(base: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the vision tower and the merger make of each picture: (image tokens, hidden) each.

    Args:
        pixels: (patches, 3 * 2 * 14 * 14) of all pictures, one after the other.
        grid: (pictures, 3).
    """
    return base.model.get_image_features(pixels, grid).pooler_output


def unwrap(model: nn.Module) -> Qwen2_5_VLForConditionalGeneration:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def freeze_vision(base: Qwen2_5_VLForConditionalGeneration, *, merger: bool) -> None:
    """Run the frozen vision tower without a graph.

    Gradient checkpointing hooks the input of every model inside, the vision tower's too, and would then run its backward
    pass for nothing. The numbers do not change. With a trained merger, the graph starts at the merger.
    """
    visual = base.model.visual
    if not merger:
        visual.forward = torch.no_grad()(visual.forward)
        return
    visual.patch_embed.forward = torch.no_grad()(visual.patch_embed.forward)
    for block in visual.blocks:
        block.forward = torch.no_grad()(block.forward)


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Per tower: number of parameters in all (`total`) and trained (`trained`)."""
    counts: dict[str, dict[str, int]] = {tower: {"total": 0, "trained": 0} for tower in TOWERS}
    for name, parameter in model.named_parameters():
        size = numel(parameter)
        counts[tower_of(name)]["total"] += size
        counts[tower_of(name)]["trained"] += size * parameter.requires_grad
    return counts


def numel(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; of one in 4 bits those that it stands for, as two of them share a byte, and of one that lies in parts
    on several ranks those of the whole."""
    state = getattr(parameter, "quant_state", None)
    return prod(shape_of(parameter) if state is None else state.shape)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Optimizer groups: one per tower, modality and kind of weight decay, each with its tower's learning rate.

    Vectors (norms, biases) get no weight decay. A tower's weights are of one modality, but for a language tower that is adapted
    by token type. What a balance method adds to the model (`mender`) has groups of its own, last, at its multiple (`rate`) of
    the language tower's learning rate.
    """
    by_token = recipe.lora is not None and recipe.lora.by_token
    groups: dict[tuple[int, bool, int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            modality = MODALITIES.index(modality_of(name, by_token))
            groups[TOWERS.index(tower_of(name)), _is_added(name), modality, len(shape_of(parameter)) > 1].append(parameter)
    rate = getattr(getattr(recipe, "balance", None), "rate", 1.0)
    return [{"params": parameters, "tower": TOWERS[tower], "modality": MODALITIES[modality],
             "lr": getattr(recipe.optim.lr, TOWERS[tower]) * (rate if added else 1),
             "weight_decay": recipe.optim.weight_decay if decay else 0.0}
            for (tower, added, modality, decay), parameters in sorted(groups.items(), key=itemgetter(0))]


def _is_added(name: str) -> bool:
    return re.search(r"(^|\.)mender\.", name) is not None


def tower_table(model: nn.Module, recipe: Recipe) -> Table:
    """Tower, parameters, trained ones, adapted modules, LoRA rank, learning rate."""
    adapted: dict[str, int] = defaultdict(int)
    for name, _ in model.named_modules():
        if name.endswith("lora_A.default"):
            adapted[tower_of(name)] += 1
    table = Table("tower", "parameters", "trained", "modules", "LoRA rank", "learning rate", title="towers", title_justify="left")
    for tower, numbers in count_parameters(model).items():
        rank = "all weights" if recipe.lora is None else str(getattr(recipe.lora, tower).rank)
        if tower == "language" and recipe.lora is not None and recipe.lora.by_token:
            rank += " by token type"
        trained = numbers["trained"]
        table.add_row(tower, f"{numbers['total'] - (trained if recipe.lora else 0):,}", f"{trained:,}", str(adapted[tower] or "-"),
                      rank if trained else "frozen", f"{getattr(recipe.optim.lr, tower):g}" if trained else "-")
    return table
