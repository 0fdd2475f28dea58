"""MNL: who teaches whom, and the guidance terms against published numbers and by hand."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.anchors import ANCHORS, det, numbers, same
from training.balance.mnl import guidance, negative_learning, strongest_wrong, teachers, top_options

KNOWN = ANCHORS["MNL"]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def branches():
    """Logits of text and image, leaves, and of their mean."""
    text, image = det((6, 4), 0.9, 0.2, 2).requires_grad_(), det((6, 4), 0.37, 1.1, 2).requires_grad_()
    return text, image, 0.5 * text + 0.5 * image


@pytest.mark.parametrize("lam", KNOWN["by_lambda"])
def test_known_losses_and_gradients(lam):
    text, image, fused = branches()
    plain = sum(cross_entropy(logits, LABELS) for logits in (text, image, fused))
    assert plain.item() == pytest.approx(KNOWN["cross_entropies"], abs=1e-14)
    loss = plain + negative_learning(text, image, fused, LABELS, lam=float(lam), student_ce=True, reduction="elements")
    known = KNOWN["by_lambda"][lam]
    assert loss.item() == pytest.approx(known["loss"], abs=1e-14)
    loss.backward()
    same(text.grad, known["text_gradient"], 1e-15)
    same(image.grad, known["image_gradient"], 1e-15)


def test_known_teachers():
    text, image, fused = branches()
    assert strongest_wrong(fused, LABELS).tolist() == KNOWN["strongest_wrong"]
    by_text, by_image = teachers(text, image, fused, LABELS)
    assert by_text.int().tolist() == KNOWN["text_teaches"] and by_image.int().tolist() == KNOWN["image_teaches"]
    assert not (by_text & by_image).any() and not (by_text | by_image)[0], "row 0 has no teacher"


def test_a_teacher_needs_the_larger_margin_and_the_larger_probability():
    """The right option is the first. Row 1: text has both. Row 2: the strongest wrong option of the joint prediction is the
    third, over which text has the larger margin (3 - 2 against 0.4 - 0), but not the larger probability. Row 3: a tie, the
    image's."""
    text = numbers([[3, 0, 0], [3, 3.5, 2], [1, 0, 0]])
    image = numbers([[1, 0, 0], [0.4, -9, 0], [1, 0, 0]])
    fused = numbers([[2, 0, 0], [2, 0, 1], [1, 0, 0]])
    labels = torch.zeros(3, dtype=torch.long)
    assert strongest_wrong(fused, labels).tolist() == [1, 2, 1]
    by_text, by_image = teachers(text, image, fused, labels)
    assert by_text.tolist() == [True, False, False] and by_image.tolist() == [False, False, True]


def by_hand(lam, student_ce, reduction, options=3):
    """One row of three options, right: the first. Text (1/2, 1/4, 1/4) teaches the image, of (1/4, 1/2, 1/4): with w = the
    student's own positive term, loss = w ln 4 + lam (1/4 ln 2 + 1/4 ln 4), over 1 row, or over 1 row of 3 options."""
    text = numbers([[1 / 2, 1 / 4, 1 / 4]]).log().requires_grad_()
    image = numbers([[1 / 4, 1 / 2, 1 / 4]]).log().requires_grad_()
    loss = negative_learning(text, image, (text + image) / 2, torch.tensor([0]), lam=lam, student_ce=student_ce,
                             reduction=reduction)
    expected = (student_ce * math.log(4) + lam * (math.log(2) + math.log(4)) / 4) / (options if reduction == "elements" else 1)
    return loss, expected, text, image


@pytest.mark.parametrize("lam", (0.0, 0.7, 2.0))
@pytest.mark.parametrize("student_ce", (True, False))
@pytest.mark.parametrize("reduction", ("elements", "batch"))
def test_guidance_by_hand(lam, student_ce, reduction):
    loss, expected, text, image = by_hand(lam, student_ce, reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-15)
    loss.backward()
    assert text.grad is None or not text.grad.any(), "the teacher is not taught"
    # d/dz of - sum_c a_c ln p_c is p sum(a) - a.
    a = numbers([[float(student_ce), lam / 4, lam / 4]])
    expected = (numbers([[1 / 4, 1 / 2, 1 / 4]]) * a.sum() - a) / (3 if reduction == "elements" else 1)
    torch.testing.assert_close(image.grad, expected, rtol=0, atol=1e-15)


def test_without_lambda_and_without_the_positive_term_it_is_nothing():
    text, image, fused = branches()
    loss = negative_learning(text, image, fused, LABELS, lam=0.0, student_ce=False)
    loss.backward()
    assert loss.item() == 0 and not text.grad.any() and not image.grad.any()


def test_a_gradient_flows_into_the_student_alone_and_not_into_the_fused_prediction():
    text, image, _ = branches()
    fused = (0.5 * text + 0.5 * image).detach().requires_grad_()
    negative_learning(text, image, fused, LABELS).backward()
    assert fused.grad is None
    assert text.grad.any(-1).int().tolist() == KNOWN["image_teaches"]
    assert image.grad.any(-1).int().tolist() == KNOWN["text_teaches"]


def test_no_teacher_at_all_is_a_loss_of_zero_with_gradients_of_zero():
    text, image, fused = branches()
    loss = negative_learning(text[:1], image[:1], fused[:1], LABELS[:1])
    loss.backward()
    assert loss.item() == 0 and not text.grad.any() and not image.grad.any()
    assert negative_learning(text[:0], image[:0], fused[:0], LABELS[:0]).item() == 0, "nor are no rows a division by 0"


def test_options_that_do_not_exist_change_nothing():
    """Rows with four columns of which some are padding: as each row by itself with its own options, 1/C each."""
    text, image, fused = branches()
    counts = [4, 3, 4, 4, 2, 3]
    exists = torch.arange(4) < torch.tensor(counts)[:, None]
    found = negative_learning(text, image, fused, LABELS, exists=exists)
    alone = [negative_learning(*(x[i:i + 1, :c] for x in (text, image, fused)), LABELS[i:i + 1]) for i, c in enumerate(counts)]
    assert sum(value > 0 for value in alone) >= 4
    torch.testing.assert_close(found, sum(alone) / 6, rtol=0, atol=1e-15)
    first = torch.autograd.grad(found, (text, image), retain_graph=True)
    padded = [x.masked_fill(~exists, -math.inf) for x in (text, image, fused)]
    torch.testing.assert_close(negative_learning(*padded, LABELS), found, rtol=0, atol=0)
    second = torch.autograd.grad(negative_learning(*padded, LABELS), (text, image))
    for one, two in zip(first, second):
        assert torch.equal(one, two) and torch.isfinite(one).all() and not one[~exists].any()
    single = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([[True, False, False]] * 2)
    assert negative_learning(*[single[0]] * 3, torch.zeros(2, dtype=torch.long), exists=single[1]).item() == 0


def test_the_step_may_be_cut_anywhere():
    text, image, fused = branches()
    whole = negative_learning(text, image, fused, LABELS)
    parts = [negative_learning(text[i:i + 2], image[i:i + 2], fused[i:i + 2], LABELS[i:i + 2], rows=6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-15)


def test_half_precision_is_computed_in_single():
    text, image, fused = (logits.detach().bfloat16() for logits in branches())
    found = negative_learning(text, image, fused, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), negative_learning(text.double(), image.double(), fused.double(), LABELS))


def test_the_fused_prediction_may_teach():
    text, image, fused = branches()
    value = guidance(fused, text, LABELS, torch.tensor([True] + [False] * 5), lam=1.0, student_ce=False, reduction="batch")
    p, student = fused[0].softmax(-1), text[0].log_softmax(-1)
    assert value.item() == pytest.approx(-(p * student)[1:].sum().item() / 6)


def test_answers_as_options():
    """Tokens by score 4 > 2 > 0 > 3 > 1; the right one comes first, wherever it stands."""
    logits = numbers([[3, 1, 4, 2, 5]] * 2)
    places = top_options(logits, torch.tensor([1, 2]), 3)
    assert places.tolist() == [[1, 4, 2], [2, 4, 0]]
    assert logits.gather(-1, places).tolist() == [[1, 5, 4], [4, 5, 3]]
    with pytest.raises(ValueError, match="6 options out of a vocabulary of 5"):
        top_options(logits, torch.tensor([1, 2]), 6)


def test_errors():
    text, image, fused = branches()
    with pytest.raises(ValueError, match="elements and batch"):
        negative_learning(text, image, fused, LABELS, reduction="mean")
    with pytest.raises(ValueError, match=r"of shapes \(6, 3\), \(6, 4\) and \(6, 4\)"):
        negative_learning(text[:, :3], image, fused, LABELS)
    exists = torch.ones(6, 4, dtype=torch.bool)
    exists[3, 3] = False
    with pytest.raises(ValueError, match="row 3 of the batch is labelled with option 3, which it does not have"):
        negative_learning(text, image, fused, LABELS, exists=exists)


def test_guidance_over_all_options_lowers_the_right_one_and_among_the_wrong_does_not():
    teacher, student = torch.tensor([[0.2, 1.0, -0.5]], dtype=torch.float64), torch.tensor([[0.6, -0.3, 0.1]], dtype=torch.float64)
    labels, guided, options = torch.tensor([0]), torch.tensor([True]), dict(lam=0.7, student_ce=False, reduction="batch")
    p, q = teacher.softmax(-1)[0], student.softmax(-1)[0]
    found = {}
    for among in ("all", "wrong"):
        logits = student.clone().requires_grad_(True)
        loss = guidance(teacher, logits, labels, guided, among=among, **options)
        loss.backward()
        found[among] = loss.item(), logits.grad[0]
    assert found["all"][1][0].item() == pytest.approx(0.7 * (1 - p[0].item()) * q[0].item()), "descent lowers the right logit"
    alone = q[1:] / q[1:].sum()
    assert found["wrong"][0] == pytest.approx(-0.7 * (p[1:] * alone.log()).sum().item())
    assert found["wrong"][1][0] == 0
    assert torch.allclose(found["wrong"][1][1:], 0.7 * (p[1:].sum() * alone - p[1:]))


def test_one_wrong_option_leaves_nothing_to_be_guided_among():
    teacher, student = torch.tensor([[0.2, 1.0]]), torch.tensor([[0.6, -0.3]], requires_grad=True)
    loss = guidance(teacher, student, torch.tensor([0]), torch.tensor([True]), student_ce=False, among="wrong")
    loss.backward()
    assert loss == 0 and not student.grad.any()
    with pytest.raises(ValueError, match="no such options to guide among: some"):
        guidance(teacher, student, torch.tensor([0]), torch.tensor([True]), among="some")
