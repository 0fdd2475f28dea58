"""What each modality adds to a value such as accuracy: Shapley values, shares, and the values that they are computed from."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import comb

import torch
from torch import Tensor

Number = float | Tensor


def shapley_two(none: Number, image: Number, text: Number, both: Number) -> tuple[Number, Number]:
    """Shapley values (image, text) of two modalities, elementwise.

    phi_image = 1/2 [(v(image) - v(none)) + (v(both) - v(text))], phi_text likewise; their sum is v(both) - v(none). M-SAM
    (arXiv 2510.24919) takes shares of batch accuracy from Shapley values; no released code confirms that it counts v(none).
    AGM's code (lihong2303/AGM_ICCV2023) works on logits and leaves v(none) out.

    Args:
        none, image, text, both: v of the views without either, with one, and with both; floats or tensors of one shape.
    """
    return ((image - none) + (both - text)) / 2, ((text - none) + (both - image)) / 2


def shapley(values: Mapping[Iterable[str], Number]) -> dict[str, Number]:
    """Shapley values of any number of players.

    phi_m = sum over S without m of |S|! (n - |S| - 1)! / n! [v(S + m) - v(S)].

    Args:
        values: v of each of the 2^n subsets of players, the empty one too: {(): .1, ("image",): .4, ...}.

    Raises:
        ValueError: a subset without a value, or with two.
    """
    v = {frozenset(subset): value for subset, value in values.items()}
    players = list(dict.fromkeys(player for subset in values for player in subset))
    n = len(players)
    subsets = [frozenset(subset) for size in range(n + 1) for subset in combinations(players, size)]
    if missing := [sorted(subset) for subset in subsets if subset not in v]:
        raise ValueError(f"no value for the players {missing[0]}; {n} players need all {2 ** n} subsets")
    if len(v) != len(values):
        raise ValueError("one subset of players has two values")
    return {player: sum((v[subset | {player}] - v[subset]) / (n * comb(n - 1, len(subset)))
                        for subset in subsets if player not in subset) for player in players}


def shares(phi):
    """Shapley values as shares: nu_m = max(phi_m, 0) / sum_k max(phi_k, 0); equal shares where no phi is positive.

    The cut at 0 and the fallback are additions to M-SAM (arXiv 2510.24919), of which is known only that its shares sum to 1:
    without them a modality that harms would have a negative share.

    Args:
        phi: tensor (..., players), or a sequence or mapping of floats or of tensors (...), one per player.

    Returns:
        What came in, with shares in place of values: non-negative, summing to 1 over the players.

    Raises:
        ValueError: no player, or a phi that is infinite or not a number.
    """
    if isinstance(phi, Mapping):
        return dict(zip(phi, shares(list(phi.values())), strict=True))
    if isinstance(phi, Tensor):
        return _shares(phi)
    floats = not any(isinstance(one, Tensor) for one in phi)
    found = _shares(torch.tensor(phi, dtype=torch.float64) if floats else torch.stack(list(phi), -1))
    return type(phi)(found.tolist() if floats else found.unbind(-1))


def _shares(phi: Tensor) -> Tensor:
    if phi.ndim == 0 or phi.shape[-1] == 0:
        raise ValueError("shares of no player")
    if not torch.isfinite(phi).all():
        raise ValueError(f"shares of Shapley values that are not finite: {phi.tolist()}")
    positive = phi.clamp(min=0)
    # By the largest first, so that the sum can neither vanish nor overflow.
    largest = positive.amax(-1, keepdim=True)
    positive = positive / torch.where(largest > 0, largest, 1.0)
    total = positive.sum(-1, keepdim=True)
    return torch.where(total > 0, positive / torch.where(total > 0, total, 1.0), 1 / phi.shape[-1])


# -- values of a view ------------------------------------------------------------------------------


def option_log_probs(logits: Tensor, exists: Tensor | None = None) -> Tensor:
    """Log-probabilities over the options of each question.

    Args:
        logits: (rows, options) scores at the answer's position.
        exists: (rows, options) bool, options that a question has; None: those whose score is not -inf.

    Returns:
        (rows, options), at least single precision; -inf at options that do not exist, through which no gradient flows.

    Raises:
        ValueError: a mask of another shape, or a question without options.
    """
    exists = existing(logits, exists)
    return _wide(logits).masked_fill(~exists, -torch.inf).log_softmax(-1)


def existing(logits: Tensor, exists: Tensor | None = None) -> Tensor:
    """(rows, options) bool, options that each question has; arguments and errors as in `option_log_probs`."""
    if exists is None:
        exists = logits.detach() != -torch.inf
    if exists.shape != logits.shape:
        raise ValueError(f"a mask of shape {tuple(exists.shape)} for options of shape {tuple(logits.shape)}")
    exists = exists.to(logits.device, torch.bool)
    if not exists.any(-1).all():
        raise ValueError(f"question {int((~exists.any(-1)).nonzero()[0])} of the batch has no options")
    return exists


def probability(logits: Tensor, labels: Tensor, exists: Tensor | None = None) -> Tensor:
    """(rows,) probability of the right option: a value of a view that a small batch resolves better than accuracy. No gradient.

    Args:
        logits, exists: as in `option_log_probs`.
        labels: (rows,) place of the right option.
    """
    return option_log_probs(logits.detach(), exists).gather(-1, labels[:, None])[:, 0].exp()


def accuracy(logits: Tensor, labels: Tensor, exists: Tensor | None = None) -> Tensor:
    """(rows,) 1.0 where the right option has the highest score, else 0.0; arguments as in `probability`. No gradient."""
    found = option_log_probs(logits.detach(), exists)
    return (found.argmax(-1) == labels).to(found.dtype)


def chance_corrected(value: Number, options: Number) -> Number:
    """(value - 1/C) / (1 - 1/C): 0 for guessing among C options, 1 for always right, negative below chance. Elementwise.

    Args:
        value: accuracy or probability of the right option.
        options: C, the number of options; may differ per question.

    Raises:
        ValueError: fewer than 2 options.
    """
    if not (torch.as_tensor(options) >= 2).all():
        raise ValueError(f"chance is defined for 2 options or more, not for {options}")
    return (value - 1 / options) / (1 - 1 / options)


def running_mean(past: Sequence[float] | None, now: Sequence[float], decay: float) -> list[float]:
    """Exponential running mean: decay * past + (1 - decay) * now. The first values stand for themselves.

    Raises:
        ValueError: decay outside [0, 1), or another number of values than before.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of a running mean must lie in [0, 1), not {decay}")
    if past is None:
        return [float(one) for one in now]
    return [decay * old + (1 - decay) * float(new) for old, new in zip(past, now, strict=True)]


def _wide(values: Tensor) -> Tensor:
    """At least single precision."""
    return values if values.dtype == torch.float64 else values.float()
