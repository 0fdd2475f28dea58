"""Losses as pure functions on tensors, with no model inside."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) per pair: -ln sigmoid(beta (chosen - rejected)).

    Args:
        chosen, rejected: (pairs,) log-ratios d = ln policy - ln reference of the two sides, summed over the answer's tokens.
        beta: strength of the pull towards the reference.

    Returns:
        (pairs,); ln 2 where both sides are as likely as under the reference.
    """
    return -logsigmoid(beta * (chosen - rejected))


def conditional(chosen: Tensor, other_image: Tensor, beta: float) -> Tensor:
    """The same answer under its picture and under another one: mDPO's conditional term (arXiv 2406.11839) per pair.

    Where both pictures are the same it is ln 2 with a gradient of 0. A constant per picture does not cancel, as it does in
    `sympmo`: the normalisers of two pictures differ.

    Args:
        chosen: (pairs,) log-ratio of the chosen answer under its own picture.
        other_image: (pairs,) the same answer's under the rejected picture.
    """
    return dpo(chosen, other_image, beta)


def anchor(chosen: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """A soft pull of the chosen answer's reward above `delta`: -ln sigmoid(beta chosen - delta) (arXiv 2406.11839) per pair.

    DPO alone may lower the chosen answer as long as the rejected one falls further.
    """
    return -logsigmoid(beta * chosen - delta)


def gce(margin: Tensor, q: Tensor | float) -> Tensor:
    """Generalised cross-entropy of a margin, robust to pairs that are wrong: (1 - sigmoid(margin)^q) / q (NaPO, arXiv 2503.17928).

    Its gradient is that of DPO times sigmoid(margin)^q: pairs that the model still ranks the other way round, which may be noise,
    count less. q to 0 is DPO, q = 1 is 1 - sigmoid.

    Args:
        margin: (pairs,) beta (chosen - rejected).
        q: in [0, 1]; no gradient flows into it.

    Raises:
        ValueError: q outside [0, 1].
    """
    q = torch.as_tensor(q, dtype=margin.dtype, device=margin.device).detach()
    if not ((q >= 0) & (q <= 1)).all():
        raise ValueError(f"q must lie between 0 and 1, not {q.tolist()}")
    log_p = logsigmoid(margin)
    # -expm1(q ln p) / q keeps its digits for small q, where 1 - p^q would lose them.
    safe = torch.where(q > 0, q, torch.ones_like(q))
    return torch.where(q > 0, -torch.expm1(safe * log_p) / safe, -log_p)


def noise_aware_q(margin: Tensor, alpha: float, *, form: str = "code") -> Tensor:
    """How much noise NaPO assumes, from the mean margin of a batch: the q of `gce`, without gradient.

    form "paper": 1 - sigmoid(alpha psi), which begins at 0.5, cut to [0.01, 1]. "code": twice that, which begins at 1, cut to
    [0.001, 1]: what was released.
    Args:
        margin: any shape; mean over it is psi: log-ratio differences without beta.
        alpha: 0.5 in the paper for length-averaged margins of text priors.

    Raises:
        ValueError: unknown form.
    """
    q = 1 - torch.sigmoid(alpha * margin.detach().mean())
    if form == "paper":
        return q.clamp(0.01, 1)
    if form == "code":
        return (2 * q).clamp(0.001, 1)
    raise ValueError(f"no such form of q: {form}; there are paper and code")


def language_prior(blind: Tensor, beta: float) -> Tensor:
    """Push an answer's likelihood without any picture below the reference's: -ln sigmoid(-beta blind) per pair.

    Source: the language-bias penalty of arXiv 2605.25036. Its gradient never ends, however unlikely the answer has become
    without the picture: a weight above 1 is refused by recipes, and `text` has to be watched.

    Args:
        blind: (pairs,) log-ratio of an answer without the picture.
    """
    return -logsigmoid(-beta * blind)


def svco(own: Tensor, blind: Tensor, other: Tensor, beta: float) -> Tensor:
    """S-VCO's two terms for one answer (arXiv 2502.13928) per pair: attend to the picture that shows it, reject one that does not.

    -ln sigmoid(beta (own - blind)) - ln sigmoid(beta (blind - other)). The full loss is this for both answers of a symmetric
    pair: 4 ln 2 at the start, and at least 2 ln 2 for each where both pictures are the same.

    Args:
        own, blind, other: (pairs,) log-ratios of the answer under its picture, without any, and under the other picture.
    """
    return dpo(own, blind, beta) + dpo(blind, other, beta)


def sympmo(d11: Tensor, d12: Tensor, d21: Tensor, d22: Tensor, beta: float, lam: float, gamma: float, eta: float) -> Tensor:
    """Symmetric preferences under two pictures (arXiv 2506.11712) per pair, without the plain DPO term.

    lam [DPO(d11, d12) + DPO(d22, d21)] + gamma ((d11 - d12) - (d22 - d21))^2 + eta [anchor(d11) + anchor(d22)]

    Every comparison stays inside one picture, so that what depends on the picture alone cancels.

    Args:
        d11, d12, d21, d22: (pairs,) d_ij is the log-ratio of answer j under picture i; answer i is right under picture i.
        gamma: 1e-4 in the paper, on margins without beta.

    Returns:
        (pairs,); ln 2 (2 lam + 2 eta) where policy and reference agree.
    """
    one, two = d11 - d12, d22 - d21
    return (lam * -(logsigmoid(beta * one) + logsigmoid(beta * two)) + gamma * (one - two) ** 2
            + eta * (anchor(d11, beta) + anchor(d22, beta)))


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
