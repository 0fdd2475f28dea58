"""Losses as pure functions on tensors, with no model inside."""

import torch
from torch import Tensor


def weighted_nll(log_probs: Tensor, loss_weight: Tensor, total: Tensor | float) -> Tensor:
    """Supervised loss: sum of weight times negative log-likelihood, over the weight of the whole optimizer step.

    Args:
        log_probs: (batch, tokens) log-probability of each label; any finite value where the weight is 0.
        loss_weight: (batch, tokens), >= 0.
        total: weight of the optimizer step, over micro-batches and ranks. Dividing by it, and not by the weight of the
            micro-batch, makes the gradient independent of how the step is cut.

    Returns:
        Scalar. 0 with a gradient of 0 where nothing has a weight.
    """
    total = torch.as_tensor(total, dtype=torch.float32, device=log_probs.device)
    return -(log_probs.float() * loss_weight).sum() / torch.where(total > 0, total, 1.0)
