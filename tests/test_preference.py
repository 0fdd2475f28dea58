"""Which sides a preference needs, to which pairs a term applies, and how the terms are put together."""

import math

import pytest
import torch

from data_prep.pair import Pair
from training.config import NoiseAware, Preference, RecipeError, SymMPO
from training.preference import (
    BLIND, BLIND_OTHER, CHOSEN, OTHER_IMAGE, OTHER_OTHER, OWN_OTHER, PRIOR, REJECTED, NoisePace, Side, applicable, combine, has,
    needed, report, watched,
)  # fmt: skip

LN2 = math.log(2)
NOTHING = {"sigmoid": 0.0}


def pair(**changes) -> Pair:
    prompt = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},)
    values = {"id": "a", "group": "g", "source": "s", "license": "CC0-1.0", "prompt": prompt, "chosen": "red", "rejected": "blue",
              "rejected_prior": "green", "images": ("a.png",), "rejected_images": ("b.png",), "rejected_images_answer": "blue"}
    return Pair(**{**values, **changes})


def log_ratios(**values: list[float]) -> tuple[dict, dict, dict]:
    """(d, there, lengths) from log-ratios by a side's name with _ for the dot; None: the pair does not have it."""
    sides = {Side(*name.split("_")): column for name, column in values.items()}
    d = {side: torch.tensor([0.0 if v is None else v for v in column], requires_grad=True) for side, column in sides.items()}
    there = {side: torch.tensor([v is not None for v in column]) for side, column in sides.items()}
    return d, there, {side: torch.full_like(there[side], 2, dtype=torch.long) for side in sides}


@pytest.mark.parametrize(("preference", "sides"), [
    (Preference(), [CHOSEN, REJECTED]),
    (Preference(answer={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}), [CHOSEN, REJECTED]),
    (Preference(conditional=1.0, anchor=1.0), [CHOSEN, REJECTED, OTHER_IMAGE]),
    (Preference(answer=NOTHING, anchor=1.0), [CHOSEN]),
    (Preference(attend=0.5), [CHOSEN, REJECTED, BLIND]),
    (Preference(answer=NOTHING, language_prior=0.1), [BLIND]),
    (Preference(answer={}, noise_aware=NoiseAware()), [CHOSEN, PRIOR]),
    (Preference(noise_aware=NoiseAware(weight=0.0)), [CHOSEN, REJECTED]),
    (Preference(sympmo=SymMPO()), [CHOSEN, REJECTED, OWN_OTHER, OTHER_IMAGE, OTHER_OTHER]),
    (Preference(answer={}, svco=1.0), [CHOSEN, BLIND, OTHER_IMAGE, OWN_OTHER, BLIND_OTHER, OTHER_OTHER]),
])
def test_a_term_without_weight_needs_no_side(preference, sides):
    assert set(needed(preference)) == set(sides) and len(needed(preference)) == len(sides)
    assert set(watched(preference)) == {OTHER_IMAGE, BLIND} - set(sides)


def test_nothing_is_watched_where_the_recipe_says_so():
    assert watched(Preference(watch=False)) == ()


def test_which_sides_a_pair_has():
    whole = pair()
    assert all(has(whole, Side(*name), "own") for name in (CHOSEN, REJECTED, PRIOR, OTHER_IMAGE, BLIND, OTHER_OTHER, BLIND_OTHER))
    bare = pair(rejected_images=(), rejected_images_answer=None)
    assert not has(bare, OTHER_IMAGE, "own") and has(bare, OTHER_IMAGE, "crop:0.01-0.2") and not has(bare, OTHER_OTHER, "own")
    words = pair(images=(), rejected_images=(), rejected_images_answer=None, prompt=({"role": "user", "content": [{"type": "text", "text": "?"}]},))
    assert has(words, REJECTED, "own") and not has(words, BLIND, "own") and not has(words, OTHER_IMAGE, "gray")
    assert not has(pair(rejected_prior=None), PRIOR, "own")


def test_how_many_pairs_a_term_applies_to():
    bare = pair(rejected_images=(), rejected_images_answer=None)
    assert applicable(Preference(conditional=1.0), [pair(), bare]) == {"conditional": 1, "answer.sigmoid": 2}
    assert applicable(Preference(conditional=1.0, negative="gray"), [pair(), bare])["conditional"] == 2


@pytest.mark.parametrize(("preference", "changes", "message"), [
    (Preference(answer=NOTHING), {}, "no term has a weight"),
    (Preference(answer=NOTHING, language_prior=0.1), {}, "preference.language_prior: is an addition to another term"),
    (Preference(conditional=1.0), {"rejected_images": (), "rejected_images_answer": None}, "preference.conditional: no pair has chosen under rejected_images"),
    (Preference(noise_aware=NoiseAware()), {"rejected_prior": None}, "preference.noise_aware: no pair has rejected_prior"),
    (Preference(sympmo=SymMPO()), {"rejected_images_answer": None}, "preference.sympmo: no pair has rejected_images_answer"),
    (Preference(), {"rejected": None}, "preference.answer.sigmoid: no pair has rejected"),
    (Preference(svco=1.0, negative="gray"), {}, "preference.negative: svco needs the pictures that come with the pairs"),
])
def test_a_term_that_finds_no_pair_is_refused(preference, changes, message):
    with pytest.raises(RecipeError, match=message):
        applicable(preference, [pair(**changes)])


def test_terms_are_means_over_all_pairs_and_count_only_where_they_apply():
    """Two pairs, the second without a rejected picture."""
    preference = Preference(answer={}, conditional=2.0, anchor=0.5, beta=0.5)
    d, there, lengths = log_ratios(own_chosen=[2.0, -1.0], other_chosen=[0.0, None])
    loss, shown = combine(preference, d, there, lengths, None)
    pull = [math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(0.5))]
    assert loss.item() == pytest.approx((2.0 * math.log(1 + math.exp(-1.0)) + 0.5 * sum(pull)) / 2)
    assert {name: (total.item(), number.item()) for name, (total, number) in shown.items()} == {
        "terms/conditional": (pytest.approx(pull[0]), 1), "terms/anchor": (pytest.approx(sum(pull)), 2)}
    loss.backward()
    assert d[OTHER_IMAGE].grad.tolist()[1] == 0.0 and d[OTHER_IMAGE].grad.tolist()[0] > 0


def test_values_that_are_not_there_do_not_reach_the_loss():
    preference = Preference(answer={}, conditional=1.0)
    d, there, lengths = log_ratios(own_chosen=[0.0, 0.0], other_chosen=[0.0, None])
    d[OTHER_IMAGE] = torch.tensor([0.0, float("inf")], requires_grad=True)
    loss, _ = combine(preference, d, there, lengths, None)
    loss.backward()
    assert loss.item() == pytest.approx(LN2 / 2) and d[OTHER_IMAGE].grad.isfinite().all()


def test_start_values_of_the_whole_methods():
    zeros = {name: [0.0] for name in ("own_chosen", "own_other", "other_chosen", "other_other", "none_chosen", "none_other", "own_prior")}
    d, there, lengths = log_ratios(**zeros)
    def value(preference: Preference) -> float:
        pace = None if preference.noise_aware is None else NoisePace(preference.noise_aware)
        return combine(preference, d, there, lengths, pace)[0].item()

    assert value(Preference(conditional=1.0, anchor=1.0)) == pytest.approx(2 * LN2)         # and ln 2 of TRL's sigmoid
    assert value(Preference(answer={}, svco=1.0)) == pytest.approx(4 * LN2)
    assert value(Preference(sympmo=SymMPO(lam=0.3, eta=0.7))) == pytest.approx(LN2 * 2 * (0.3 + 0.7))
    assert value(Preference(noise_aware=NoiseAware(weight=2.0, q=0.5))) == pytest.approx(2 * (1 - 0.5**0.5) / 0.5)
    assert value(Preference(noise_aware=NoiseAware(weight=1.0, q="code"))) == pytest.approx(0.5)    # q begins at 1
    assert value(Preference(attend=1.0, language_prior=0.5)) == pytest.approx(1.5 * LN2)


def test_q_follows_a_running_mean_of_margins():
    pace = NoisePace(NoiseAware(q="paper", alpha=0.5, memory=0.75))
    first, second = pace(torch.tensor([2.0, 4.0])), pace(torch.tensor([7.0]))
    assert float(first) == pytest.approx(1 / (1 + math.exp(0.5 * 3.0)))
    assert float(second) == pytest.approx(1 / (1 + math.exp(0.5 * (0.75 * 3.0 + 0.25 * 7.0))))
    assert NoisePace(NoiseAware(q=0.4))(torch.tensor([9.0])) == 0.4
    assert float(NoisePace(NoiseAware(q="paper", memory=0.0))(torch.tensor([0.0]))) == pytest.approx(0.5)


def test_what_is_logged():
    d, there, lengths = log_ratios(own_chosen=[1.0, -3.0], own_rejected=[0.0, 1.0], other_chosen=[0.5, None], none_chosen=[-1.0, 1.0])
    shown = {name: (total / number).item() for name, (total, number) in report(Preference(beta=0.1), d, there, lengths).items()}
    assert shown == {
        "log_ratio/own.chosen": pytest.approx(-1.0), "log_ratio/own.rejected": pytest.approx(0.5),
        "log_ratio/other.chosen": pytest.approx(0.5), "log_ratio/none.chosen": pytest.approx(0.0),
        "margin/answer": pytest.approx(0.1 * (1.0 - 4.0) / 2), "margin/picture": pytest.approx(0.05),
        "margin/blind": pytest.approx(0.1 * (2.0 - 4.0) / 2), "chosen_below_0": pytest.approx(0.5), "answer_tokens": pytest.approx(2.0)}
