"""An estimate of image tokens and memory, printed by `train.py --dry-run` before any weight is loaded."""

import numpy as np
from rich.table import Table
from torch import nn

from data_prep.encode import Encoder
from data_prep.images import picture_path, upright_size
from training.config import Recipe
from training.mixture import Mixture
from training.model import count_parameters, unwrap

GB = 2**30
# Bytes of activations that one token leaves in one transformer layer for the backward pass, per hidden unit at 2 bytes a
# number: 34 without recomputation, 2 with it (Korthikanti et al. 2022, arXiv 2205.05198, equations 2 and section 5; flash
# attention keeps no scores).
KEPT, KEPT_CHECKPOINTED = 34, 2


def picture_tokens(mixture: Mixture, encoder: Encoder, sample: int = 500) -> np.ndarray:
    """Image tokens of up to `sample` pictures of the mixture, read from their headers."""
    pictures = sorted({(p.root, p.image, p.max_pixels) for problems in mixture.problems.values() for p in problems if p.image})
    picks = np.linspace(0, len(pictures) - 1, min(sample, len(pictures))).astype(int) if pictures else []
    sizes = [upright_size(picture_path(root, image), limit) for root, image, limit in (pictures[i] for i in picks)]
    return np.array([encoder.image_tokens(*size) for size in sizes])


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
    return {"weights": (total - trained * (recipe.lora is not None)) * size / GB,
            "trained weights, gradients, Adam": trained * 16 / GB,
            "activations": activations / GB,
            "logits of answers": 3 * 4 * rows * answer_tokens * text.vocab_size / GB}


def estimate_table(model: nn.Module, recipe: Recipe, mixture: Mixture, encoder: Encoder) -> Table:
    pictures = picture_tokens(mixture, encoder)
    rows = [[float(v) for v in mixture.mean_tokens(part, encoder)] for part in mixture.parts]
    tokens, image, answer = np.average(rows, axis=0, weights=[part.rate for part in mixture.parts])
    memory = memory_gb(model, recipe, tokens - image, image, answer)
    table = Table("what", "value", title="estimate", title_justify="left")
    if len(pictures):
        table.add_row("image tokens per picture (min, median, max)", f"{pictures.min()}, {np.median(pictures):.0f}, {pictures.max()}")
    table.add_row("tokens per optimizer step", f"{tokens * recipe.batch:,.0f}")
    for purpose, gb in memory.items():
        table.add_row(f"memory: {purpose}", f"{gb:.2f} GB")
    table.add_row("memory of one device, estimated", f"{sum(memory.values()):.1f} GB")
    return table
