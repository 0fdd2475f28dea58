"""LNLN (arXiv 2409.20012): learn from corrupted inputs, estimate how complete the dominant modality is, and mend it by a proxy.

Level 0 is corruption alone (data_prep.corrupt); without it, in the paper's ablation, most of the gain is lost. Level 1 adds the
estimate of completeness and reconstruction, level 2 the mended dominant feature with an adversary. Where the released code
(Haoyu-ha/LNLN) differs from the paper, the functions say so.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, mse_loss, scaled_dot_product_attention

from data_prep.corrupt import (  # noqa: F401  level 0, which evaluation needs too
    Seed,
    corrupt,
    corruption_rate,
    dropped,
    dropped_cells,
    generator,
    patches_of,
    replace,
)
from modeling.mender import Seen, mend, mixed, reverse_gradient  # noqa: F401  level 2, which is a part of the model

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


def losses(seen: Seen, rate_text: Tensor) -> dict[str, Tensor]:
    """L_cc ("cc"), L_adv ("adv") and L_rec ("rec", the mean of the modalities that are there) of a micro-batch: scalars.

    Args:
        seen: what the mender saw of it.
        rate_text: (rows,), the rate of corruption of each row's words.
    """
    pairs = [pair for pair in (seen.text, seen.image) if pair is not None]
    return {"cc": completeness_loss(seen.w.float(), rate_text), "adv": adversarial_loss(seen.scores.float(), seen.is_mended),
            "rec": sum(reconstruction_loss(found.float(), complete.float()) for found, complete in pairs) / len(pairs)}


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
