"""What pairs teach: which sides a preference needs, and how its terms are put together. No model lives here.

A side is an answer under a picture. For every side that some term needs, the trainer gives d = ln policy - ln reference of the
answer, summed over its tokens; a term with weight 0 needs none. Not every pair has every side: a term counts for the pairs that
have its sides, and as 0 for the others, so that mixed data can be trained on together.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.pair import Pair
from training import losses
from training.config import NoiseAware, Preference, RecipeError

OWN = "own"             # the spec of pictures that come with the pairs


class Side(NamedTuple):
    """An answer of a pair under one of its pictures."""
    picture: str        # own, other (the rejected picture), none
    answer: str         # chosen, rejected, prior, other (the right answer for the rejected picture)

    def __str__(self) -> str:
        return f"{self.picture}.{self.answer}"


CHOSEN, REJECTED, PRIOR = Side("own", "chosen"), Side("own", "rejected"), Side("own", "prior")
OTHER_IMAGE, BLIND = Side("other", "chosen"), Side("none", "chosen")
OWN_OTHER, OTHER_OTHER, BLIND_OTHER = Side("own", "other"), Side("other", "other"), Side("none", "other")
WATCHED = (OTHER_IMAGE, BLIND)

ANSWERS = {"chosen": "chosen", "rejected": "rejected", "prior": "rejected_prior", "other": "rejected_images_answer"}


def answer_of(pair: Pair, side: Side) -> str | None:
    """The text of a side's answer; None when the pair does not have it."""
    return getattr(pair, ANSWERS[side.answer])


def has(pair: Pair, side: Side, negative: str) -> bool:
    """Whether a pair has a side, given where rejected pictures come from (`preference.negative`)."""
    if answer_of(pair, side) is None:
        return False
    if side.picture == "own":
        return True
    return bool(pair.images) and (side.picture == "none" or negative != OWN or bool(pair.rejected_images))


@dataclass(frozen=True)
class Term:
    """One term of the loss: its weight, the sides that it needs, and its value per pair, given d of those sides by side."""
    weight: float
    sides: tuple[Side, ...]
    value: Callable[[Mapping[Side, Tensor]], Tensor]


def terms(preference: Preference) -> dict[str, Term]:
    """The terms with a weight, by name, but for those of TRL (`answer`) and `noise_aware`, whose q follows the run."""
    p, beta = preference, preference.beta
    found = {
        "conditional": Term(p.conditional, (CHOSEN, OTHER_IMAGE), lambda d: losses.conditional(d[CHOSEN], d[OTHER_IMAGE], beta)),
        "anchor": Term(p.anchor, (CHOSEN,), lambda d: losses.anchor(d[CHOSEN], beta, p.anchor_delta)),
        "attend": Term(p.attend, (CHOSEN, BLIND), lambda d: losses.dpo(d[CHOSEN], d[BLIND], beta)),
        "language_prior": Term(p.language_prior, (BLIND,), lambda d: losses.language_prior(d[BLIND], beta)),
        "svco": Term(p.svco, (CHOSEN, BLIND, OTHER_IMAGE, OWN_OTHER, BLIND_OTHER, OTHER_OTHER),
                     lambda d: losses.svco(d[CHOSEN], d[BLIND], d[OTHER_IMAGE], beta)
                     + losses.svco(d[OTHER_OTHER], d[BLIND_OTHER], d[OWN_OTHER], beta)),
    }
    if (s := p.sympmo) is not None:
        found["sympmo"] = Term(
            1.0, (CHOSEN, OWN_OTHER, OTHER_IMAGE, OTHER_OTHER),
            lambda d: losses.sympmo(d[CHOSEN], d[OWN_OTHER], d[OTHER_IMAGE], d[OTHER_OTHER], beta, s.lam, s.gamma, s.eta))
    return {name: term for name, term in found.items() if term.weight > 0}


def answer_terms(preference: Preference) -> dict[str, float]:
    """TRL's loss types with a weight."""
    return {name: weight for name, weight in preference.answer.items() if weight > 0}


def _noise_aware(preference: Preference) -> NoiseAware | None:
    noise = preference.noise_aware
    return noise if noise is not None and noise.weight > 0 else None


def needed(preference: Preference) -> tuple[Side, ...]:
    """The sides that some term needs."""
    sides: list[Side] = [CHOSEN, REJECTED] if answer_terms(preference) else []
    for term in terms(preference).values():
        sides += term.sides
    if _noise_aware(preference):
        sides += [CHOSEN, PRIOR]
    return tuple(dict.fromkeys(sides))


def watched(preference: Preference) -> tuple[Side, ...]:
    """The sides that are only logged."""
    return tuple(side for side in WATCHED if side not in needed(preference)) if preference.watch else ()


def applicable(preference: Preference, pairs: Iterable[Pair]) -> dict[str, int]:
    """By term, how many of the pairs have the sides it needs.

    Raises:
        RecipeError: no term has a weight, or language_prior alone, or one finds no pair that it could be applied to.
    """
    wanted = {name: term.sides for name, term in terms(preference).items()}
    wanted |= {f"answer.{name}": (CHOSEN, REJECTED) for name in answer_terms(preference)}
    if _noise_aware(preference):
        wanted["noise_aware"] = (CHOSEN, PRIOR)
    if not wanted:
        raise RecipeError("preference: no term has a weight above 0")
    if CHOSEN not in needed(preference):
        raise RecipeError("preference.language_prior: is an addition to another term; alone it only forgets")
    pairs = list(pairs)
    counts = {}
    for name, sides in wanted.items():
        counts[name] = sum(all(has(pair, side, preference.negative) for side in sides) for pair in pairs)
        if not counts[name]:
            missing = next(side for side in sides if not any(has(pair, side, preference.negative) for pair in pairs))
            raise RecipeError(f"preference.{name}: no pair has {_wanting(missing)}")
        symmetric = any(side.answer == "other" for side in sides)
        if symmetric and preference.negative != OWN:
            raise RecipeError(f"preference.negative: {name} needs the pictures that come with the pairs: own, "
                              f"not {preference.negative}")
    return counts


def _wanting(side: Side) -> str:
    field = ANSWERS[side.answer]
    if side.picture == "other":
        return f"{field} under rejected_images" if side.answer != "other" else "rejected_images and rejected_images_answer"
    return f"{field} and a picture to leave out" if side.picture == "none" else field


class NoisePace:
    """The q of the noise-aware term: a running mean of the batches' margins, and what follows from it.

    With memory m the mean is m times the last one plus 1 - m times the batch's, beginning with the first batch's own.
    """

    def __init__(self, noise: NoiseAware) -> None:
        self.noise, self.mean = noise, None

    def __call__(self, margin: Tensor) -> Tensor | float:
        """
        Args:
            margin: (pairs,) d of chosen minus d of the prior's answer, averaged over each answer's tokens, without beta.

        Returns:
            q for this batch, without gradient.
        """
        if not isinstance(self.noise.q, str):
            return self.noise.q
        now = margin.detach().mean()
        self.mean = now if self.mean is None else self.noise.memory * self.mean + (1 - self.noise.memory) * now
        return losses.noise_aware_q(self.mean, self.noise.alpha, form=self.noise.q)


def combine(preference: Preference, d: Mapping[Side, Tensor], there: Mapping[Side, Tensor], lengths: Mapping[Side, Tensor],
            pace: NoisePace | None) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss of one micro-batch, without TRL's answer terms: mean over pairs, of the terms' weighted sum.

    Args:
        d: (pairs,) log-ratio of each needed side; anything where the pair does not have it.
        there: (pairs,) bool by side: the pair has it.
        lengths: (pairs,) tokens of each side's answer.
        pace: of the noise-aware term, where there is one.

    Returns:
        The scalar, and by name each term's (sum, number) over the pairs that it applies to, without gradient.
    """
    pairs = len(next(iter(there.values())))
    total = torch.zeros((), device=next(iter(there.values())).device)
    shown: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, weight: float, sides: tuple[Side, ...], value: Callable[[dict[Side, Tensor]], Tensor]) -> None:
        nonlocal total
        able = torch.stack([there[side] for side in sides]).all(0)
        # Only the pairs that have the sides: a value computed from what is not there could be infinite, and 0 * inf is no number.
        each = value({side: d[side][able] for side in sides})
        total = total + weight * each.sum() / pairs
        shown[f"terms/{name}"] = each.detach().sum(), able.sum()

    for name, term in terms(preference).items():
        add(name, term.weight, term.sides, term.value)
    if (noise := _noise_aware(preference)) is not None:
        able = there[CHOSEN] & there[PRIOR]
        q = pace(d[CHOSEN][able] / lengths[CHOSEN][able] - d[PRIOR][able] / lengths[PRIOR][able]) if able.any() else 1.0
        shown["noise_aware/q"] = torch.as_tensor(q, device=total.device).detach() * able.sum(), able.sum()
        add("noise_aware", noise.weight, (CHOSEN, PRIOR), lambda d: losses.gce(preference.beta * (d[CHOSEN] - d[PRIOR]), q))
    return total, shown


def report(preference: Preference, d: Mapping[Side, Tensor], there: Mapping[Side, Tensor],
           lengths: Mapping[Side, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What is worth logging about log-ratios, as (sum, number of pairs): each d, margins, the share of chosen ones below 0.

    `margin/answer` is what DPO raises and says nothing about the picture; `margin/picture` is the chosen answer's under its own
    against the rejected picture; `margin/blind` against no picture at all: near 0 means that the words alone learned it.
    """
    def mean(values: Tensor, *sides: Side) -> tuple[Tensor, Tensor]:
        able = torch.stack([there[side] for side in sides]).all(0)
        return values.detach()[able].float().sum(), able.sum()

    shown = {f"log_ratio/{side}": mean(values, side) for side, values in d.items()}
    for name, side in (("answer", REJECTED), ("prior", PRIOR), ("picture", OTHER_IMAGE), ("blind", BLIND)):
        if side in d and CHOSEN in d:
            shown[f"margin/{name}"] = mean(preference.beta * (d[CHOSEN] - d[side]), CHOSEN, side)
    if CHOSEN in d:
        shown["chosen_below_0"] = mean((d[CHOSEN] < 0).float(), CHOSEN)
        shown["answer_tokens"] = mean(lengths[CHOSEN], CHOSEN)
    return shown
