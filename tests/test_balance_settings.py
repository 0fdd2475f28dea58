"""The section `balance`: what each method asks for, and what is refused, in one sentence and before any weight is loaded."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import yaml

from data_prep.problem import View
from training import model as model_module
from training.balance.methods import METHODS
from training.balance.settings import (Balance, Cggm, Direction, Lnln, Miles, Mnl, ModalityDropout, Msam, OgmGe, Probe,
                                       RandomFactors, UnimodalLosses)
from training.config import Loss, RecipeError, load_recipe
from training.objective import branch_roles, needs

from .pairs_for_tests import pairs_of, written
from .running import ROOT, refusal, trainer_of

PROBE = Probe("probe.yaml")
KINDS = {get_args(kind.__dataclass_fields__["method"].type)[0]: kind for kind in get_args(get_args(Balance)[0])}


@pytest.fixture
def probe(twins, tmp_path) -> dict:
    """A probe section for recipes of `recipe_file`; its mixture lies beside them."""
    sources = {"twins": {"problems": str(twins / "test.jsonl"), "views": {"both": 1.0}}}
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump({"sources": sources}), encoding="utf-8")
    return {"mixture": "probe.yaml", "items": 4, "every": 2}


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(model_module, "load_base", lambda *_: pytest.fail("weights were loaded"))


def test_every_method_of_the_section_has_its_class():
    assert set(KINDS) == set(METHODS)


# -- what is asked for -----------------------------------------------------------------------------

SEEN, LEARNS = {"image": False, "text": False}, {"image": True, "text": True}


@pytest.mark.parametrize(
    "settings, expected",
    (
        (Miles(probe=PROBE), [{}] * 4),
        (Miles(probe=PROBE, unimodal_ce=1.0), [LEARNS] * 4),
        (Cggm(every=3), [SEEN, {}, {}, SEEN]),
        (Cggm(every=3, direction=Direction()), [SEEN] * 4),
        (Cggm(measure="probe", probe=PROBE), [{}] * 4),
        (Mnl(), [LEARNS] * 4),
        (Mnl(warmup_steps=2), [{}, {}, LEARNS, LEARNS]),
        (Mnl(warmup_steps=2, profile="either_side"), [LEARNS] * 4),
        (Mnl(warmup_steps=2, profile="either_side", unimodal_ce=0.0), [{}, {}, LEARNS, LEARNS]),
        (Msam(every=2), [SEEN | {"none": False}, {}] * 2),
        (Msam(share=0.7), [{}] * 4),
        # Along a branch's own loss: its batch is needed at every step, a look at it only where shares are measured.
        (Msam(every=2, scope="view"), [SEEN | {"none": False}, {"image": None, "text": None}] * 2),
        (Lnln(level=0), [{}] * 4),
        (OgmGe(every=2), [SEEN, {}] * 2),
        (ModalityDropout(), [{}] * 4),
        (UnimodalLosses(), [LEARNS] * 4),
        (UnimodalLosses(image=0.0), [{"text": True}] * 4),
        (UnimodalLosses(image=0.0, text=0.0), [{}] * 4),
        (UnimodalLosses(blend=PROBE), [LEARNS] * 4),
        (RandomFactors(of="runs/x"), [{}] * 4),
    ),
    ids=str,
)
def test_branches_of_the_first_steps(settings, expected):
    assert [settings.views(step) for step in range(4)] == expected
    for step in range(4):
        assert set(branch_roles(settings, step)) == set(expected[step])


def test_the_question_stands_in_the_words_alone_unless_it_is_kept():
    for question, others in (("dropped", False), ("kept", True)):
        roles = branch_roles(replace(Msam(), question=question), 0)
        assert {name: role.question for name, role in roles.items()} == {"text": True, "image": others, "none": others}


def test_needs_of_a_drawn_view():
    assert set(needs(Loss(), View.both, Mnl())) == {View.vision, View.text, View.blind}
    assert set(needs(Loss(), View.vision, Mnl())) == {View.vision, View.blind}
    for view in set(View) - {View.both, View.vision}:
        with pytest.raises(RecipeError, match=f"balance: the mixture draws the view {view.value}, .* it may draw both, vision"):
            needs(Loss(), view, Mnl())


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, said",
    (
        ({"method": "mnl", "lamb": 0.7}, "balance.lamb: no such key; did you mean 'lam'?"),
        ({"method": "cggm", "direction": {"lamda": 0.1}}, "balance.direction.lamda: no such key; did you mean 'lam'?"),
        ({"method": "mnl", "tau": 0.2}, "balance.tau: no such key"),
        ({"method": "mile"}, "balance.method: no such 'mile'; there are miles, cggm, mnl"),
        ({"method": "mile"}, "did you mean 'miles'?"),
        ({"strength": 0.5}, "balance.method: is missing"),
        ({"method": "miles"}, "balance: probe: is missing; MILES measures on held-out problems"),
        ({"method": "miles", "probe": {}}, "balance.probe.mixture: is missing"),
        ({"method": "miles", "probe": {"mixture": "nowhere.yaml"}}, "balance.probe.mixture: no such file: nowhere.yaml"),
        ({"method": "unimodal_losses", "blend": {"mixture": "nowhere.yaml"}}, "balance.blend.mixture: no such file: nowhere"),
        ({"method": "unimodal_losses", "blend": {"mixture": "x.yaml"}, "image": 0.5}, "weights that a blend decides itself"),
        ({"method": "cggm", "measure": "probe"}, "balance: measure: probe needs a probe, and a probe is not used without it"),
        ({"method": "mnl", "strength": 1.5}, "balance.strength: input should be less than or equal to 1, not 1.5"),
        ({"method": "msam", "rho": "large"}, "balance.rho"),
        ({"method": "msam", "share": 1.0, "scope": "tower"}, "balance: share: 1 is fixed"),
        ({"method": "modality_dropout", "image": 0.7, "text": 0.4}, "balance: image and text are chances of two things"),
        ({"method": "random_factors"}, "balance: of: is missing"),
    ),
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_mistakes(recipe_file, section, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(balance=section))
    message = str(caught.value)
    assert said in message and message.startswith(str(recipe_file(balance=section))) and "\n" not in message, message


def test_the_same_of_overrides(recipe_file):
    with pytest.raises(RecipeError, match=r"override balance.lamb=0.7: balance.lamb: no such key; did you mean 'lam'\?"):
        load_recipe(recipe_file(balance={"method": "mnl"}), ["balance.lamb=0.7"])


def test_a_mixture_whose_views_have_no_sides(recipe_file, no_weights):
    path = recipe_file(views={"both": 0.5, "text": 0.5}, balance={"method": "mnl"})
    said = "balance: the mixture draws the view text, which has no picture side and word side to balance; it may draw both, "
    assert said + "vision" in refusal(path)


def test_a_probe_whose_views_have_no_sides(recipe_file, probe, tmp_path):
    file = tmp_path / "probe.yaml"
    file.write_text(file.read_text().replace("both", "text"))
    path = recipe_file(views={"both": 1.0}, balance={"method": "miles", "probe": probe})
    with pytest.raises(RecipeError, match="the probe's mixture: balance: the mixture draws the view text, .* it may draw both, vision"):
        trainer_of(path)


@pytest.mark.parametrize("section", ({"method": "msam"}, {"method": "ogm_ge"}), ids=str)
def test_what_deepspeed_cannot_do(recipe_file, no_weights, section):
    path = recipe_file(views={"both": 1.0}, balance=section)
    message = refusal(path, "--deepspeed", str(ROOT / "ds_configs" / "zero2.json"))
    assert f"balance: {section['method']} changes gradients between the backward pass and the optimizer's step" in message


def test_factors_of_a_run_that_is_not_there(recipe_file, tmp_path, no_weights):
    path = recipe_file(views={"both": 1.0}, balance={"method": "random_factors", "of": str(tmp_path / "run-{seed}")})
    assert f"balance.of: {tmp_path / 'run-0' / 'metrics.jsonl'}: cannot be read" in refusal(path)
    (tmp_path / "run-0").mkdir()
    (tmp_path / "run-0" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "no factors are logged there" in refusal(path)


@pytest.mark.parametrize(
    "section, reason",
    (
        ({"method": "mnl"}, "it acts on branches of problems"),
        ({"method": "lnln", "level": 0}, "it acts on branches of problems"),
        ({"method": "modality_dropout"}, "it acts on branches of problems"),
        ({"method": "unimodal_losses"}, "it acts on branches of problems"),
        ({"method": "msam"}, "its branches are measured on batches of problems; use measure: probe"),
        ({"method": "cggm"}, "its branches are measured on batches of problems; use measure: probe"),
        ({"method": "ogm_ge"}, "its branches are measured on batches of problems; use measure: probe"),
        ({"method": "msam", "scope": "view", "measure": "probe", "probe": "PROBE"}, "scope: view is the loss of a branch"),
        ({"method": "cggm", "direction": {}, "measure": "probe", "probe": "PROBE"}, "direction is a loss on problems"),
        ({"method": "miles", "unimodal_ce": 1.0, "probe": "PROBE"}, "unimodal_ce is a loss on problems"),
    ),
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_does_not_go_with_a_preference(recipe_file, twins, probe, tmp_path, section, reason):
    file = written(twins, pairs_of(twins, 2), f"{tmp_path.name}-pairs.jsonl")
    section = {key: probe if value == "PROBE" else value for key, value in section.items()}
    path = recipe_file(sources={"twins": {"pairs": str(file), "rate": 1.0}}, preference={}, balance=section)
    with pytest.raises(RecipeError, match=f"balance: {section['method']} does not go with a preference: {reason}"):
        load_recipe(path)
    assert load_recipe(path, ["preference=null"]).balance.method == section["method"]
