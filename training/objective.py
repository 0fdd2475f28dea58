"""Which views a loss needs of a drawn problem, and how its terms are put together: one scalar per micro-batch.

A loss names roles: a role shows every problem of the batch in a view that depends on the view it was drawn in. The collator
builds exactly those batches, the trainer runs exactly those, and the terms here see nothing but log-probabilities of the answers'
tokens.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.problem import View
from training.balance.settings import Balance
from training.config import CrossModalKL, Loss, RecipeError
from training.losses import cross_modal_kl, evidence_weights, jensen_shannon, weighted_nll

WITHOUT_PICTURE = {View.both: View.text, View.vision: View.blind}
OTHER_SIDE = {View.both: View.vision, View.vision: View.both}
# The unimodal branches of a balance method: who carries what is asked about
BRANCHES = {
    "image": {View.both: View.vision, View.vision: View.vision},
    "text": WITHOUT_PICTURE,
    "none": {View.both: View.blind, View.vision: View.blind},
}


VIEWS = tuple(View)             # a view's number, as batches carry it, is its place here


class Role(NamedTuple):
    """One more look at the problems of a batch."""
    shown: dict[View, View]     # drawn view -> view of this role
    learns: bool                # whether a gradient flows through it
    full: bool = False          # whether the whole distribution is needed, not only the answer's token
    some: bool = False          # problems drawn in other views take no part, and are shown as they were drawn
    question: bool = True       # False: without the question, its options and instruction staying

    def view_of(self, drawn: View) -> View:
        """The view in which a drawn problem is shown. KeyError when there is none."""
        return self.shown.get(drawn, drawn) if self.some else self.shown[drawn]


@dataclass
class Answers:
    """The answers' tokens of one micro-batch in one view, row after row; the same tokens in every view."""
    log_probs: Tensor           # (tokens,)
    right: Tensor               # (tokens,) bool: the token is the model's first choice
    entropy: Tensor             # (tokens,) of the model's distribution
    distribution: Tensor | None  # (tokens, vocabulary) log-probabilities, where they were asked for
    hidden: Tensor | None = None    # (tokens, width) what the output layer reads, beside the distribution


def roles(loss: Loss) -> dict[str, Role]:
    """The roles that a loss needs beside the drawn view.

    Raises:
        RecipeError: a view of the loss does not exist.
    """
    found = {}
    if (kl := loss.cross_modal_kl) is not None and kl.coef > 0:
        for key, names in (("teacher", [kl.teacher]), ("student", [kl.student]), ("drawn", kl.drawn or ())):
            for view in names:
                if view not in View.__members__:
                    raise RecipeError(f"loss.cross_modal_kl.{key}: no such view: {view}; views: {', '.join(View.__members__)}")
        full, drawn = kl.estimator == "full", _taking_part(kl)
        found["teacher"] = Role({view: View(kl.teacher) for view in drawn}, False, full, kl.drawn is not None)
        found["student"] = Role({view: View(kl.student) for view in drawn}, True, full, kl.drawn is not None)
    if loss.consistency is not None and loss.consistency.coef > 0:
        found["other_side"] = Role(OTHER_SIDE, True, True)
    if loss.weigh == "evidence":
        found["without_picture"] = Role(WITHOUT_PICTURE, False)
    return found


def _taking_part(kl: CrossModalKL) -> tuple[View, ...]:
    return VIEWS if kl.drawn is None else tuple(View(name) for name in kl.drawn)


def branch_roles(balance: Balance, step: int) -> dict[str, Role]:
    """The unimodal branches that a balance method needs at an optimizer step."""
    return {name: Role(BRANCHES[name], learns, True, question=name == "text" or balance.question == "kept")
            for name, learns in balance.views(step).items()}


def needs(loss: Loss, drawn: View, balance: Balance | None = None) -> tuple[View, ...]:
    """The views in which a loss and a balance method show the problems of a drawn view as well.

    Raises:
        RecipeError: one of them knows no counterpart of that view.
    """
    views = []
    if balance is not None:
        if drawn not in BRANCHES["none"]:
            raise RecipeError(f"balance: the mixture draws the view {drawn.value}, which has no picture side and word side to "
                              f"balance; it may draw {', '.join(view.value for view in BRANCHES['none'])}")
        views += [shown[drawn] for shown in BRANCHES.values()]
    for name, role in roles(loss).items():
        if drawn not in role.shown and not role.some:
            raise RecipeError(f"loss: the mixture draws the view {drawn.value}, for which there is no {name.replace('_', ' ')}; "
                              f"it may draw {', '.join(view.value for view in role.shown)}")
        views.append(role.view_of(drawn))
    return tuple(dict.fromkeys(views))


def extra_roles(loss: Loss, drawn: Collection[View]) -> dict[str, Role]:
    """The roles that are not the drawn view itself for every view that a mixture draws.

    Decided for the mixture and not for a batch, so that all ranks run the same passes.
    """
    return {name: role for name, role in roles(loss).items() if any(role.view_of(view) is not view for view in drawn)}


class Objective:
    """The loss of one stage.

    Args:
        loss: the recipe's section.
        drawn: the views that the stage's mixture draws.
    """

    def __init__(self, loss: Loss, drawn: Collection[View]) -> None:
        self.loss, self.roles = loss, roles(loss)
        self.extra = extra_roles(loss, drawn)

    @property
    def full(self) -> bool:
        """Whether the drawn view's whole distribution is needed."""
        return any(role.full for name, role in self.roles.items() if name not in self.extra or name == "other_side")

    def __call__(self, look: Callable[[str | None, bool, bool], Answers], loss_weight: Tensor, answer: Tensor, view: Tensor,
                 total: Tensor | float, tokens: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            look: (name of a role or None for the drawn view, learns, full) -> the answers in that view.
            loss_weight: (tokens,) of the answers' tokens.
            answer: (tokens,) which answer of the micro-batch a token belongs to, counted from 0.
            view: (tokens,) number of the view that the token's problem was drawn in; see VIEWS.
            total: loss_weight of the whole optimizer step; see losses.weighted_nll.
            tokens: number of answer tokens in the whole optimizer step. Terms that are means over tokens are divided by it, and
                not by what a micro-batch happens to hold, so that the gradient does not depend on how the step is cut.

        Returns:
            The loss and, by name, sums over tokens of what is worth logging.
        """
        main = look(None, True, self.full)
        sides = {name: look(name, role.learns, role.full) if name in self.extra else main for name, role in self.roles.items()}
        shown: dict[str, Tensor] = {}
        if "without_picture" in sides:
            evidence = evidence_weights(main.log_probs, sides["without_picture"].log_probs, self.loss.evidence_floor)
            loss_weight = loss_weight * evidence
            shown["evidence"] = evidence.sum()
        loss = weighted_nll(main.log_probs, loss_weight, total)
        if "teacher" in sides:
            kl = self.loss.cross_modal_kl
            teacher, student = sides["teacher"], sides["student"]
            mask = torch.isin(view, view.new_tensor([VIEWS.index(one) for one in _taking_part(kl)])).float()
            right = mask * _answers_right(teacher.right, answer)
            if kl.answers == "right":
                mask = right
            pick = (lambda side: side.distribution) if kl.estimator == "full" else (lambda side: side.log_probs)
            value = cross_modal_kl(pick(teacher), pick(student), mask, estimator=kl.estimator, clamp=kl.clamp) * mask.sum()
            loss = loss + kl.coef * value / _at_least_one(tokens)
            shown |= {"cross_modal_kl": value.detach(), "teacher_right": right.sum()}
        if "other_side" in sides:
            mask = torch.ones_like(main.log_probs)
            value = jensen_shannon(main.distribution, sides["other_side"].distribution, mask) * mask.sum()
            loss = loss + self.loss.consistency.coef * value / _at_least_one(tokens)
            shown["consistency"] = value.detach()
        return loss, shown


def _answers_right(right: Tensor, answer: Tensor) -> Tensor:
    """(tokens,) 1.0 on the tokens of answers of which every token is right."""
    wrong = torch.zeros(int(answer.max()) + 1 if len(answer) else 0, device=right.device)
    wrong.index_add_(0, answer, (~right).float())
    return (wrong[answer] == 0).float()


def _at_least_one(tokens: Tensor | float) -> Tensor | float:
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)
