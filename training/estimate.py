"""An estimate of image tokens and memory, printed by `train.py --dry-run` before any weight is loaded."""

import re

import numpy as np
import torch
from rich.table import Table
from torch import nn

from data_prep.encode import Encoder
from data_prep.images import picture_path, upright_size
from training.config import Recipe
from training.memory import GB, resident_gb
from training.model import LORA_TARGETS, count_parameters, numel, unwrap
from training.objective import branch_roles
from training.plan import Plan, PlannedStage
from training.preference import needed

# Bytes of activations that one token leaves in one transformer layer for the backward pass, per hidden unit at 2 bytes a
# number: 34 without recomputation, 2 with it (Korthikanti et al. 2022, arXiv 2205.05198, equations 2 and section 5; flash
# attention keeps no scores).
KEPT, KEPT_CHECKPOINTED = 34, 2
# Bytes of a quantised weight: nf4 with double quantisation takes 4.127 bits (arXiv 2305.14314, section 3), int8 a scale per row.
QUANTIZED = {"nf4": 4.127 / 8, "int8": 1.0}
ADAM = {"adamw": 8, "adamw_8bit": 2}        # bytes of both moments
GATHERED = 1_000_000_000        # weights that ZeRO-3 has whole at a time, at most: DeepSpeed's stage3_max_live_parameters as it is by default


def picture_tokens(plan: Plan, encoder: Encoder, sample: int = 500) -> np.ndarray:
    """Image tokens of up to `sample` pictures of the mixtures, read from their headers."""
    pictures = sorted({picture for stage in plan.stages for picture in stage.mixture.pictures()})
    picks = np.linspace(0, len(pictures) - 1, min(sample, len(pictures))).astype(int) if pictures else []
    sizes = [upright_size(picture_path(root, image), limit) for root, image, limit in (pictures[i] for i in picks)]
    return np.array([encoder.image_tokens(*size) for size in sizes])


def step_tokens(stage: PlannedStage, encoder: Encoder) -> tuple[float, float, float]:
    """Tokens, image tokens and answer tokens that one conversation of a stage keeps for the backward pass: those of the drawn
    view and of every role that learns, a balance method's in the step that has the most, or those of every side of a pair that a
    term needs."""
    if stage.preference is not None:
        rows = [stage.mixture.side_tokens(part, encoder, needed(stage.preference)) for part in stage.mixture.parts]
        return tuple(np.average(rows, axis=0, weights=[part.rate for part in stage.mixture.parts]).tolist())
    learning = [role for role in stage.objective.extra.values() if role.learns]
    if stage.balance is not None:
        steps = [branch_roles(stage.balance, step) for step in range(stage.start, stage.end)]
        learning += max(([role for role in roles.values() if role.learns] for roles in steps), key=len)
    rows = [np.sum([stage.mixture.mean_tokens(part, encoder, view=view)
                    for view in (part.view, *(role.view_of(part.view) for role in learning))], axis=0)
            for part in stage.mixture.parts]
    return tuple(np.average(rows, axis=0, weights=[part.rate for part in stage.mixture.parts]).tolist())


def memory_gb(model: nn.Module, recipe: Recipe, text_tokens: float, image_tokens: float, answer_tokens: float) -> dict[str, float]:
    """Memory of one device in GB, by purpose, without DeepSpeed's sharding.

    Args:
        text_tokens, image_tokens, answer_tokens: per conversation, as the language tower sees them.
    """
    config = unwrap(model).config
    counts = count_parameters(model)
    total, trained = (sum(numbers[key] for numbers in counts.values()) for key in ("total", "trained"))
    size = 2 if recipe.model.dtype == "bfloat16" else 4
    rows = recipe.micro_batch
    text, vision = config.text_config, config.vision_config
    kept = KEPT_CHECKPOINTED if recipe.model.checkpointing else KEPT
    activations = kept * size / 2 * rows * (text_tokens + image_tokens) * text.hidden_size * text.num_hidden_layers
    if recipe.trains("vision"):
        activations += KEPT * size / 2 * rows * 4 * image_tokens * vision.hidden_size * vision.depth
    # Without a GPU, the libraries stand in the same memory as the model. This process has them loaded, and no weights.
    libraries = {} if torch.cuda.is_available() else {"libraries": resident_gb()}
    few = QUANTIZED.get(recipe.model.quantize)
    packed = 0 if few is None else sum(numel(module.weight) for name, module in model.named_modules()
                                       if isinstance(module, nn.Linear) and re.search(LORA_TARGETS["language"] + r"(\.base_layer)?$", name))
    return {**libraries, "weights": ((total - trained * (recipe.lora is not None) - packed) * size + packed * (few or 0)) / GB,
            "trained weights, gradients, Adam": trained * (8 + ADAM[recipe.optim.name]) / GB,
            "activations": activations / GB,
            "logits of answers": 3 * 4 * rows * answer_tokens * text.vocab_size / GB}


def sharded_gb(frozen: int, trained: int, *, size: int, stage: int, ranks: int, offload: bool = False) -> dict[str, float]:
    """Memory of one device in GB, by purpose, for weights and their training state under a stage of ZeRO (Rajbhandari et al. 2020,
    arXiv 1910.02054, section 5): gradients as wide as weights, and 12 bytes of optimizer state for each trained weight (a copy in
    float32 and Adam's two moments). Activations come on top, and are the same under every stage.

    Args:
        frozen, trained: numbers of weights.
        size: bytes of a weight.
        stage: 0 (nothing is shared out) to 3.
        ranks: devices that share.
        offload: weights and optimizer state lie in the host's memory; stage 3 alone.

    Raises:
        ValueError: offload under another stage.
    """
    if offload and stage != 3:
        raise ValueError(f"offload is for stage 3, not {stage}")
    share = [1 / ranks if stage >= least else 1.0 for least in (3, 2, 1)]
    weights, gradients, optimizer = (part * of for part, of in zip(share, ((frozen + trained) * size, trained * size, trained * 12)))
    kept = 0 if offload else 1
    return {"weights": kept * weights / GB, "gradients": gradients / GB, "optimizer": kept * optimizer / GB,
            "gathered": (min(GATHERED, frozen + trained) * size if stage == 3 else 0) / GB}


def estimate_table(model: nn.Module, recipe: Recipe, plan: Plan, encoder: Encoder) -> Table:
    pictures = picture_tokens(plan, encoder)
    stages = [step_tokens(stage, encoder) for stage in plan.stages]
    memories = [memory_gb(model, recipe, tokens - image, image, answer) for tokens, image, answer in stages]
    largest = max(range(len(stages)), key=lambda number: sum(memories[number].values()))
    table = Table("what", "value", title="estimate", title_justify="left")
    if len(pictures):
        table.add_row("image tokens per picture (min, median, max)", f"{pictures.min()}, {np.median(pictures):.0f}, {pictures.max()}")
    table.add_row("tokens per optimizer step", ", ".join(f"{tokens * recipe.batch:,.0f}" for tokens, _, _ in stages))
    for purpose, gb in memories[largest].items():
        table.add_row(f"memory: {purpose}", f"{gb:.2f} GB")
    where = f" (in stage {largest + 1})" if len(stages) > 1 else ""
    table.add_row("memory of one device, estimated", f"{sum(memories[largest].values()):.1f} GB{where}")
    return table
