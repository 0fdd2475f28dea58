"""Two branches: the data are what they are said to be, methods at strength 0 are plain training, statistics by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.two_branches import __main__ as command
from benchmarks.two_branches import methods, rows, summary
from benchmarks.two_branches.rows import METHODS
from benchmarks.two_branches.task import MODALITIES, RATES, Branches, Task, accuracy, best_possible, draw, measure, probe
from benchmarks.two_branches.training import Diverged, Method, Training, train

from .test_recipes import ROOT

SMALL = Task(train=96, validation=48, test=64, batch=32, epochs=2, width=24, hidden=16, features=8)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---- the task --------------------------------------------------------------------------------------------------------

def test_samples_show_what_they_carry():
    """At signals far above the noise: a text lies along its class's direction, an image along an axis, as often as said."""
    task = Task(test=4000, classes=3, text_signal=12.0, image_signal=10.0)
    data = draw(3, task)
    for one, x, count in (("image", data.test.image, task.axes), ("text", data.test.text, 1)):
        vectors = data.vectors[one]
        assert vectors.shape == (3, count, task.width)
        flat = vectors.reshape(-1, task.width)
        assert np.allclose(flat @ flat.T, np.eye(len(flat)) * (flat[0] @ flat[0])), "orthogonal, of one length"
        along = np.einsum("rd,rvd->rv", x.numpy(), vectors[data.test.labels]) / np.linalg.norm(vectors[0, 0])
        # A sample that carries the class lies at the signal along one vector, others at 0; noise has a deviation of 1.
        carries = np.abs(along).max(1) > getattr(task, f"{one}_signal") / 2
        assert carries.mean() == pytest.approx(task.both + task.text if one == "text" else 1 - task.text, abs=0.02)
        assert along[carries].max(1).mean() == pytest.approx(12.0 if one == "text" else 10.0 / 2, abs=0.6), "either sign"
    means = [data.test.image[data.test.labels == label].mean(0).norm() for label in range(3)]
    assert max(means) < 0.9, "both signs are as frequent, so the classes of the image have no mean to read"


def test_data_depend_on_the_seed_alone():
    draw.cache_clear()
    first = draw(1, SMALL)
    draw.cache_clear()
    assert all(torch.equal(one, two) for one, two in zip(first.train, draw(1, SMALL).train))
    assert not torch.equal(first.train.image, draw(2, SMALL).train.image)
    assert not torch.equal(first.train.image[:48], first.validation.image)
    longer = draw(1, replace(SMALL, validation=60))
    assert torch.equal(first.test.text, longer.test.text), "each split has random numbers of its own"


def test_best_rule_by_hand():
    """Two classes, one axis each: the image's best rule is the larger |x m|, the text's the larger x m."""
    task = Task(classes=2, axes=1, width=2, test=500)
    data = draw(0, task)
    found = best_possible(data.test, data.vectors, task)
    image = np.abs(data.test.image.numpy() @ data.vectors["image"][:, 0].T).argmax(1)
    text = (data.test.text.numpy() @ data.vectors["text"][:, 0].T).argmax(1)
    labels = data.test.labels.numpy()
    assert found["image"] == (image == labels).mean() and found["text"] == (text == labels).mean()
    assert found["joint"] > max(found["image"], found["text"])


def test_the_text_is_learned_first_and_both_are_better_than_each():
    task = Task()
    data = draw(7, task)
    best = best_possible(data.test, data.vectors, task)
    assert best["joint"] > best["text"] + 0.05 > best["image"] + 0.05
    run, history = Training(methods.Separate(), 7, task, optimizer="sgd"), []
    for _ in range(12):
        run.run_epoch()
        with torch.no_grad():
            out = run.model(data.validation.image, data.validation.text)
            logits = {one: run.model.heads[one](getattr(out, one)) for one in MODALITIES} | {"joint": out.joint}
            history.append({name: accuracy(each, data.validation.labels) for name, each in logits.items()})
    reached = {one: next(epoch for epoch, each in enumerate(history) if each[one] > 0.9 * max(e[one] for e in history))
               for one in MODALITIES}
    assert reached["text"] < reached["image"], "the dominant branch is there first, undisturbed"
    assert history[-1]["joint"] > max(history[-1][one] for one in MODALITIES) + 0.03
    assert history[-1]["image"] > 0.5
    with_text = train(Method(), 7, replace(task, epochs=12), optimizer="sgd")
    weak = [measure(one.model, data, 7)["weak"] for one in (with_text, run)]
    assert weak[0] < weak[1] - 0.1, "beside the text, the image learns less than by itself"


def test_probe():
    """Separable features give 1, features that say nothing chance, and those that are no numbers count as 0."""
    labels = torch.arange(300) % 3
    clear = torch.nn.functional.one_hot(labels, 3).float()
    assert probe(clear, labels, clear[:30], labels[:30]) == 1
    assert probe(clear * 1000 + 5, labels, clear[:30] * 1000 + 5, labels[:30]) == 1, "scale and place do not matter"
    noise = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert probe(noise, labels, noise.roll(1, 0), labels) < 0.5
    assert probe(torch.full((300, 4), math.nan), labels, noise, labels) == pytest.approx(1 / 3)


def test_measures_of_a_model_that_reads_the_text_alone():
    data = draw(0, SMALL)
    model = Branches(SMALL, 0)
    with torch.no_grad():
        model.half("image").zero_()
    found = measure(model, data, 0)
    assert found["image_only"] == measure(model, data, 0)["image_only"]
    assert found["text_only"] == found["joint"], "the image changes nothing"
    with torch.no_grad():
        none = accuracy(model(data.test.image, data.train.text.mean(0).expand_as(data.test.text)).joint, data.test.labels)
    assert found["image_only"] == none
    # phi_image = 1/2 [(none - none) + (joint - joint)]: nothing, unless the text has nothing either.
    assert found["image_share"] == (0 if found["joint"] > none else 0.5)
    assert found["corrupted"][0] == found["joint"] and len(found["corrupted"]) == len(RATES)


# ---- methods ---------------------------------------------------------------------------------------------------------

def weights(method, optimizer="sgd", task=SMALL):
    run = train(method, 0, task, optimizer=optimizer)
    assert not run.diverged
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def equal(one, two, *, heads=True):
    return all(torch.equal(one[name], two[name]) for name in one if heads or not name.startswith("heads"))


NOTHING = {     # strength 0 -> what it then is
    "slow gradient": (lambda: methods.Slow(factor=1.0, act="gradient"), Method),
    "slow update": (lambda: methods.Slow(factor=1.0, act="update"), Method),
    "ogm": (lambda: methods.Ogm(alpha=0.0, noise=False), Method),
    "ogm update": (lambda: methods.Ogm(alpha=0.0, act="update"), Method),
    "cggm": (lambda: methods.Cggm(strength=0.0, lam=0.0), Method),
    "cggm update": (lambda: methods.Cggm(strength=0.0, lam=0.0, act="update"), Method),
    "random": (lambda: methods.Random(strength=0.0, lam=0.0), Method),
    "sam": (lambda: methods.Sharpness(rho=0.0, share=1.0), Method),
    "sam share": (lambda: methods.Sharpness(rho=0.2, share=0.0), Method),
    "msam": (lambda: methods.Sharpness(rho=0.0), Method),
    "dropout": (lambda: methods.Dropout(image=0.0, text=0.0), Method),
    "lnln rate": (lambda: methods.Corruption(highest=0.0), Method),
    "lnln chance": (lambda: methods.Corruption(chance=0.0), Method),
    "unimodal": (lambda: methods.Unimodal(image=0.0, text=0.0), Method),
    "miles": (lambda: methods.Miles(mu=1.0), methods.Unimodal),
    "mnl": (lambda: methods.Negative(lam=0.0, student_ce=False, reduction="batch"), methods.Unimodal),
    "cggm stale": (lambda: methods.Cggm(direction="stale"), lambda: methods.Cggm(lam=0.0)),
}


@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
@pytest.mark.parametrize("name", NOTHING)
def test_strength_0_is_the_control_bit_for_bit(name, optimizer):
    method, control = NOTHING[name]
    assert equal(weights(method(), optimizer), weights(control(), optimizer))


@pytest.mark.parametrize("method", (lambda: methods.Miles(mu=1.0, detached=True), lambda: methods.Unimodal(detached=True)))
def test_detached_heads_leave_the_encoders_alone(method):
    found, plain = weights(method()), weights(Method())
    assert equal(found, plain, heads=False) and not equal(found, plain)


def test_adam_undoes_a_factor_on_the_gradient_and_not_one_on_the_update():
    """How far the text's first layer moves in comparison with plain training."""
    start = Branches(SMALL, 0).state_dict()["encoders.text.0.weight"]

    def moved(method, optimizer):
        return (weights(method, optimizer)["encoders.text.0.weight"] - start).norm().item()

    ratio = {(optimizer, act): moved(methods.Slow(act=act), optimizer) / moved(Method(), optimizer)
             for optimizer in ("sgd", "adam") for act in ("gradient", "update")}
    assert ratio["adam", "gradient"] == pytest.approx(1, abs=0.02) and ratio["adam", "update"] < 0.2
    assert ratio["sgd", "gradient"] == pytest.approx(ratio["sgd", "update"], rel=1e-4) and ratio["sgd", "update"] < 0.2


def test_random_coefficients_are_cggms_in_another_order():
    task = replace(SMALL, epochs=4)
    measured, drawn = methods.Cggm(), methods.Random()
    train(measured, 0, task, optimizer="sgd")
    train(drawn, 0, task, optimizer="sgd")
    assert sorted(measured.table) == sorted(drawn.table) and measured.table != drawn.table


def test_msam_takes_its_share_from_the_batch_at_the_weights():
    """A model whose joint head reads the text alone gives the text the whole share, and no other method has changed it."""
    run = Training(methods.Sharpness(rho=0.05), 0, SMALL, optimizer="sgd")
    with torch.no_grad():
        run.model.half("image").zero_()
    rows_of = slice(0, 32)
    image, text, labels = (one[rows_of] for one in run.data.train)
    none = accuracy(run.model(torch.zeros_like(image), torch.zeros_like(text)).joint, labels)
    joint = accuracy(run.model(image, text).joint, labels)
    run.step(image, text, labels)
    assert run.optimizer.share == (1.0 if joint > none else 0.5) and run.passes == 2


def test_a_loss_that_is_not_finite_ends_the_training():
    class Burst(Method):
        def loss(self, out, image, text, labels):
            return super().loss(out, image, text, labels) * (math.inf if self.run.epoch == 1 else 1.0)

    run = train(Burst(), 0, SMALL, optimizer="sgd")
    assert run.diverged and run.epoch == 1
    with pytest.raises(Diverged):
        run.run_epoch()


# ---- the command and its summary -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("two_branches")
    command.main(["--out", str(out), "--seeds", "0,1"], SMALL)
    return out


def test_every_method_runs_and_the_rest_is_not_run_again(folder, capsys, monkeypatch):
    found = json.loads((folder / "two_branches.json").read_text(encoding="utf-8"))
    assert list(METHODS) == sorted(found["methods"], key=list(METHODS).index)
    assert found["commit"] and found["packages"] and found["seeds"] == [0, 1]
    for one in found["methods"].values():
        assert all(0 <= value <= 1 for name in summary.COMPARED for value in one["measures"][name]["values"])
        assert one["measures"]["time_ratio"]["mean"] > 0.2 and one["diverged"] == 0
    svg = (folder / "two_branches.svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml") and svg.endswith(summary.stamp(found))
    lines = (folder / command.ROWS).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 * len(METHODS)
    made = []
    monkeypatch.setattr(command, "row", lambda name, seed, task: made.append((name, seed)) or json.loads(lines[0]) | {
        "method": name, "seed": seed})
    changed = [json.loads(line) for line in lines[1:]]      # the first is cut off, one was made by other code
    changed[4]["fingerprint"] = "other"
    text = lines[0][:40] + "\n" + "".join(json.dumps(one) + "\n" for one in changed)
    (folder / command.ROWS).write_text(text, encoding="utf-8")
    command.main(["--out", str(folder), "--seeds", "0,1"], SMALL)
    assert made == [("plain", 0), (changed[4]["method"], 0)]


@pytest.mark.parametrize("words, message", (
    (["--methods", "milse"], "no such method: milse"), (["--seeds", "0,100"], "chosen with seed 100"),
    (["--seeds", "1,1"], "must differ"), (["--seeds", "a"], "whole numbers"), (["--methods", "plain"], "nothing to draw")))
def test_words_that_make_no_sense(words, message, tmp_path):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command.main(["--out", str(tmp_path), *words], SMALL)


def test_controls_come_along():
    assert command.wanted("miles") == ["plain-adam", "unimodal", "miles"]
    for name, entry in METHODS.items():
        assert entry.control in {None, *METHODS} and METHODS[entry.plain].optimizer == entry.optimizer, name
        assert entry.control is None or METHODS[entry.control].optimizer == entry.optimizer, name


def made_up(values):
    """Rows in which every measure but the weak branch is 0.5: {method: weak per seed}."""
    return [{"method": name, "seed": seed, "weak": weak, **{one: 0.5 for one in summary.MEASURES[1:]}, "diverged": False,
             "corrupted": [0.5] * len(RATES)} for name, each in values.items() for seed, weak in enumerate(each)]


REFERENCES = [{"best_possible": {"joint": 1.0, "image": 0.8, "text": 0.9}, "untrained": {"weak": 0.2, "dominant": 0.6}}]


def test_statistics_by_hand():
    """Differences .1, .2, .3: mean .2, standard error .1 / sqrt 3, t(2) = 4.302653, so +-.248414. Of .1 and .101: t(1)."""
    found = summary.summarise(made_up({"plain": [0.3, 0.4, 0.5], "sam": [0.4, 0.6, 0.8]}), REFERENCES, [0, 1, 2], SMALL)
    change = found["methods"]["sam"]["against_plain"]["weak"]
    assert change["mean"] == pytest.approx(0.2) and change["low"] == pytest.approx(0.2 - 0.2484138, abs=1e-6)
    assert change["high"] == pytest.approx(0.2 + 0.2484138, abs=1e-6) and found["methods"]["sam"]["verdict"] == "not shown"
    assert found["methods"]["plain"]["measures"]["weak"]["se"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["methods"]["sam"]["against_plain"]["joint"] == {"mean": 0, "low": 0, "high": 0}
    assert "against_plain" not in found["methods"]["plain"] and "against_control" not in found["methods"]["sam"]
    values = {"plain": [0.3, 0.3], "sam": [0.4, 0.401], "msam": [0.2, 0.201]}
    found = summary.summarise(made_up(values), REFERENCES, [0, 1], SMALL)["methods"]
    reach = 12.7062047 * 0.0005
    assert found["sam"]["against_plain"]["weak"]["low"] == pytest.approx(0.1005 - reach, abs=1e-6)
    assert found["sam"]["verdict"] == "helps" and found["msam"]["verdict"] == "hurts"
    assert found["msam"]["against_control"]["weak"]["mean"] == pytest.approx(-0.2)
    assert summary.reading({"methods": found}) == [
        "- Against plain training, the weak branch. Helps: `sam`. Hurts: `msam`.",
        "- Against their controls, the weak branch. Hurts: `msam` (`sam`)."]
    alphabetical = {"methods": dict(sorted(found.items()))}
    assert list(summary.ordered(alphabetical)) == ["plain", "sam", "msam"]
    one = summary.summarise(made_up({"plain": [0.3], "sam": [0.4]}), REFERENCES, [0], SMALL)["methods"]["sam"]
    assert one["verdict"] == "one seed" and one["measures"]["weak"]["se"] is None


def test_a_missing_row_is_named():
    with pytest.raises(summary.SummaryError, match="no row of sam with seed 2"):
        summary.summarise(made_up({"plain": [0.3] * 3, "sam": [0.4] * 2}), REFERENCES, [0, 1, 2], SMALL)


def test_table_and_terminal_hold_the_same():
    found = summary.summarise(made_up({"plain": [0.3, 0.4, 0.5], "sam": [0.4, 0.6, 0.8]}), REFERENCES, [0, 1, 2], SMALL)
    line = next(line for line in summary.block(found).splitlines() if line.startswith("| `sam`"))
    assert "60.0 ± 11.5 | +20.0 [-4.8, +44.8] | not shown | - | 50.0" in line
    assert "- Against plain training, the weak branch. Not shown: `sam`." in summary.block(found).splitlines()
    console = Console(width=250, record=True, file=open("/dev/null", "w"))
    console.print(summary.terminal(found))
    assert "+20.0 [-4.8, +44.8]" in console.export_text()


# ---- what is committed -----------------------------------------------------------------------------------------------

RESULTS = ROOT / command.RESULT
committed = pytest.mark.skipif(not RESULTS.is_file(), reason="no results yet")


@committed
def test_the_readme_and_the_figure_hold_the_committed_numbers(tmp_path, monkeypatch):
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["seeds"] == [0, 1, 2, 3, 4] and list(METHODS) == sorted(found["methods"], key=list(METHODS).index)
    assert summary.rewritten(ROOT / command.DOCUMENT, found)[1], "run python -m benchmarks.two_branches --readme"
    assert RESULTS.with_suffix(".svg").read_text(encoding="utf-8").endswith(summary.stamp(found))
    # A number that changes is found, and the command mends it.
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / command.RESULT).parent.mkdir(parents=True)
    found["methods"]["sam"]["measures"]["weak"]["mean"] += 0.01
    (tmp_path / command.RESULT).write_text(json.dumps(found), encoding="utf-8")
    (tmp_path / command.DOCUMENT).write_bytes((ROOT / command.DOCUMENT).read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out of date"):
        command.main(["--readme", "--check"])
    command.main(["--readme"])
    command.main(["--readme", "--check"])


@committed
def test_settings_are_the_best_of_those_tried():
    found = json.loads(RESULTS.with_name("tuning.json").read_text(encoding="utf-8"))
    assert found["seeds"] == list(rows.TUNING_SEEDS) and set(found["candidates"]) == set(rows.CANDIDATES)
    for what, (name, candidates) in rows.CANDIDATES.items():
        tried = found["candidates"][what]
        assert [{key: one[key] for key in candidate} for one, candidate in zip(tried, candidates, strict=True)] == candidates
        best = max(tried, key=lambda one: one["validation"])
        assert rows.used(name, {key: best[key] for key in candidates[0]}), f"{what}: {best} was best"


@committed
def test_committed_settings_are_those_of_the_code():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, entry in METHODS.items():
        one = found["methods"][name]
        assert (one["settings"], one["optimizer"], one["idea"]) == (entry.settings, entry.optimizer, entry.idea), name
