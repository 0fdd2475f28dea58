"""Balance methods inside the trainers: what each does to an optimizer step, and that nothing else changes."""

import copy
import json
import math
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from data_prep.answerer import Answerer
from data_prep.problem import View, render
from training import probe as probe_module
from training.balance.cggm import CggmMethod, _first_token_gradient
from training.balance.hook import World
from training.balance.lnln_hook import Corrupting
from training.balance.mnl import MnlMethod
from training.balance.ogm import Dropping
from training.balance.settings import SIDES, Cggm, Corruption, Direction, Lnln, Mnl, ModalityDropout
from training.balance.views import Seen
from training.model import tower_of

from .running import ROOT, same, trainer_of
from .test_balance_settings import KINDS, probe  # noqa: F401  a fixture
from .test_balance_views import wordy  # noqa: F401  a fixture
from .test_preference_training import pair_file, pairs  # noqa: F401  fixtures
from .test_train import norm_of, seeded

SIDED = {"both": 0.5, "vision": 0.5}
NEEDED = {"random_factors": {"of": "runs/nowhere"}}     # what a section cannot do without, beside a probe


class EveryGradient(TrainerCallback):
    """Keeps the gradients of every optimizer step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@dataclass
class Trained:
    weights: dict[str, torch.Tensor]
    rows: list[dict]            # what was logged, one per step
    gradients: list[dict[str, torch.Tensor]]
    trainer: object


def adapter(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def train(trainer, **how) -> Trained:
    if trainer.args.save_steps > trainer.args.max_steps:
        trainer.args.save_strategy = "no"       # nor at the end
    kept = EveryGradient()
    trainer.add_callback(kept)
    trainer.train(**how)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return Trained(adapter(trainer), rows, kept.steps, trainer)


def trained(path, *overrides: str) -> Trained:
    return train(seeded(path, *overrides))


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], rel: float = 1e-4) -> bool:
    """Whether gradients are equal but for rounding: their difference is small beside them, all together."""
    return set(one) == set(two) and norm_of({name: one[name] - two[name] for name in one}) < rel * norm_of(two)


def scripted(monkeypatch, by_step: dict[int, dict[str, float]]) -> list[int]:
    """Probes that find given values, accuracy, probability and loss alike; the list of steps at which they are asked."""
    asked = []

    def ask(self, trainer):
        asked.append(trainer.state.global_step)
        return {branch: dict.fromkeys(probe_module.METRICS, value) for branch, value in by_step[asked[-1]].items()}

    monkeypatch.setattr(probe_module.Probing, "ask", ask)
    return asked


TEXT_LEADS = {"both": 0.5, "image": 0.1, "text": 0.4, "none": 0.0}
IMAGE_LEADS = {"both": 0.5, "image": 0.4, "text": 0.1, "none": 0.0}
EVEN = {"both": 0.5, "image": 0.3, "text": 0.3, "none": 0.0}


# -- off is off ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_runs() -> dict:
    return {}


@pytest.fixture
def plain(recipe_file, plain_runs) -> Trained:
    """Three steps without any method."""
    if not plain_runs:
        plain_runs["plain"] = trained(recipe_file(views=SIDED, steps=3))
    return plain_runs["plain"]


@pytest.mark.parametrize("name", KINDS)
def test_strength_0_is_no_method_bit_for_bit(recipe_file, plain, probe, name):
    section = {"method": name, "strength": 0.0, **NEEDED.get(name, {})}
    if name == "miles":
        section["probe"] = probe
    found = trained(recipe_file(views=SIDED, steps=3, balance=section))
    assert found.trainer.balance is None and same(found.weights, plain.weights)
    assert found.rows == plain.rows and len(plain.rows) == 3 and plain.rows[2]["loss"] != plain.rows[0]["loss"]


ONES = [{"balance/factor_image": 1.0, "balance/factor_text": 1.0}]
NEUTRAL = {
    "miles mu": ({"method": "miles", "mu": 1.0, "tau": 0.0, "probe": "PROBE"}, True),
    "msam rho": ({"method": "msam", "rho": 0.0, "share": 1.0}, True),
    "msam share": ({"method": "msam", "share": 0.0}, True),
    "mnl warm-up": ({"method": "mnl", "warmup_steps": 3}, True),
    "corruption": ({"method": "lnln", "level": 0, "text": {"chance": 0.0}, "image": {"chance": 0.0}}, True),
    "dropout": ({"method": "modality_dropout", "image": 0.0, "text": 0.0}, True),
    "losses": ({"method": "unimodal_losses", "image": 0.0, "text": 0.0}, True),
    "random factors": ({"method": "random_factors", "of": "FACTORS"}, True),
    # With branches the drawn view is looked at through all its logits, and not through TRL's fused head: other roundings.
    "mnl lam": ({"method": "mnl", "lam": 0.0}, False),
    "ogm_ge": ({"method": "ogm_ge", "alpha": 0.0, "noise": False, "every": 1}, False),
    "cggm direction": ({"method": "cggm", "rho": 1.0, "direction": {"lam": 0.0}, "measure": "probe", "probe": "PROBE"}, False),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_change_nothing(recipe_file, plain, probe, tmp_path, monkeypatch, name):
    section, exact = NEUTRAL[name]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ONES))
    section = {key: {"PROBE": probe, "FACTORS": str(tmp_path)}.get(value, value) if isinstance(value, str) else value
               for key, value in section.items()}
    if section["method"] in ("miles", "ogm_ge", "cggm"):
        scripted(monkeypatch, {0: TEXT_LEADS, 2: IMAGE_LEADS})
    if section["method"] == "cggm":         # nothing has improved since the beginning: coefficients of 1
        scripted(monkeypatch, {0: dict.fromkeys(EVEN, 0.0), 2: dict.fromkeys(EVEN, 0.0)})
    found = trained(recipe_file(views=SIDED, steps=3, balance=section))
    assert found.trainer.balance is not None
    if exact:
        assert same(found.weights, plain.weights)
        assert [row["loss"] for row in found.rows] == [row["loss"] for row in plain.rows]
        return
    assert [row["loss"] for row in found.rows] == pytest.approx([row["loss"] for row in plain.rows], rel=1e-5)
    assert close(found.gradients[0], plain.gradients[0], rel=1e-5)
    moved = torch.cat([(found.weights[key] - plain.weights[key]).abs().flatten() for key in plain.weights])
    assert moved.median() < 1e-6 and moved.mean() < 1e-5
    for row, before in zip(found.rows, plain.rows):
        assert all(row[f"lr_{tower}"] == before[f"lr_{tower}"] for tower in ("vision", "merger", "language"))


@pytest.mark.parametrize(
    "section",
    ({"method": "msam", "every": 1}, {"method": "mnl", "lam": 10.0}, {"method": "lnln", "level": 0},
     {"method": "unimodal_losses"}, {"method": "modality_dropout", "image": 0.5, "text": 0.5},
     {"method": "cggm", "every": 1}, {"method": "ogm_ge", "every": 1}),
    ids=lambda section: section["method"],
)
def test_at_full_strength_something_changes(recipe_file, plain, section):
    found = trained(recipe_file(views=SIDED, steps=3, balance=section))
    moved = torch.cat([(found.weights[key] - plain.weights[key]).abs().flatten() for key in plain.weights])
    assert moved.mean() > 1e-5


# -- MILES and its probe ---------------------------------------------------------------------------


def test_miles_scales_the_rates_of_the_schedule_and_never_twice(recipe_file, probe, monkeypatch):
    """The words lead for two probes, then the picture, then neither; the schedule falls linearly, for all towers alike."""
    asked = scripted(monkeypatch, {0: TEXT_LEADS, 2: TEXT_LEADS, 4: IMAGE_LEADS, 6: EVEN})
    section = {"method": "miles", "probe": probe, "mu": 0.25}
    path = recipe_file(views=SIDED, steps=8, batch=2, optim={"schedule": "linear"}, balance=section)
    found = trained(path)
    assert asked == [0, 2, 4, 6]
    image, text = [1.0] * 4 + [0.25] * 2 + [1.0] * 2, [0.25] * 4 + [1.0] * 4
    for step, row in enumerate(found.rows):
        rate = 1e-3 * (1 - step / 8)
        assert row["lr_vision"] == row["lr_merger"] == pytest.approx(rate * image[step], rel=1e-9)
        assert row["lr_language"] == pytest.approx(rate * text[step], rel=1e-9)
        assert (row["balance/factor_image"], row["balance/factor_text"]) == (image[step], text[step])
        assert row["balance/value_text"] == (0.1 if step in (4, 5) else 0.3 if step > 5 else 0.4)


def test_the_factor_is_on_the_update(recipe_file, probe, monkeypatch):
    """At half strength a quarter becomes 0.625; the first step of that tower is as much shorter, the others' are the same."""
    scripted(monkeypatch, {0: TEXT_LEADS})
    common = dict(views=SIDED, steps=1, optim={"clip": 0.0})
    start = adapter(seeded(recipe_file(**common)))
    full = trained(recipe_file(**common)).weights
    section = {"method": "miles", "probe": probe, "mu": 0.25, "strength": 0.5}
    slowed = trained(recipe_file(**common, balance=section)).weights
    for name in start:
        if tower_of(name) == "language":
            torch.testing.assert_close(slowed[name] - start[name], 0.625 * (full[name] - start[name]), rtol=1e-3, atol=1e-7)
        else:
            assert torch.equal(slowed[name], full[name])


def test_a_probe_finds_what_an_evaluation_finds(recipe_file, probe):
    """On the embedded model, whose options are single tokens: softmax over the choices' likelihoods, corrected for chance."""
    tiny = str(ROOT / "assets" / "tiny")
    section = {"method": "miles", "probe": probe | {"items": 7}}
    path = recipe_file(model={"name": tiny}, views=SIDED, micro_batch=3, batch=3, balance=section)
    trainer = trainer_of(path)              # a fresh adapter: the base model itself
    trainer.model.train()
    asked = trainer.probing.ask(trainer)
    assert trainer.model.training and trainer.probing.ask(trainer) == asked, "the same problems every time"
    assert trainer_of(path, ["seed=5"]).probing.ask(trainer) == asked, "for every seed"
    mixture, answerer = trainer.probing.mixture, Answerer(tiny)
    drawn = [mixture.problems[draw.source][draw.problems[0]] for draw in map(mixture.draw, range(7))]
    views = {"both": (View.both, True), "image": (View.vision, False), "text": (View.text, True), "none": (View.blind, False)}
    assert set(asked) == set(views)
    for branch, (view, question) in views.items():
        prompts = [render(problem, view, question=question) for problem in drawn]
        sums = dict.fromkeys(probe_module.METRICS, 0.0)
        for prompt, scores in zip(prompts, answerer.likelihoods(prompts)):
            right, chance = prompt.choices.index(prompt.answer), 1 / len(prompt.choices)
            p = torch.tensor(scores).softmax(0)
            sums["probability"] += (p[right].item() - chance) / (1 - chance)
            sums["right"] += float(p.argmax() == right)
            sums["accuracy"] += (float(p.argmax() == right) - chance) / (1 - chance)
            sums["loss"] -= p[right].log().item()
        assert asked[branch] == pytest.approx({name: total / 7 for name, total in sums.items()}, abs=1e-4), branch
    assert len({round(values["loss"], 3) for values in asked.values()}) == 4, "the branches do not differ"


def test_ranks_share_a_probe(recipe_file, probe, monkeypatch):
    """Each asks its part, of unequal sizes; together they ask every problem once."""
    path = recipe_file(views=SIDED, balance={"method": "miles", "probe": probe | {"items": 7}})
    trainer, sums = seeded(path), []
    whole = trainer.probing.ask(trainer)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda values, reduction: (sums.append(values), values)[1])
    for rank in range(2):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda self, rank=rank: rank))
        trainer.probing.ask(trainer)
    assert [one[0, -1].item() for one in sums] == [4, 3]
    means = sum(sums)[:, :-1] / 7
    expected = [value for values in whole.values() for value in values.values()]
    assert means.flatten().tolist() == pytest.approx(expected, abs=1e-5)


# -- M-SAM -----------------------------------------------------------------------------------------


SHOWN = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def loss_by_hand(trainer, batches):
    """Cross-entropy over all their trained tokens, through the stock forward pass."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = trainer.model(**{key: batch[key] for key in SHOWN if key in batch}).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def gradient_by_hand(trainer, batches) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss_by_hand(trainer, batches).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def two_points(trainer, batches, rho: float, dominant=None) -> tuple[dict, dict]:
    """Gradients at the weights, and at the weights pushed uphill: along the gradient of the same batches, or of `dominant`."""
    named = dict(trainer.model.named_parameters())
    before = adapter(trainer)
    g0 = gradient_by_hand(trainer, batches)
    uphill = g0 if dominant is None else gradient_by_hand(trainer, dominant)
    norm = norm_of(uphill)
    with torch.no_grad():
        for name, gradient in uphill.items():
            named[name].add_(rho * gradient / norm)
    g1 = gradient_by_hand(trainer, dominant or batches)
    with torch.no_grad():
        for name, value in before.items():
            named[name].copy_(value)
    return g0, g1


def micro_batches(trainer, count: int = 2, size: int = 2) -> list[dict]:
    return [trainer.data_collator([{"draw": size * i + n} for n in range(size)]) for i in range(count)]


def test_share_1_is_a_step_of_sam_by_hand(recipe_file):
    """Two micro-batches, the gradient at the perturbed weights clipped to a third, then the optimizer's own step."""
    section = {"method": "msam", "share": 1.0, "rho": 0.05}
    path = recipe_file(views=SIDED, steps=1, optim={"clip": 1.0, "weight_decay": 0.1}, balance=section)
    by_hand = seeded(path)
    g0, g1 = two_points(by_hand, micro_batches(by_hand), 0.05)
    clip = norm_of(g1) / 3
    found = trained(path, f"optim.clip={clip!r}")
    assert found.rows[0]["grad_norm"] == pytest.approx(3 * clip, rel=1e-4)
    assert close(found.gradients[0], {name: gradient / 3 for name, gradient in g1.items()})
    assert not close(g0, g1, rel=1e-2), "the perturbation is too small to show anything"
    optimizer = by_hand.create_optimizer()
    for name, parameter in by_hand.model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = g1[name] / 3
    optimizer.step()
    expected = adapter(by_hand)
    moved = torch.cat([(found.weights[name] - expected[name]).abs().flatten() for name in expected])
    assert moved.median() < 1e-6 and moved.mean() < 1e-5


@pytest.mark.parametrize("share", (1.0, "shapley"))
def test_msam_does_not_depend_on_the_micro_batch(recipe_file, share):
    section = {"method": "msam", "share": share, "every": 1}
    path = recipe_file(views=SIDED, batch=4, micro_batch=4, steps=2, balance=section)
    whole, cut = trained(path), trained(path, "micro_batch=1")
    assert close(cut.gradients[0], whole.gradients[0])
    moved = torch.cat([(whole.weights[name] - cut.weights[name]).abs().flatten() for name in whole.weights])
    assert moved.median() < 1e-6 and moved.mean() < 2e-5
    for row, other in zip(whole.rows, cut.rows):
        shown = {key: value for key, value in row.items() if key.startswith("balance/")}
        assert len(shown) == (6 if share == "shapley" else 0)
        assert shown == pytest.approx({key: other[key] for key in shown}, abs=1e-4)


def test_only_the_unperturbed_pass_is_measured_and_logged(recipe_file, monkeypatch):
    """Measured at the first of three steps alone; the second pass, at other weights, is counted nowhere."""
    path = recipe_file(views=SIDED, steps=3, balance={"method": "msam", "every": 3, "rho": 0.5})
    taken = []
    trainer = seeded(path)
    monkeypatch.setattr(trainer.balance, "measured", lambda values: taken.append((trainer.state.global_step, dict(values))))
    found = train(trainer)
    unperturbed = trained(path, "balance.rho=0.0")
    assert [step for step, _ in taken] == [0]
    for name, value in taken[0][1].items():
        assert value == pytest.approx(unperturbed.rows[0][f"balance/value_{name}"], abs=1e-6)
    assert found.rows[0]["loss"] == unperturbed.rows[0]["loss"]
    assert found.rows[0]["token_accuracy"] == unperturbed.rows[0]["token_accuracy"]
    assert found.rows[0]["entropy"] == unperturbed.rows[0]["entropy"]


def test_weights_are_put_back_when_the_second_pass_fails(recipe_file):
    trainer = seeded(recipe_file(views=SIDED, steps=1, balance={"method": "msam", "share": 1.0, "rho": 0.5}))
    before, perturbed, look_at = adapter(trainer), [], trainer.look_at

    def failing(*args):
        if trainer._again and len(perturbed) == 1:
            raise MemoryError("out of memory")
        if trainer._again:
            perturbed.append(adapter(trainer))
        return look_at(*args)

    trainer.look_at = failing
    with pytest.raises(MemoryError):
        trainer.train()
    assert same(adapter(trainer), before) and not same(perturbed[0], before)
    assert not trainer._again


@pytest.mark.parametrize("section", ({"share": 1.0}, {"every": 1}), ids=("sam", "shapley"))
def test_both_passes_see_the_same_dropout(recipe_file, section):
    """Perturbed by next to nothing, the second pass gives the gradient of the first one, micro-batch by micro-batch and step by
    step: with other masks it would be another."""
    section = {"method": "msam", "rho": 0.0, **section}
    path = recipe_file(views=SIDED, steps=2, batch=2, micro_batch=1, lora={"dropout": 0.5}, balance=section)
    once, twice = trained(path), trained(path, "balance.rho=1e-9")
    for one, two in zip(once.gradients, twice.gradients, strict=True):
        assert close(two, one, rel=1e-3)
    if "share" in section:
        other = trained(path, "seed=1", "steps=1")
        assert not close(other.gradients[0], once.gradients[0], rel=0.1), "dropout changes nothing"


@pytest.mark.parametrize(
    "values, moves", ((IMAGE_LEADS, {"vision", "merger"}), (TEXT_LEADS, {"language"})), ids=("image", "text")
)
def test_scope_tower_perturbs_the_dominant_modality(recipe_file, probe, monkeypatch, values, moves):
    scripted(monkeypatch, {0: values})
    section = {"method": "msam", "scope": "tower", "rho": 0.5, "measure": "probe", "probe": probe}
    trainer = seeded(recipe_file(views=SIDED, steps=1, balance=section))
    before, during, look_at = adapter(trainer), [], trainer.look_at
    trainer.look_at = lambda *args: (trainer._again and during.append(adapter(trainer)), look_at(*args))[1]
    trainer.train()
    far = {tower: 0.0 for tower in ("vision", "merger", "language")}
    for name in before:
        far[tower_of(name)] += (during[0][name] - before[name]).square().sum().item()
    assert {tower for tower, distance in far.items() if distance} == moves
    assert sum(far.values()) == pytest.approx(0.5**2, rel=1e-3)
    # phi = (v(one) - v(none) + v(both) - v(other)) / 2: 0.4 against 0.1.
    assert max(trainer.balance.shares.values()) == pytest.approx(0.8)


def test_scope_view_climbs_and_steps_along_the_dominant_branch(recipe_file, probe, monkeypatch):
    """0.8 of the words' own gradient at the weights pushed along it, and 0.2 of the joint one at the weights."""
    scripted(monkeypatch, {0: TEXT_LEADS})
    section = {"method": "msam", "scope": "view", "measure": "probe", "probe": probe}
    path = recipe_file(views=SIDED, steps=1, optim={"clip": 0.0}, balance=section)
    by_hand = seeded(path)
    batches = micro_batches(by_hand)
    assert all(set(batch["branches"]) == {"image", "text"} for batch in batches)
    g0, g1 = two_points(by_hand, batches, 0.05, dominant=[batch["branches"]["text"] for batch in batches])
    looks, trainer = [], seeded(path)
    look_at = trainer.look_at
    trainer.look_at = lambda model, batch, *args: (looks.append("pixel_values" in batch), look_at(model, batch, *args))[1]
    found = train(trainer)
    assert looks == [True, True] + [False] * 4, "the joint pass, then two of the words alone, over two micro-batches each"
    assert all(tower_of(name) == "language" for name in g1)
    expected = {name: 0.8 * g1.get(name, torch.zeros(())) + 0.2 * gradient for name, gradient in g0.items()}
    assert close(found.gradients[0], expected)


# -- MNL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section", ({}, {"profile": "either_side", "reduction": "batch", "student_ce": True}), ids=("default", "full")
)
def test_mnl_does_not_depend_on_the_micro_batch(recipe_file, wordy, section):
    """Closed and open answers, of several tokens, unevenly spread."""
    path = recipe_file(problems=wordy, turns=2, views=SIDED, steps=1, batch=4, micro_batch=4, optim={"clip": 0.0},
                       balance={"method": "mnl", "lam": 5.0, "top": 5, **section})
    whole, cut, without = trained(path), trained(path, "micro_batch=1"), trained(path, "balance.strength=0.0")
    assert cut.rows[0]["loss"] == pytest.approx(whole.rows[0]["loss"], rel=1e-5)
    assert close(cut.gradients[0], whole.gradients[0])
    assert not close(without.gradients[0], whole.gradients[0], rel=1e-2), "MNL does nothing here"


def seen_of(options, first) -> Seen:
    """options: (answers, options) probabilities, the right one first, all 0 where the answer is open; first: (answers,
    vocabulary), of which the right one is 0."""
    options, first = (torch.tensor(one).log().requires_grad_() for one in (options, first))
    right = torch.zeros(len(first)).long()
    return Seen(options, first[:, 0], torch.zeros(len(first), 1), right[:, None], first, right)


@pytest.mark.parametrize("among", ("all", "wrong"))
def test_mnl_teaches_per_answer_and_only_the_student(among):
    """The first answer is surer by its words, the second by its picture; the third, an open one, by its words again."""
    text = seen_of([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.0] * 3], [[0.25] * 4, [0.25] * 4, [0.7, 0.2, 0.05, 0.05]])
    image = seen_of([[0.3, 0.4, 0.3], [0.6, 0.2, 0.2], [0.0] * 3], [[0.25] * 4, [0.25] * 4, [0.1, 0.6, 0.2, 0.1]])
    both = seen_of([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.0] * 3], [[0.25] * 4, [0.25] * 4, [0.4, 0.3, 0.2, 0.1]])
    method = MnlMethod(Mnl(lam=1.0, reduction="batch", top=3, among=among), World(0, None))
    loss = method.loss({"text": text, "image": image, "both": both}, torch.tensor(10.0))
    # The open answer's options are the joint prediction's three likeliest first tokens, the right one among them: 0, 1 and 2.
    guided = ((0.1, 0.1, 0.4, 0.3, 1.0), (0.2, 0.2, 0.5, 0.3, 1.0), (0.2 / 0.95, 0.05 / 0.95, 0.6, 0.2, 0.9))
    expected = 0.0
    for teacher_one, teacher_two, one, two, total in guided:        # teacher's, student's, and what the student's are out of
        total = total if among == "all" else one + two
        expected -= (teacher_one * math.log(one / total) + teacher_two * math.log(two / total)) / 10
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert method.shown == {"taught_by_text": pytest.approx(2 / 3), "taught_by_image": pytest.approx(1 / 3)}
    loss.backward()
    assert both.options.grad is None or not both.options.grad.any()
    assert (image.options.grad.abs().sum(-1) > 0).tolist() == [True, False, False]
    assert (text.options.grad.abs().sum(-1) > 0).tolist() == [False, True, False]
    assert (image.first.grad.abs().sum(-1) > 0).tolist() == [False, False, True]
    assert text.first.grad is None or not text.first.grad.any()
    assert bool(image.options.grad[0, 0]) == bool(text.options.grad[1, 0]) == bool(image.first.grad[2, 0]) == (among == "all")


def test_mnl_warms_up(recipe_file):
    """Two steps like none, then a third that is not: the branches are there from then on."""
    path = recipe_file(views=SIDED, steps=3, balance={"method": "mnl", "lam": 5.0, "warmup_steps": 2})
    found, without = trained(path), trained(path, "balance.strength=0.0")
    for step in range(2):
        assert same(found.gradients[step], without.gradients[step])
    assert not close(found.gradients[2], without.gradients[2], rel=1e-2)


# -- CGGM ------------------------------------------------------------------------------------------


def scored(image: list[float], text: list[float]) -> dict:
    values = {"image": image, "text": text, "both": image}
    return {name: SimpleNamespace(value=lambda metric, one=one: torch.tensor(one)) for name, one in values.items()}


@pytest.mark.parametrize("direction", (None, Direction()), ids=("magnitude", "direction"))
def test_cggm_measures_when_it_is_due(direction):
    """Every second step, over both its micro-batches of unequal size, against 0 at first; branches are there at other steps too
    where there is a direction term, and are not measured then."""
    step = 0
    method = CggmMethod(Cggm(every=2, decay=0.5, rho=1.3, direction=direction), World(0, None, step=lambda: step))
    groups = [{"modality": side, "lr": 1.0} for side in (*SIDES, "shared")]

    def end() -> list[float]:
        for group in groups:
            group["lr"] = 1.0
        method.before_step(groups)
        return [group["lr"] for group in groups]

    method.watch(scored([0.1, 0.3], [0.6, 0.2]))
    method.watch(scored([0.5], [0.4]))
    # image 0.3, text 0.4, both from 0: c = (0.4, 0.3) / 0.7
    first = [1.3 * 4 / 7, 1.3 * 3 / 7, 1.0]
    assert end() == pytest.approx(first, rel=1e-5)
    step = 1
    method.watch(scored([0.9], [0.0]))
    assert end() == pytest.approx(first, rel=1e-5), "a step that is not measured changed the factors"
    step = 2
    method.watch(scored([0.5], [0.3]))
    # Running means: image 0.4, text 0.35; d = (0.1, -0.05), s = 0.05, c = (-1, 2), cut to 0.1 and 2.
    assert end() == pytest.approx([1.3 * 0.1, 1.3 * 2.0, 1.0], rel=1e-5)
    assert method.values == pytest.approx({"image": 0.4, "text": 0.35})
    step = 4
    method.watch(scored([0.4], [0.35]))
    assert end() == pytest.approx([1.3, 1.3, 1.0]), "nothing has changed: coefficients of 1"


def test_only_an_analytic_direction_teaches(recipe_file):
    """A stale one is a constant: the loss changes, its gradient does not."""
    section = {"method": "cggm", "every": 1, "direction": {"lam": 1.0}}
    path = recipe_file(views=SIDED, steps=1, optim={"clip": 0.0}, balance=section)
    runs = trained(path), trained(path, "balance.direction.mode=stale"), trained(path, "balance.direction=null")
    loss, stale_loss, without = (run.rows[0]["loss"] for run in runs)
    assert loss == pytest.approx(stale_loss, rel=1e-6) and stale_loss > without + 0.01
    analytic, stale, none = (run.gradients[0] for run in runs)
    assert close(stale, none, rel=1e-6)
    for tower in ("vision", "merger", "language"):
        names = [name for name in none if tower_of(name) == tower]
        assert not close({name: analytic[name] for name in names}, {name: none[name] for name in names}, rel=1e-2), tower


def test_the_analytic_gradient_is_autograds(recipe_file):
    """Of the cross-entropy over the options, for the output layer's rows of their tokens; other rows have none."""
    tiny = str(ROOT / "assets" / "tiny")
    trainer = seeded(recipe_file(model={"name": tiny}, views={"both": 1.0}, batch=4, micro_batch=4, balance={"method": "mnl"}))
    batch = trainer.data_collator([{"draw": n} for n in range(4)])
    head = trainer.model.get_base_model().lm_head.weight
    found = trainer.look_at(trainer.model, {key: batch[key] for key in (*SHOWN, "labels")}, True, True)
    seen = trainer.seen(found, batch["labels"], batch["at"], batch["token"])
    rows = seen.closed
    assert rows.all() and len({int(n) for n in (seen.tokens >= 0).sum(-1)}) > 1
    analytic = _first_token_gradient(seen, rows)
    weight = head.detach().clone().requires_grad_()
    logits = seen.hidden.detach() @ weight.T
    scores = [logits[row, tokens[tokens >= 0]] for row, tokens in enumerate(seen.tokens)]
    torch.stack([-one.log_softmax(0)[0] for one in scores]).mean().backward()
    ids = seen.tokens[seen.tokens >= 0].unique()
    if int(seen.tokens.min()) < 0 and 0 not in ids.tolist():
        analytic, padding = analytic[1:], analytic[0]       # the row of padding
        assert not padding.any()
    torch.testing.assert_close(analytic, weight.grad[ids], rtol=1e-4, atol=1e-6)
    others = torch.ones(len(weight)).bool()
    others[ids] = False
    assert not weight.grad[others].any() and analytic.abs().max() > 1e-3


def test_a_direction_among_open_answers_alone(recipe_file, wordy):
    """There is nothing to compare, and nothing fails."""
    rows = [line for line in wordy.read_text().splitlines() if '"options": null' in line]
    file = wordy.with_name("open.jsonl")
    file.write_text("\n".join(rows) + "\n")
    path = recipe_file(problems=file, views=SIDED, steps=1, balance={"method": "cggm", "direction": {"lam": 1.0}})
    assert len(rows) == 3 and trained(path).rows[0]["loss"] > 0


# -- what is shown ---------------------------------------------------------------------------------


def shown_rows(collator, numbers) -> list[tuple]:
    """Of each draw: its ids, and its pixels where it has some."""
    found = []
    for n in numbers:
        batch = collator([{"draw": n}])
        pixels = batch["pixel_values"].sum().item() if "pixel_values" in batch else None
        found.append((tuple(batch["input_ids"][0].tolist()), pixels))
    return found


SHOWINGS = ({"method": "lnln", "level": 0, "text": {"chance": 1.0}, "image": {"chance": 1.0}},
            {"method": "modality_dropout", "image": 0.4, "text": 0.4})


@pytest.mark.parametrize("section", SHOWINGS, ids=lambda section: section["method"])
def test_what_is_missing_depends_on_seed_epoch_and_problem_alone(recipe_file, wordy, section):
    path = recipe_file(problems=wordy, views=SIDED, batch=16, micro_batch=16, steps=4, balance=section)
    collator = seeded(path).data_collator
    numbers = list(range(24))
    alone = shown_rows(collator, numbers)
    assert alone == shown_rows(pickle.loads(pickle.dumps(collator)), numbers[::-1])[::-1], "in another worker, in another order"
    together = collator([{"draw": n} for n in numbers[:8]])
    for row, (ids, _) in enumerate(alone[:8]):
        assert together["input_ids"][row][together["attention_mask"][row] == 1].tolist() == list(ids)
    other = copy.copy(collator)
    other.showing = copy.copy(collator.showing)
    other.showing.seed = 1
    assert shown_rows(other, numbers) != alone, "another seed"
    plan = collator.plan
    draws = {(draw.view, plan.ids(draw), draw.epoch): n for n, draw in ((n, plan.draw(n)) for n in range(len(plan)))}
    again = [(n, draws[view, ids, 1]) for (view, ids, epoch), n in draws.items() if epoch == 0 and (view, ids, 1) in draws]
    differ = sum(shown_rows(collator, [one]) != shown_rows(collator, [two]) for one, two in again)
    assert len(again) > 16 and differ > len(again) / 4, "the same in every epoch"


def test_chances_of_what_is_missing(encoder):
    """Of 400 keys the shares are those asked for, scaled by strength; a corruption's rate is below the highest."""
    from training.order import Draw

    drop = Dropping(ModalityDropout(image=0.3, text=0.5, strength=0.5), 0, encoder)
    drawn = [drop.draw(Draw("s", View.both, (0,)), (0, "both", (str(n),))) for n in range(400)]
    without_picture = sum(draw.view is View.text for draw in drawn)
    without_words = sum(draw.view is View.vision and not draw.question for draw in drawn)
    assert without_picture == pytest.approx(60, abs=22) and without_words == pytest.approx(100, abs=28)
    assert sum(draw == Draw("s", View.both, (0,)) for draw in drawn) == 400 - without_picture - without_words
    settings = Lnln(level=0, text=Corruption(chance=0.5, highest=0.6), image=Corruption(chance=0.0), strength=0.5)
    corrupt = Corrupting(settings, 0, encoder)
    row = encoder.encode([{"role": "user", "content": "What colour is the shape at A?"}])
    rates = [corrupt.row(row, (0, "both", (str(n),)))[1] for n in range(200)]
    assert all(rate["image"] == 0 for rate in rates)
    text = torch.tensor([rate["text"] for rate in rates])
    assert 0.25 < text.max() <= 0.3 and int((text > 0).sum()) == pytest.approx(100, abs=28)


# -- resuming --------------------------------------------------------------------------------------

RESUMED = {
    "miles": {"method": "miles", "probe": "PROBE"},
    "cggm": {"method": "cggm", "every": 2, "direction": {"lam": 0.5}},
    "cggm, all weights": {"method": "cggm", "every": 2},
    "msam": {"method": "msam", "every": 2, "decay": 0.5},
    "blend": {"method": "unimodal_losses", "blend": "PROBE"},
    "random factors": {"method": "random_factors", "of": "FACTORS", "every": 1},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_where_a_straight_one_does(recipe_file, probe, tmp_path, monkeypatch, name):
    """Five steps with a checkpoint after the third, between two measurements; dropout and a schedule."""
    factors = [{"balance/factor_image": 1 - n / 8, "balance/factor_text": 1 + n / 8} for n in range(6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in factors))
    places = {"PROBE": probe, "FACTORS": str(tmp_path)}
    section = {key: places.get(value, value) if isinstance(value, str) else value for key, value in RESUMED[name].items()}
    if name == "miles":
        scripted(monkeypatch, {0: IMAGE_LEADS, 2: TEXT_LEADS, 4: EVEN})
    changes = {"lora": None} if "all weights" in name else {"lora": {"dropout": 0.1}}
    changes |= {"steps": 5, "batch": 2, "micro_batch": 1, "save": {"every": 3}, "optim": {"schedule": "cosine"}}
    path = recipe_file(views=SIDED, balance=section, **changes)
    straight = trained(path)
    state = straight.trainer.balance.state()
    torch.manual_seed(77)
    resumed = train(trainer_of(path), resume_from_checkpoint=str(straight.trainer.args.output_dir) + "/checkpoint-3")
    assert same(resumed.weights, straight.weights)
    assert len(resumed.gradients) == 2 and resumed.rows == straight.rows
    assert resumed.trainer.balance.state() == state
    shown = [{key: value for key, value in row.items() if key.startswith("balance/")} for row in straight.rows]
    assert all(shown) and any(one != shown[0] for one in shown[1:]), "the method did the same at every step"


# -- with a preference -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section", ({"method": "miles", "probe": "PROBE"}, {"method": "msam", "share": 1.0}), ids=("miles", "msam")
)
def test_with_a_preference(pair_file, probe, monkeypatch, section):
    section = {key: probe if value == "PROBE" else value for key, value in section.items()}
    plain = trained(pair_file({}, steps=1))
    if section["method"] == "miles":
        asking = seeded(pair_file({}, steps=1, balance=section))
        told = asking.probing.ask(asking)
        assert set(told) == {"both", "image", "text", "none"} and len({values["loss"] for values in told.values()}) == 4
        scripted(monkeypatch, {0: TEXT_LEADS})
    found = trained(pair_file({}, steps=1, balance=section))
    moved = torch.cat([(found.weights[name] - plain.weights[name]).abs().flatten() for name in plain.weights])
    assert moved.mean() > 1e-5
    assert found.rows[0]["loss"] == plain.rows[0]["loss"]
    if section["method"] == "miles":
        assert found.rows[0]["lr_language"] == 5e-4 and found.rows[0]["lr_vision"] == 1e-3
        assert same(found.gradients[0], plain.gradients[0])
    else:
        assert not close(found.gradients[0], plain.gradients[0], rel=1e-3)


def test_a_repeated_pass_over_pairs_is_counted_nowhere(pair_file):
    preference = {"conditional": 1.0, "noise_aware": {"weight": 0.5}}
    path = pair_file(preference, steps=1, balance={"method": "msam", "share": 1.0, "rho": 0.5})
    found, plain = trained(path), trained(path, "balance.strength=0.0")
    keys = set(plain.rows[0]) - {"grad_norm"}
    assert {key: found.rows[0][key] for key in keys} == {key: plain.rows[0][key] for key in keys}
    assert found.trainer.pace.mean == plain.trainer.pace.mean


def test_a_repeated_pass_over_pairs_has_the_same_loss(pair_file):
    """What the terms remember stands where it stood before the first pass: unperturbed, the second gives the same gradient."""
    preference = {"answer": {}, "noise_aware": {"weight": 1.0, "memory": 0.2}}
    path = pair_file(preference, steps=1, batch=4, micro_batch=1, balance={"method": "msam", "share": 1.0, "rho": 1e-9})
    found, plain = trained(path), trained(path, "balance.strength=0.0")
    assert close(found.gradients[0], plain.gradients[0], rel=1e-3)
