"""CGGM (arXiv 2411.01409), classifier-guided gradient modulation: how fast each modality improves decides how far it moves.

Where the code released with it (zrguo/CGGM) differs from the paper, the functions say so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.balance.hook import Modulation, World
from training.balance.settings import SIDES, Cggm
from training.balance.shapley import existing, option_log_probs
from training.balance.views import Seen

STILL = 1e-3                # a sum of differences below it says nothing about who improves
LOWEST, HIGHEST = 0.1, 2.0  # of a guarded coefficient


def coefficients(metrics: Tensor | Sequence[float], previous: Tensor | Sequence[float], *, guard: bool = True) -> Tensor:
    """c_i = (s - d_i) / s with d = metrics - previous and s = sum of d + 1e-8: the share of the improvement made by the others.

    Away from s = 0 the coefficients sum to M - 1, and a metric counted the other way round gives the same ones, both up to the
    1e-8, which is the released code's. Near s = 0 they run to +-1e7, and a negative one turns the step into an ascent: so it is
    in the released code, and nothing in the paper prevents it.

    Args:
        metrics, previous: (modalities,) unimodal metrics now and before; `previous` is 0 at the first measurement.
        guard: all 1 when the absolute sum of differences is below 1e-3, otherwise cut to [0.1, 2]. False: as released.

    Returns:
        (modalities,), without rho, no gradient; float64 for sequences of floats, otherwise the inputs' type.

    Raises:
        ValueError: metrics of other shapes than (modalities,), or not finite.
    """
    now, before = (one.detach() if isinstance(one, Tensor) else torch.tensor(one, dtype=torch.float64)
                   for one in (metrics, previous))
    if now.shape != before.shape or now.ndim != 1 or not len(now):
        raise ValueError(f"metrics of shapes {tuple(now.shape)} now and {tuple(before.shape)} before; both are (modalities,)")
    d = now - before
    if not torch.isfinite(d).all():
        raise ValueError(f"metrics must be finite: {now.tolist()} after {before.tolist()}")
    if guard and d.sum().abs() < STILL:
        return torch.ones_like(d)
    s = d.sum() + 1e-8
    c = (s - d) / s
    return c.clamp(LOWEST, HIGHEST) if guard else c


def direction_loss(coefficients: Tensor, cosines: Tensor) -> Tensor:
    """L_gm = 1/M sum_i (|c_i| - c_i cos_i), without rho: how far the joint gradient is from those that should lead.

    The paper has B_i = rho c_i in place of c_i; the released code leaves rho out, as here. It is never negative, 0 when every
    cosine is the sign of its coefficient.

    Args:
        coefficients: (modalities,); no gradient flows into them.
        cosines: (modalities,) from `direction_cosines`.

    Returns:
        Scalar.
    """
    if coefficients.shape != cosines.shape:
        raise ValueError(f"coefficients of shape {tuple(coefficients.shape)} for cosines of shape {tuple(cosines.shape)}")
    c = coefficients.detach().to(cosines)
    return (c.abs() - c * cosines).sum() / len(c)


def cosine(one: Tensor, two: Tensor) -> Tensor:
    """Cosine of two tensors of one shape, flattened; scalar, at least single precision.

    However small the tensors, as gradients of a fitted model are, it is a cosine; where one is 0 it is 0 with a gradient of 0.
    """
    if one.shape != two.shape:
        raise ValueError(f"a cosine between shapes {tuple(one.shape)} and {tuple(two.shape)}")
    one, two = (_unit_scale(x.flatten()) for x in (one, two))
    norms = one.norm() * two.norm()
    return torch.where(norms > 0, one @ two / torch.where(norms > 0, norms, 1.0), 0.0)


def direction_cosines(joint: Tensor, sides: Sequence[Tensor], *, mode: str = "analytic") -> Tensor:
    """(modalities,) cosines of what the joint model and each modality by itself ask of the output layer.

    mode:
        analytic  tensors are `option_gradient` of the joint view and of each unimodal view in the same step. The gradient
                  flows through the joint one into everything below the output layer, without a second backward.
        weight    tensors are the *weights* of the output layer and of each modality's own classifier: what was released. It
                  moves the output layer and nothing else.
        stale     tensors are gradients already computed, as the paper's formula reads: a constant, which teaches nothing.

    Args:
        joint: (options, width) or any shape.
        sides: one tensor of that shape per modality; no gradient flows into them in any mode.

    Raises:
        ValueError: unknown mode, or shapes that differ.
    """
    if mode not in ("analytic", "weight", "stale"):
        raise ValueError(f"no such mode of the direction term: {mode}; there are analytic, weight and stale")
    joint = joint.detach() if mode == "stale" else joint
    return torch.stack([cosine(joint, side.detach()) for side in sides])


def option_gradient(hidden: Tensor, logits: Tensor, labels: Tensor, exists: Tensor | None = None) -> Tensor:
    """Gradient of the mean cross-entropy over options for the output layer's rows of those options, as a formula.

    G = 1/B sum_b (p_b - onehot_b) h_b^T. It holds for logits = hidden W^T (+ bias) also where W is frozen and has no gradient,
    and is differentiable in `hidden` and `logits`.

    Args:
        hidden: (rows, width) input of the output layer at the answer's position.
        logits: (rows, options); exists: as in `shapley.option_log_probs`.
        labels: (rows,) place of the right option.

    Returns:
        (options, width), at least single precision; 0 for no rows.
    """
    exists = existing(logits, exists)
    log_probs = option_log_probs(logits, exists)
    onehot = torch.nn.functional.one_hot(labels, logits.shape[-1])
    return (log_probs.exp() - onehot).T @ hidden.to(log_probs.dtype) / max(len(labels), 1)


def _unit_scale(x: Tensor) -> Tensor:
    """x over its largest absolute value: squares can then neither vanish nor overflow. A cosine does not see the scale."""
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.detach().abs().max()
    return x / torch.where(largest > 0, largest, 1.0)


class CggmMethod(Modulation):
    """CGGM with branches of one model in place of classifiers: what each scores by itself, now and at the last measurement.

    The magnitude is a factor on the learning rate of each modality's weights, from the first measurement on, of which the previous
    one is 0. The direction term takes the newest coefficients, and the micro-batch's own gradients; like every part of a loss that
    is not a mean over rows, it depends on how the optimizer step is cut into micro-batches.
    """

    settings: Cggm

    def __init__(self, settings: Cggm, world: World) -> None:
        super().__init__(settings, world)
        self.previous = [0.0] * len(SIDES)
        self.coefficients = [1.0] * len(SIDES)

    def measured(self, values: dict[str, float]) -> None:
        now = [values[side] for side in SIDES]
        self.coefficients = coefficients(now, self.previous, guard=self.settings.guard).tolist()
        self.previous = now
        self.set({side: self.settings.rho * c for side, c in zip(SIDES, self.coefficients)})

    def loss(self, views: Mapping[str, Seen], answers: Tensor | float) -> Tensor | None:
        self.watch(views)
        if self.settings.direction is None:
            return None
        both = views["both"]
        # Decided by the first token, where the hidden state was kept. Where all answers are open there is no first option.
        rows = ((both.tokens >= 0).sum(-1) > 1) & (both.tokens[:, :1] >= 0).any(-1)
        if not rows.any():
            return None
        gradients = [_first_token_gradient(views[name], rows) for name in ("both", *SIDES)]
        cosines = direction_cosines(gradients[0], gradients[1:], mode=self.settings.direction.mode)
        self.shown |= {f"cosine_{side}": float(one) for side, one in zip(SIDES, cosines.detach())}
        term = direction_loss(cosines.new_tensor(self.coefficients), cosines)
        return self.strength * self.settings.direction.lam * self.world.share * term

    def state(self) -> dict[str, Any]:
        return {**super().state(), "previous": self.previous, "coefficients": self.coefficients}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.previous, self.coefficients = list(state["previous"]), list(state["coefficients"])


def _first_token_gradient(seen: Seen, rows: Tensor) -> Tensor:
    """option_gradient for the output layer's rows of all tokens that any of the answers' options begin with: (tokens, width)."""
    tokens = seen.tokens[rows]
    ids, place = tokens.clamp(min=0).unique(return_inverse=True)
    exists = torch.zeros(len(tokens), len(ids), dtype=torch.long, device=ids.device)
    exists = exists.scatter_add(1, place, (tokens >= 0).long()) > 0
    logits = seen.first[rows][:, ids].masked_fill(~exists, -torch.inf)
    return option_gradient(seen.hidden[rows], logits, place[:, 0], exists)
