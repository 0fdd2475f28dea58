"""Losses as pure functions on tensors, with no model inside."""

import math

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


INNER = 20.0        # log-ratios beyond it are far outside anything that means something, and e^20 still fits any float


def cross_modal_kl(teacher_logps: Tensor, student_logps: Tensor, mask: Tensor, *, estimator: str = "k3",
                   clamp: float | None = None) -> Tensor:
    """Divergence of the student view from the teacher view of the same answers, mean over `mask`.

    Source: the contrastive KL of arXiv 2510.22836, read in its released code: "k3" with clamp=10 is what was published there.

    With k = teacher - student per token, and the answer's tokens taken from the teacher's side:
        k3       e^k - k - 1, never negative. clamp: values above it are cut, which leaves them without a gradient (k > 2.61 for
                 clamp=10), so that the tokens that depend most on the facts teach nothing; None does not cut.
        forward  k, the one-sample estimate of KL(teacher || student). Its gradient is that of distill.
        distill  -student: supervised learning of the teacher's answers.
        full     KL(teacher || student) over the whole vocabulary.

    Args:
        teacher_logps: (...) log-probability of each answer token in the teacher view; (..., vocabulary) for "full". No
            gradient flows into it.
        student_logps: the same in the student view.
        mask: (...) 1 or True where a token counts, 0 elsewhere; may be fractional.

    Returns:
        Scalar, float32 or the inputs' wider type. 0 with a gradient of 0 when the mask is empty.

    Raises:
        ValueError: unknown estimator, a clamp for another estimator than k3, or shapes that do not fit.
    """
    if clamp is not None and estimator != "k3":
        raise ValueError(f"a clamp belongs to the estimator k3, not to {estimator}")
    if teacher_logps.shape != student_logps.shape:
        raise ValueError(f"teacher {tuple(teacher_logps.shape)} and student {tuple(student_logps.shape)} are of different tokens")
    teacher, student = _wide(teacher_logps.detach()), _wide(student_logps)
    if estimator == "full":
        each = (teacher.exp() * (teacher - student)).sum(-1)
    elif estimator == "distill":
        each = -student
    elif estimator == "forward":
        each = teacher - student
    elif estimator == "k3":
        each = _k3(teacher - student, clamp)
    else:
        raise ValueError(f"no such estimator: {estimator}; there are k3, forward, full and distill")
    return _masked_mean(each, mask)


def _k3(k: Tensor, clamp: float | None) -> Tensor:
    if clamp is not None:
        k = k.clamp(-INNER, INNER)
        return (k.exp() - k - 1).clamp(-clamp, clamp)
    # Beyond e^20 the exponential goes on as its tangent: finite, and still with a gradient.
    near = k.clamp(max=INNER)
    return near.exp() * (1 + k - near) - k - 1


def jensen_shannon(one_logps: Tensor, two_logps: Tensor, mask: Tensor) -> Tensor:
    """Consistency of two views: Jensen-Shannon divergence of their distributions of each answer token, mean over `mask`.

    JS = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2: symmetric, between 0 and ln 2, with a gradient into both views.

    Args:
        one_logps, two_logps: (..., vocabulary) log-probabilities.
        mask: (...).

    Returns:
        Scalar; 0 with a gradient of 0 when the mask is empty.
    """
    one, two = _wide(one_logps), _wide(two_logps)
    middle = torch.logaddexp(one, two) - math.log(2)
    each = ((one.exp() * (one - middle)).sum(-1) + (two.exp() * (two - middle)).sum(-1)) / 2
    return _masked_mean(each, mask)


def evidence_weights(with_logps: Tensor, without_logps: Tensor, floor: float) -> Tensor:
    """What a token counts when it is weighed by what the picture tells about it.

    weight = floor + (1 - floor) |p_with - p_without|, p being the current policy's probability of the answer's token with and
    without the picture. Detached: the weight is not something to be optimised.

    Args:
        with_logps, without_logps: (tokens,) log-probabilities.
        floor: weight of a token about which the picture tells nothing, in [0, 1]. With 0, what cannot be read from the picture
            yet is never learned.

    Returns:
        (tokens,) in [floor, 1].
    """
    change = (_wide(with_logps.detach()).exp() - _wide(without_logps.detach()).exp()).abs()
    return floor + (1 - floor) * change


def _wide(values: Tensor) -> Tensor:
    """At least single precision."""
    return values if values.dtype == torch.float64 else values.float()


def _masked_mean(each: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != each.shape:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} for tokens of shape {tuple(each.shape)}")
    mask = mask.to(each.dtype)
    # What is masked out may be anything, infinite too, and must not come back as 0 * inf.
    total = torch.where(mask != 0, each * mask, 0.0).sum()
    weight = mask.sum()
    return total / torch.where(weight > 0, weight, 1.0)
