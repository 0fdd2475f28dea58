"""Losses over several views: which views they ask for, what they add up to, and that a step may be cut anywhere."""

import pytest
import torch

from data_prep.problem import View
from training.collate import answer_numbers
from training.config import Consistency, CrossModalKL, Loss, RecipeError, load_recipe
from training.losses import cross_modal_kl, evidence_weights, jensen_shannon
from training.objective import VIEWS, Answers, Objective, needs

from .running import metrics, refusal, run
from .test_train import norm_of, one_step, seeded, uneven  # noqa: F401  a fixture

BOTH = torch.full((9,), VIEWS.index(View.both))
KL = Loss(cross_modal_kl=CrossModalKL(coef=0.5))


# -- which views -----------------------------------------------------------------------------------


def test_needs():
    assert needs(Loss(), View.vision) == ()
    assert set(needs(KL, View.both)) == {View.both, View.vision} == set(needs(KL, View.text))
    assert needs(Loss(weigh="evidence"), View.vision) == (View.blind,)
    assert needs(Loss(weigh="evidence"), View.both) == (View.text,)
    assert needs(Loss(consistency=Consistency()), View.both) == (View.vision,)
    with pytest.raises(RecipeError, match="draws the view text, for which there is no without picture; it may draw both, vision"):
        needs(Loss(weigh="evidence"), View.text)
    with pytest.raises(RecipeError, match="loss.cross_modal_kl.teacher: no such view: words"):
        needs(Loss(cross_modal_kl=CrossModalKL(teacher="words")), View.both)


@pytest.mark.parametrize(
    "loss, drawn, extra",
    (
        (Loss(), {View.both}, set()),
        (KL, {View.both}, {"student"}),
        (KL, {View.vision}, {"teacher"}),
        (KL, {View.both, View.vision}, {"teacher", "student"}),
        (Loss(cross_modal_kl=CrossModalKL(coef=0)), {View.both}, set()),
        (Loss(weigh="evidence"), {View.both, View.vision}, {"without_picture"}),
    ),
)
def test_only_what_is_not_drawn_already_is_built(loss, drawn, extra):
    assert set(Objective(loss, drawn).extra) == extra


def test_batches_hold_exactly_the_views_asked_for(recipe_file):
    path = recipe_file(views={"both": 1.0}, turns=2, loss={"cross_modal_kl": {"coef": 1.0}})
    trainer = seeded(path)
    batch = trainer.data_collator([{"draw": 0}, {"draw": 1}])
    assert set(batch["roles"]) == {"student"}
    encoder = trainer.data_collator.encoder
    said = {}
    for name, one in ((None, batch), ("student", batch["roles"]["student"])):
        said[name] = [encoder.tokenizer.decode(row) for row in one["input_ids"]]
    assert all("Facts: " in text for text in said[None]) and not any("Facts: " in text for text in said["student"])
    labels = [one["labels"][one["labels"] != -100] for one in (batch, batch["roles"]["student"])]
    assert torch.equal(*labels), "the same answers in both views"
    assert torch.equal(batch["pixel_values"], batch["roles"]["student"]["pixel_values"])
    assert torch.equal(answer_numbers(batch["labels"]), answer_numbers(batch["roles"]["student"]["labels"]))


def test_answer_numbers_by_hand():
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100], [-100, -100, 8, 9, 9, 9], [-100] * 6])
    assert answer_numbers(labels).tolist() == [0, 0, 1, 2, 2, 2, 2]


def test_only_some_drawn_views_take_part(recipe_file):
    """Drawn as text: no divergence, and shown to the teacher as it was drawn. Drawn as vision: as ever."""
    kl = {"coef": 1.0, "answers": "all", "drawn": ["vision"]}
    some = Loss(cross_modal_kl=CrossModalKL(drawn=["vision"]))
    assert set(needs(some, View.vision)) == {View.both, View.vision} and needs(some, View.text) == (View.text,)
    assert set(Objective(some, {View.vision, View.text}).extra) == {"teacher"}
    path = recipe_file(views={"vision": 0.5, "text": 0.5}, batch=8, micro_batch=8, loss={"cross_modal_kl": kl})
    trainer = seeded(path)
    batch = trainer.data_collator([{"draw": n} for n in range(8)])
    encoder, teacher = trainer.data_collator.encoder, batch["roles"]["teacher"]
    drawn = [trainer.data_collator.plan.draw(n).view for n in range(8)]
    assert [VIEWS[n] for n in batch["views"]] == drawn and {View.vision, View.text} == set(drawn)
    for row, view in enumerate(drawn):
        image = bool((teacher["input_ids"][row] == encoder.image_id).any())
        assert image == (view is View.vision) and "Facts: " in encoder.tokenizer.decode(teacher["input_ids"][row])
    # A batch of text alone has a divergence of nothing.
    text = recipe_file(name="text", views={"text": 1.0}, batch=8, micro_batch=8, loss={"cross_modal_kl": {**kl, "coef": 9.0}})
    assert one_step(text)[0] == one_step(text, "loss.cross_modal_kl=null")[0]
    with pytest.raises(RecipeError, match="loss.cross_modal_kl.drawn: no such view: words"):
        needs(Loss(cross_modal_kl=CrossModalKL(drawn=["words"])), View.both)


# -- what they add up to ---------------------------------------------------------------------------


def answers(values, right=None, distribution=None) -> Answers:
    values = torch.tensor(values, requires_grad=True)
    return Answers(values, torch.tensor(right or [True] * len(values)), torch.zeros(len(values)), distribution)


def looking(**sides):
    return lambda role, learns, full: sides[role or "main"]


def test_cross_modal_kl_by_hand():
    """Two answers, of 2 tokens and of 1. The teacher misses a token of the first: only the second counts, with k = 2. NLL is
    (1 + 1 + 1) / 3, the divergence (e^2 - 3) / 6 for a step of 6 tokens, and the coefficient 0.5."""
    main, student = answers([-1.0, -1.0, -1.0], [True, False, True]), answers([-2.0, -2.0, -3.0])
    objective = Objective(KL, {View.both})
    number = torch.tensor([0, 0, 1])
    loss, shown = objective(looking(main=main, student=student), torch.ones(3), number, BOTH[:3], 3.0, 6.0)
    kl = torch.e**2 - 3
    assert loss.item() == pytest.approx(1 + 0.5 * kl / 6, rel=1e-6)
    loss.backward()
    assert main.log_probs.grad.tolist() == pytest.approx([-1 / 3] * 3), "the teacher learns from its labels alone"
    assert student.log_probs.grad.tolist() == pytest.approx([0, 0, 0.5 * (1 - torch.e**2) / 6])
    assert shown["teacher_right"] == 1 and shown["cross_modal_kl"].item() == pytest.approx(kl, rel=1e-6)
    everything = Objective(Loss(cross_modal_kl=CrossModalKL(coef=0.5, answers="all")), {View.both})
    loss, shown = everything(looking(main=main, student=student), torch.ones(3), number, BOTH[:3], 3.0, 6.0)
    assert loss.item() == pytest.approx(1 + 0.5 * (2 * (torch.e - 2) + kl) / 6, rel=1e-6)
    assert shown["teacher_right"] == 1, "one token of three, whichever answers take part"


def test_evidence_by_hand():
    """p with the picture 0.5 and 0.2, without 0.1 and 0.2: weights 0.2 + 0.8 * 0.4 = 0.52 and 0.2."""
    main, without = answers(torch.tensor([0.5, 0.2]).log().tolist()), answers(torch.tensor([0.1, 0.2]).log().tolist())
    objective = Objective(Loss(weigh="evidence", evidence_floor=0.2), {View.vision})
    loss, shown = objective(looking(main=main, without_picture=without), torch.ones(2), torch.tensor([0, 1]), BOTH[:2], 2.0, 2.0)
    assert loss.item() == pytest.approx((0.52 * 0.693147 + 0.2 * 1.609438) / 2, rel=1e-5)
    assert shown["evidence"].item() == pytest.approx(0.72)
    loss.backward()
    assert main.log_probs.grad.tolist() == pytest.approx([-0.26, -0.1]) and without.log_probs.grad is None


# -- in the trainer --------------------------------------------------------------------------------

SEVERAL = {
    "kl": {"cross_modal_kl": {"coef": 0.7, "answers": "all"}},
    "kl_right": {"cross_modal_kl": {"coef": 0.7, "teacher": "vision", "student": "both"}},
    "kl_full": {"cross_modal_kl": {"coef": 0.7, "answers": "all", "estimator": "full"}},
    "consistency": {"consistency": {"coef": 2.0}},
    "evidence": {"weigh": "evidence"},
}


@pytest.mark.parametrize("loss", SEVERAL.values(), ids=SEVERAL)
def test_a_step_may_be_cut_anywhere(recipe_file, uneven, loss):  # noqa: F811
    path = recipe_file(problems=uneven, views={"both": 0.5, "vision": 0.5}, batch=8, micro_batch=8, seed=1, optim={"clip": 0.0},
                       loss=loss)
    whole, gradient, _ = one_step(path)
    assert norm_of(gradient) > 1e-3
    plain = one_step(recipe_file(name="plain", problems=uneven, views={"both": 0.5, "vision": 0.5}, batch=8, micro_batch=8, seed=1))[0]
    assert abs(whole - plain) > 1e-3 or loss == SEVERAL["kl_right"], "the term does nothing"
    for micro_batch in (1, 4):
        other_loss, other, _ = one_step(path, f"micro_batch={micro_batch}")
        assert other_loss == pytest.approx(whole, rel=1e-5)
        assert norm_of({name: other[name] - gradient[name] for name in gradient}) < 2e-5 * norm_of(gradient)


def stock_answers(trainer, batch) -> torch.Tensor:
    """(answer tokens, vocabulary) log-probabilities by the stock forward pass, row by row, and the tokens themselves."""
    rows, said = [], []
    start = 0
    for i in range(len(batch["input_ids"])):
        n = int(batch["attention_mask"][i].sum())
        one = {key: batch[key][i : i + 1, :n] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if "pixel_values" in batch:
            grid = batch["image_grid_thw"][i : i + 1]
            patches = int(grid.prod())
            one |= {"image_grid_thw": grid, "pixel_values": batch["pixel_values"][start : start + patches]}
            start += patches
        labels = batch["labels"][i, 1:n]
        rows.append(trainer.model(**one).logits[0, :-1].log_softmax(-1)[labels != -100])
        said.append(labels[labels != -100])
    return torch.cat(rows), torch.cat(said)


@pytest.mark.parametrize("name", ("kl", "kl_full", "consistency", "evidence"))
def test_the_loss_is_that_of_the_stock_model(recipe_file, name):
    path = recipe_file(views={"both": 1.0}, turns=3, batch=3, micro_batch=3, optim={"clip": 0.0}, loss=SEVERAL[name])
    loss, gradient, _ = one_step(path)
    trainer = seeded(path)
    batch = trainer.data_collator([{"draw": n} for n in range(3)])
    main, said = stock_answers(trainer, batch)
    pick = lambda logps: logps.gather(1, said[:, None])[:, 0]  # noqa: E731
    nll, ones = -pick(main), torch.ones(len(said))
    other = stock_answers(trainer, next(iter(batch["roles"].values())))[0]
    expected = {
        "kl": lambda: nll.mean() + 0.7 * cross_modal_kl(pick(main), pick(other), ones),
        "kl_full": lambda: nll.mean() + 0.7 * cross_modal_kl(main, other, ones, estimator="full"),
        "consistency": lambda: nll.mean() + 2.0 * jensen_shannon(main, other, ones),
        "evidence": lambda: (nll * evidence_weights(pick(main), pick(other), 0.2)).mean(),
    }[name]()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    mine = {key: p.grad for key, p in trainer.model.named_parameters() if p.grad is not None}
    assert norm_of({key: mine[key] - gradient[key] for key in gradient}) < 1e-4 * norm_of(gradient)


def test_identical_views_add_nothing(recipe_file):
    path = recipe_file(views={"vision": 1.0}, batch=4, micro_batch=4,
                       loss={"cross_modal_kl": {"coef": 3.0, "teacher": "vision", "answers": "all"}})
    loss, gradient, _ = one_step(path)
    plain_loss, plain, _ = one_step(path, "loss.cross_modal_kl=null")
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert norm_of({key: gradient[key] - plain[key] for key in plain}) < 1e-6 * norm_of(plain)


def test_what_a_loss_measures_is_logged(recipe_file):
    rows = metrics(run(recipe_file(name="kl", views={"both": 1.0}, loss=SEVERAL["kl"])))
    assert all(row["cross_modal_kl"] > 0 and 0 <= row["teacher_right"] <= row["token_accuracy"] < 1 for row in rows)
    rows = metrics(run(recipe_file(name="evidence", views={"both": 1.0}, loss=SEVERAL["evidence"])))
    assert all(0.2 <= row["evidence"] <= 1 for row in rows)


def test_only_problems_that_have_all_the_views_are_drawn(recipe_file, uneven):  # noqa: F811
    from training.plan import Plan

    path = recipe_file(problems=uneven, views={"vision": 1.0}, loss=SEVERAL["kl"])
    mixture = Plan(load_recipe(path)).stages[0].mixture
    assert all(mixture.problems["twins"][i].facts for unit in mixture.parts[0].units for i in unit)
    said = refusal(recipe_file(name="text", views={"text": 1.0}, loss=SEVERAL["evidence"]))
    assert "draws the view text, for which there is no without picture" in said
