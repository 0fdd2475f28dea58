"""What a balance method sees of a micro-batch: the answers' scores in the drawn view and in each unimodal branch.

A branch is a view of the same model: `image` has the picture and no facts, `text` the facts and no picture, `none` neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from training.balance.shapley import chance_corrected, option_log_probs, probability


@dataclass
class Seen:
    """The answers of one micro-batch in one view, in the order of their rows.

    options: (answers, most options) log-probabilities, not normalised, the right one first; -inf where there is none, throughout
        for an open answer.
    log_prob: (answers,) mean log-probability of the right answer's tokens.
    hidden: (answers, width) what the output layer reads before an answer's first token.
    tokens: (answers, most options) ids that `options` are decided by at that place, the right one first; -1 where an option is
        decided later, or there is none.
    first: (answers, vocabulary) log-probabilities of the first token; right: (answers,) which one is right.
    """
    options: Tensor
    log_prob: Tensor
    hidden: Tensor
    tokens: Tensor
    first: Tensor
    right: Tensor

    @property
    def closed(self) -> Tensor:
        """(answers,) bool: whether there are options to choose from."""
        return (self.options.detach() != -torch.inf).sum(-1) > 1

    def own_loss(self) -> Tensor:
        """(answers,) cross-entropy over the options; of an open answer its negative mean log-probability."""
        loss = -self.log_prob
        if (closed := self.closed).any():
            loss = loss.masked_scatter(closed, -option_log_probs(self.options[closed])[:, 0].to(loss))
        return loss

    def value(self, metric: str, *, corrected: bool = True) -> Tensor:
        """(answers,) how well the view answers: probability of the right option or accuracy, corrected for chance over the true
        number of options unless told otherwise; of an open answer exp of its mean log-probability. No gradient.

        Of equally likely best options each is chosen by its share: in half precision they are not rare, and the right one, being
        the first, would win all of them.
        """
        value = self.log_prob.detach().exp()
        if (closed := self.closed).any():
            options = self.options.detach()[closed]
            if metric == "probability":
                found = probability(options, options.new_zeros(len(options)).long())
            else:
                best = (options == options.amax(-1, keepdim=True)).to(options.dtype)
                found = best[:, 0] / best.sum(-1)
            if corrected:
                found = chance_corrected(found, (options != -torch.inf).sum(-1))
            value = value.masked_scatter(closed, found.to(value))
        return value


def branches(answers: Sequence[tuple[int, ...]], right: int) -> list[tuple[int, int]]:
    """Where each option leaves the right answer, so that one pass over the right answer scores them all.

    An option is decided by its first token that differs from the right answer's. Options that leave it at the same place by the
    same token cannot be told apart there, and count as one. The log-probability of an option is that of the way up to its
    branch and of the token it branches off by; of options of one token this is the token's own.

    Args:
        answers: token ids of each option, the end of the turn included, so that none is the beginning of another.
        right: place of the right one.

    Returns:
        (place in the answer, token) per option that can be told apart, the right one first: it is decided where the last of the
        others leaves it.

    Raises:
        ValueError: an option that equals the right one.
    """
    gold, found = answers[right], {}
    for number, answer in enumerate(answers):
        if number != right:
            place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, gold)))
            if place == len(gold) or place == len(answer):
                raise ValueError(f"option {number} has the same tokens as the right answer")
            found[place, answer[place]] = None
    last = max((place for place, _ in found), default=0)
    return [(last, gold[last]), *found]


def see(log_probs: Tensor, labels: Tensor, answer: Tensor, hidden: Tensor, at: Tensor, token: Tensor) -> Seen:
    """Scores of the answers of a micro-batch from its answers' tokens.

    Args:
        log_probs: (tokens, vocabulary) at the answers' tokens, row after row.
        labels: (tokens,) the right token; answer: (tokens,) number of the answer that it belongs to, counted from 0.
        hidden: (tokens, width) inputs of the output layer.
        at, token: (answers, most options) what `branches` found, -1 where there is none; an open answer has none.
    """
    right = log_probs.gather(1, labels[:, None])[:, 0]
    answers = len(at)
    length = torch.bincount(answer, minlength=answers)
    start = length.cumsum(0) - length
    way = torch.cat([right.new_zeros(1), right.cumsum(0)])          # sum over the tokens before each
    exists = at >= 0
    place = start[:, None] + at.clamp(min=0)
    options = way[place] - way[start][:, None] + log_probs[place, token.clamp(min=0)]
    return Seen(options=options.masked_fill(~exists, -torch.inf),
                log_prob=right.new_zeros(answers).index_add(0, answer, right) / length,
                hidden=hidden[start], tokens=token.masked_fill(at != 0, -1), first=log_probs[start],
                right=labels[start])
