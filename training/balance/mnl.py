"""MNL, multimodal negative learning (arXiv 2510.20877): the surer modality tells the other one what the answer is not.

The guidance terms only; cross-entropies are the caller's. Sides are decided per row: a row has one teacher or none. Where the
released code (BaoquanGong/Multimodal-Negative-Learning) differs from the paper, the functions say so.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from training.balance.hook import Method
from training.balance.settings import SIDES, Mnl
from training.balance.shapley import existing, option_log_probs
from training.balance.views import Seen


def negative_learning(text_logits: Tensor, image_logits: Tensor, fused_logits: Tensor, labels: Tensor, *, lam: float = 0.7,
                      student_ce: bool = True, reduction: str = "elements", among: str = "all", exists: Tensor | None = None,
                      rows: Tensor | float | None = None) -> Tensor:
    """Both guidance terms, text to image and image to text: `guidance` on the rows that `teachers` gives to each.

    Args:
        text_logits, image_logits: (rows, options) of each modality by itself. A gradient flows into a row of one of them only
            where that one is the student.
        fused_logits: (rows, options) of the joint prediction; it names the strongest wrong option, and gets no gradient.
        labels: (rows,) place of the right option.
        lam: weight of the wrong options; 0.7 in the released scripts.
        student_ce: the released code's additional positive cross-entropy of the student, which the paper does not have.
        reduction: "elements", as released: divided by rows * options, so that lam counts only lam / options; "batch", as in
            the paper: divided by rows. Rows without a teacher count too.
        among: "all", as in paper and code: the student's probabilities are those over all options. Each term then also lowers the
            right option's logit, by lam (1 - p_teacher(right)) p_student(right) in all, which a cross-entropy beside it has to
            make good. "wrong", ours: they are those over the wrong options, and the right one's logit gets no gradient.
        exists: (rows, options) bool, options that a row has; None: those whose fused logit is not -inf. "elements" divides each
            row by its own number of options.
        rows: what to divide by in place of the rows given here: those of the whole optimizer step, over micro-batches and
            ranks.

    Returns:
        Scalar; 0 with gradients of 0 where no row has a teacher, or there are no rows.

    Raises:
        ValueError: unknown reduction or among, shapes that do not fit, or a label at an option that does not exist.
    """
    exists = existing(fused_logits, exists)
    by_text, by_image = teachers(text_logits, image_logits, fused_logits, labels, exists=exists)
    options = dict(lam=lam, student_ce=student_ce, reduction=reduction, among=among, exists=exists, rows=rows)
    return (guidance(text_logits, image_logits, labels, by_text, **options)
            + guidance(image_logits, text_logits, labels, by_image, **options))


def teachers(text_logits: Tensor, image_logits: Tensor, fused_logits: Tensor, labels: Tensor, *,
             exists: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows in which text teaches, rows in which the image teaches; no row has both, and many have none. No gradient.

    A modality teaches where it has both the larger probability of the right option and the larger margin xi = logit of the
    right option - logit of j. j is the joint prediction's strongest wrong option, one for both modalities. Ties are the image's
    (released code).

    Args:
        As in `negative_learning`.

    Returns:
        ((rows,), (rows,)) bool. Rows with a single option have no teacher.
    """
    exists = existing(fused_logits, exists)
    text, image, fused = (logits.detach() for logits in (text_logits, image_logits, fused_logits))
    if not text.shape == image.shape == fused.shape:
        raise ValueError(f"text, image and fused logits are of shapes {tuple(text.shape)}, {tuple(image.shape)} and "
                         f"{tuple(fused.shape)}")
    right = _right(labels, exists)
    j = strongest_wrong(fused, labels, exists)[:, None]
    place = labels[:, None]
    text_margin, image_margin = (logits.gather(-1, place) - logits.gather(-1, j) for logits in (text, image))
    text_p, image_p = (option_log_probs(logits, exists).gather(-1, place) for logits in (text, image))
    wrong = (exists & ~right).any(-1)
    by_text = (text_margin > image_margin) & (text_p > image_p)
    by_image = (text_margin <= image_margin) & (text_p <= image_p)
    return by_text[:, 0] & wrong, by_image[:, 0] & wrong


def strongest_wrong(logits: Tensor, labels: Tensor, exists: Tensor | None = None) -> Tensor:
    """(rows,) place of the highest logit among the wrong options that exist; of equal ones the first."""
    exists = existing(logits, exists)
    return logits.detach().masked_fill(~exists | _right(labels, exists), -torch.inf).argmax(-1)


def guidance(teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, guided: Tensor, *, lam: float = 0.7,
             student_ce: bool = True, reduction: str = "elements", among: str = "all", exists: Tensor | None = None,
             rows: Tensor | float | None = None) -> Tensor:
    """One direction: - sum over wrong options c of lam sg(p_teacher(c)) ln p_student(c), over the guided rows.

    With student_ce, - ln p_student(right) is added. The joint prediction may be a teacher too.

    Args:
        teacher_logits, student_logits: (rows, options); no gradient flows into the teacher.
        guided: (rows,) bool, rows in which this teacher teaches.
        Others: as in `negative_learning`.

    Returns:
        Scalar.
    """
    if reduction not in ("elements", "batch"):
        raise ValueError(f"no such reduction: {reduction}; there are elements and batch")
    if among not in ("all", "wrong"):
        raise ValueError(f"no such options to guide among: {among}; there are all and wrong")
    exists = existing(student_logits, exists)
    right = _right(labels, exists)
    teacher = option_log_probs(teacher_logits.detach(), exists).exp()
    # What does not exist is -inf there, and must not come back as 0 * inf.
    student = option_log_probs(student_logits, exists).masked_fill(~exists, 0.0)
    if among == "wrong":
        others = exists & ~right
        able = others.any(-1, keepdim=True)         # a row without wrong options has nothing to be guided among
        alone = option_log_probs(student_logits, torch.where(able, others, exists)).masked_fill(~(others & able), 0.0)
        student = torch.where(right, student, alone)
    weight = torch.where(right, float(student_ce), lam * teacher) * guided.to(teacher.dtype)[:, None]
    each = -(weight * student).sum(-1)
    if reduction == "elements":
        each = each / exists.sum(-1)
    return each.sum() / (max(len(labels), 1) if rows is None else rows)


def top_options(logits: Tensor, labels: Tensor, count: int = 50) -> Tensor:
    """The likeliest answers as options where there are none: places in the vocabulary, the right one always among them.

    Args:
        logits: (rows, vocabulary) of a teacher; labels: (rows,) the right token.
        count: options per row, from 2 to the vocabulary.

    Returns:
        (rows, count) places, the right one first, so that labels are 0 after `logits.gather(-1, places)`.
    """
    if not 2 <= count <= logits.shape[-1]:
        raise ValueError(f"{count} options out of a vocabulary of {logits.shape[-1]}")
    others = logits.detach().scatter(-1, labels[:, None], -torch.inf).topk(count - 1, -1).indices
    return torch.cat([labels[:, None], others], -1)


def _right(labels: Tensor, exists: Tensor) -> Tensor:
    """(rows, options) bool, the right option of each row."""
    right = torch.zeros_like(exists).scatter(-1, labels[:, None], True)
    if (right & ~exists).any():
        row = int((right & ~exists).any(-1).nonzero()[0])
        raise ValueError(f"row {row} of the batch is labelled with option {int(labels[row])}, which it does not have")
    return right


class MnlMethod(Method):
    """MNL between the branches of one model; the drawn view is the joint prediction.

    The options of an open answer are the first tokens that the joint prediction finds likeliest. Text teaching the image's branch
    reaches every tower, the image teaching the text's branch only the language tower.
    """

    settings: Mnl

    def loss(self, views: Mapping[str, Seen], answers: Tensor | float) -> Tensor | None:
        if not views:
            return None                 # still warming up
        text, image, both = views["text"], views["image"], views["both"]
        loss = both.log_prob.sum() * 0
        if self.world.step() >= self.settings.warmup_steps:
            closed = both.closed
            tables = [(text.options[closed], image.options[closed], both.options[closed])]
            if not closed.all():
                places = top_options(both.first[~closed], both.right[~closed], min(self.settings.top, both.first.shape[-1]))
                tables.append(tuple(one.first[~closed].gather(-1, places) for one in (text, image, both)))
            taught = {side: 0 for side in SIDES}
            for table in tables:
                if len(table[0]):
                    labels = table[0].new_zeros(len(table[0])).long()
                    loss = loss + negative_learning(*table, labels, lam=self.settings.lam, student_ce=self.settings.student_ce,
                                                    reduction=self.settings.reduction, among=self.settings.options, rows=answers)
                    for side, rows in zip(("text", "image"), teachers(*table, labels)):
                        taught[side] += int(rows.sum())
            self.shown |= {f"taught_by_{side}": count / max(len(closed), 1) for side, count in taught.items()}
        if self.settings.own:
            loss = loss + self.settings.own * (text.own_loss().sum() + image.own_loss().sum()) / answers
        return self.strength * loss
