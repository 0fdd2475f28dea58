"""From numbers of draws to tensors: the batch carries its loss weights."""

from typing import Literal

import numpy as np
import torch

from data_prep.encode import Encoded, Encoder
from training.config import Model, RecipeError
from training.mixture import Mixture

IGNORED = -100          # a label that is not trained


def load_encoder(model: Model) -> Encoder:
    """Tokenizer and image processor of a recipe's model. RecipeError when there are none, or none of the Qwen2-VL family."""
    try:
        return Encoder(model.name, revision=model.revision, min_pixels=model.min_pixels, max_pixels=model.max_pixels)
    except (ValueError, OSError) as error:
        raise RecipeError(f"model.name: {model.name}: {' '.join(str(error).split())}") from error


def loss_weights(trained: np.ndarray, weigh: Literal["tokens", "rows"]) -> np.ndarray:
    """What each token counts in the loss.

    Args:
        trained: (tokens,) bool, True on the tokens of answers; answers are separated by at least one untrained token.
        weigh: "tokens": 1 for every trained token; "rows": the tokens of one answer share a weight of 1.

    Returns:
        (tokens,) float32.
    """
    weights = trained.astype(np.float32)
    if weigh == "rows":
        starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
        ends = np.flatnonzero(trained & ~np.concatenate([trained[1:], [False]])) + 1
        for start, end in zip(starts, ends):
            weights[start:end] = 1 / (end - start)
    return weights


class Collator:
    """Draws to a batch: what Encoder.batch gives, and labels and loss_weight of shape (batch, tokens).

    Rendering, decoding and tokenising happen here, in the data loader's workers when there are any.
    """

    def __init__(self, mixture: Mixture, encoder: Encoder, weigh: Literal["tokens", "rows"] = "tokens") -> None:
        self.mixture, self.encoder, self.weigh = mixture, encoder, weigh

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        encoded: list[Encoded] = []
        for row in rows:
            messages, images, _ = self.mixture.conversation(self.mixture.draw(row["draw"]))
            encoded.append(self.encoder.encode(messages, images))
        batch = self.encoder.batch(encoded)
        weight = torch.zeros(batch["input_ids"].shape)
        for i, row in enumerate(encoded):
            weight[i, : len(row)] = torch.from_numpy(loss_weights(row.trained, self.weigh))
        batch["loss_weight"] = weight
        batch["labels"] = batch["input_ids"].masked_fill(weight == 0, IGNORED)
        return batch
