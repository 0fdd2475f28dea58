"""LNLN (arXiv 2409.20012): learn from corrupted inputs, estimate how complete the dominant modality is, and mend it by a proxy.

Level 0 is corruption alone; without it, in the paper's ablation, most of the gain is lost. Level 1 adds the estimate of
completeness and reconstruction, level 2 the mended dominant feature with an adversary. Where the released code
(Haoyu-ha/LNLN) differs from the paper, the functions say so.
"""

import hashlib
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, mse_loss, scaled_dot_product_attention

Seed = int | str | Sequence        # numbers and names, nested as one likes: (seed, epoch, "problem id", "text")


# -- level 0: corruption ---------------------------------------------------------------------------


def generator(seed: Seed) -> np.random.Generator:
    """Random numbers that depend on the seed alone: not on the process, the order of rows, or what was drawn before.

    Raises:
        TypeError: a seed with something else than integers, strings and sequences of these.
    """
    return np.random.default_rng(np.frombuffer(hashlib.sha256(_spell(seed).encode()).digest(), dtype=np.uint32))


def _spell(seed: Seed) -> str:
    if isinstance(seed, str):
        return repr(seed)
    if isinstance(seed, Sequence):
        return f"({','.join(map(_spell, seed))})"
    return str(operator.index(seed))        # the same for 3 of any integer type


def corruption_rate(*, seed: Seed, chance: float = 0.5, highest: float = 1.0) -> float:
    """The rate of one modality of one sample: U(0, highest) with probability `chance`, else 0. Defaults are the paper's."""
    hit, rate = generator(seed).random(2)
    return float(highest * rate) if hit < chance else 0.0


def dropped(shape: Sequence[int], rate: float | Tensor, *, seed: Seed) -> Tensor:
    """Positions that corruption removes: each by itself with probability `rate`, where its uniform draw is below it.

    For one seed, a higher rate removes what a lower one does and more. The released code draws with one fixed seed at every
    call and redraws rates only now and then, so that most of its masks never change. Give the epoch and the sample in the seed.

    Args:
        shape: of the mask.
        rate: in [0, 1]; a number, or a tensor whose axes are the first ones of the mask, such as (rows,).
        seed: see `generator`.

    Returns:
        Bool tensor.

    Raises:
        ValueError: a rate outside [0, 1].
    """
    rate = torch.as_tensor(rate, dtype=torch.float64).cpu()
    if not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError(f"a corruption rate must lie between 0 and 1, not {rate.tolist()}")
    draws = torch.from_numpy(generator(seed).random(tuple(shape)))
    return draws < rate.reshape(*rate.shape, *[1] * (draws.ndim - rate.ndim))


def replace(tokens: Tensor, dropped: Tensor, *, keep: Tensor | None, missing: float | Tensor) -> Tensor:
    """Tokens with `missing` where they are dropped and not kept.

    Args:
        tokens: (...) ids, or (..., width) features.
        dropped: bool; its axes are the first ones of `tokens`.
        keep: bool, the shape of `dropped`: positions that are never touched, such as system, options, answer; None: none.
        missing: an id, a number, or a (learned) vector (width,).

    Raises:
        ValueError: masks that do not fit.
    """
    if keep is not None and keep.shape != dropped.shape or tokens.shape[:dropped.ndim] != dropped.shape:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}, dropped {tuple(dropped.shape)}, keep "
                         f"{None if keep is None else tuple(keep.shape)}: masks must have the first axes of the tokens")
    gone = dropped.to(tokens.device)
    if keep is not None:
        gone = gone & ~keep.to(tokens.device, torch.bool)
    gone = gone.reshape(*gone.shape, *[1] * (tokens.ndim - gone.ndim))
    return torch.where(gone, torch.as_tensor(missing, dtype=tokens.dtype, device=tokens.device), tokens)


def corrupt(tokens: Tensor, rate: float | Tensor, *, seed: Seed, keep: Tensor | None, missing: float | Tensor) -> Tensor:
    """Tokens of which each, unless kept, is replaced by `missing` with probability `rate`: `dropped`, then `replace`.

    The mask has the shape of `keep`, or of `tokens` without it, and depends on the seed and that shape alone. For masks that
    do not depend on the batch, corrupt each row with a seed of its own.
    """
    return replace(tokens, dropped(tokens.shape if keep is None else keep.shape, rate, seed=seed), keep=keep, missing=missing)


def dropped_cells(grid: Sequence[int], rate: float, *, seed: Seed, merge: int = 2) -> Tensor:
    """Merged cells of one picture that corruption removes: what the language tower sees as one token goes as a whole.

    Args:
        grid: (frames, height, width) in patches, a row of `image_grid_thw`.
        merge: patches per side of a cell.

    Returns:
        (cells,) bool in the order of the picture's tokens.

    Raises:
        ValueError: a grid that cells do not tile.
    """
    frames, height, width = (int(side) for side in grid)
    if height % merge or width % merge:
        raise ValueError(f"a grid of {height} x {width} patches is not tiled by cells of {merge} x {merge}")
    return dropped((frames, height // merge, width // merge), rate, seed=seed).flatten()


def patches_of(cells: Tensor, merge: int = 2) -> Tensor:
    """(patches,) bool, the patches of cells, in the order of `pixel_values`: the patches of a cell follow each other."""
    return cells.repeat_interleave(merge * merge)


# -- level 1: completeness and reconstruction ------------------------------------------------------


def completeness(rate: float | Tensor) -> float | Tensor:
    """What the estimate of completeness should be: 1 - rate of the dominant modality's corruption."""
    return 1 - rate


def completeness_loss(estimate: Tensor, rate: Tensor) -> Tensor:
    """L_cc: mean squared error of the estimate, (rows, 1) or (rows,), from 1 - rate, of the same shape."""
    return mse_loss(estimate, completeness(rate).to(estimate))


def reconstruction_loss(reconstructed: Tensor, complete: Tensor) -> Tensor:
    """L_rec: mean squared error of features of corrupted inputs, mended, from those of complete inputs, of one shape.

    No gradient flows into the target; in the released code it does, and shrinking the features lowers that loss too.
    """
    return mse_loss(reconstructed, complete.detach())


# -- level 2: the mended dominant feature ----------------------------------------------------------


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """x itself; its gradient is turned round and multiplied by `strength`. The paper's strength is 1."""
    return _Reverse.apply(x, strength)


def mixed(proxy: Tensor, dominant: Tensor, completeness: Tensor) -> Tensor:
    """h_d = (1 - w) h_p + w h_l: as much of the proxy as is missing of the dominant modality.

    Args:
        proxy, dominant: (rows, tokens, width).
        completeness: w in [0, 1], (rows,) or (rows, 1).
    """
    w = completeness.reshape(len(proxy), *[1] * (proxy.ndim - 1))
    return (1 - w) * proxy + w * dominant


def mend(proxy: Tensor, dominant: Tensor, completeness: Tensor, *, grl_on_proxy: bool = False) -> tuple[Tensor, Tensor]:
    """(h_d, what the discriminator sees of it), the same values with different gradients.

    The gradient is reversed at the discriminator's input, as in the paper. grl_on_proxy: on the proxy before the mixture, as
    released; every loss then reaches the proxy reversed, the task's too, and the discriminator's reaches the dominant feature
    unreversed.
    """
    if grl_on_proxy:
        found = mixed(reverse_gradient(proxy), dominant, completeness)
        return found, found
    found = mixed(proxy, dominant, completeness)
    return found, reverse_gradient(found)


def adversarial_loss(scores: Tensor, is_mended: Tensor) -> Tensor:
    """L_adv: cross-entropy of the discriminator's scores (tokens, 2): class 1 for mended tokens, 0 for complete ones.

    Args:
        is_mended: (tokens,) bool or 0 and 1.
    """
    return cross_entropy(scores, is_mended.long())


def total_loss(terms: Mapping[str, Tensor] | Sequence[Tensor], weights: Mapping[str, float] | Sequence[float]) -> Tensor:
    """Weighted sum of the terms; one of weight 0 is left out, whatever it is. LNLN: .9 L_cc + .8 L_adv + .1 L_rec + 1 L_sp.

    Args:
        terms: scalars, by name or in order.
        weights: of the same names, or as many.

    Raises:
        ValueError: terms and weights of different names or numbers, or none.
    """
    terms, weights = (one if isinstance(one, Mapping) else dict(enumerate(one)) for one in (terms, weights))
    if set(terms) != set(weights) or not terms:
        raise ValueError(f"terms {sorted(terms)} with weights for {sorted(weights)}")
    counted = [weights[name] * term for name, term in terms.items() if weights[name] != 0]
    return sum(counted[1:], counted[0]) if counted else torch.zeros_like(next(iter(terms.values())))


def hyper_layer(dominant: Tensor, first: Tensor, second: Tensor, hyper: Tensor, weights: Mapping[str, Tensor],
                heads: int) -> Tensor:
    """One layer of hyper-modality learning: hyper + out(att(q, first) + att(q, second)) with q from the dominant feature.

    The paper stacks it behind the mended feature; a language model that attends to picture and text has no use for it.

    Args:
        dominant, first, second, hyper: (rows, tokens, width).
        weights: of linear layers (out, in): to_q, to_k_ta, to_v_ta (keys, values of `first`), to_k_tv, to_v_tv (of `second`),
            to_out, and the bias to_out.bias.
        heads: of attention, scaled by (width of a head)^-1/2.
    """
    def split(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[name]).unflatten(-1, (heads, -1)).transpose(1, 2)

    q = split(dominant, "to_q")
    found = sum(scaled_dot_product_attention(q, split(x, f"to_k_{key}"), split(x, f"to_v_{key}"))
                for x, key in ((first, "ta"), (second, "tv")))
    return hyper + linear(found.transpose(1, 2).flatten(2), weights["to_out"], weights["to_out.bias"])
