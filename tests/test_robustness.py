"""eval.run --corrupt and eval.robustness: what is missing, what is kept apart, and curves worked by hand."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from data_prep.answerer import Answerer, ModelError
from data_prep.encode import Encoder
from data_prep.problem import Corruption, read_problems, render
from eval import robustness, stats
from eval import run as eval_run
from eval.answers import AnswersError
from tests.fakes import Fake, oracle
from tests.test_gap import write_run


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 200)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


class Seeing(Fake):
    """Remembers the prompts; is wrong where more than half is missing."""

    def __init__(self, adapter=None) -> None:
        super().__init__(self.answer, adapter)
        self.prompts = []

    def answer(self, prompt) -> str:
        missing = max(prompt.corruption[:2]) if prompt.corruption else 0
        return prompt.answer if missing <= 0.5 else next(one for one in prompt.choices if one != prompt.answer)

    def likelihoods(self, prompts):
        self.prompts += prompts
        return super().likelihoods(prompts)


def ask(fake, twins, out, *words):
    args = eval_run.parse(["--model", "fake", "--tasks", str(twins / "test.jsonl"), "--views", "both,vision", "--limit", "4",
                           "--out", str(out), *words])
    eval_run.run(args, lambda: fake)
    return rows(out)


# ---- eval.run --corrupt ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", (
    ("text=0.3,image=0.6", {"text": 0.3, "image": 0.6, "seed": 4}), ("image=1", {"text": 0.0, "image": 1.0, "seed": 4}),
    ("text=.5", {"text": 0.5, "image": 0.0, "seed": 4}), ("text=0,image=0", None), ("image=0", None), ("", None), (None, None)))
def test_rates_are_read(text, expected):
    assert eval_run.parse_corruption(text, 4) == expected


@pytest.mark.parametrize("text", ("text=1.1", "image=-0.1", "text=nan", "sound=0.5", "0.5", "text", "text=0.1,text=0.2",
                                  "text=0.1,"))
def test_rates_that_are_none(text, capsys):
    with pytest.raises(SystemExit) as error:
        eval_run.parse(["--model", "m", "--out", "o", "--corrupt", text])
    message = f"--corrupt takes text=RATE,image=RATE, each once at most, with rates from 0 to 1, not '{text}'"
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_what_is_missing_depends_on_the_seed_and_the_item(twins, tmp_path):
    fake = Seeing()
    ask(fake, twins, tmp_path / "a", "--corrupt", "text=0.25,image=0.5", "--corrupt-seed", "7")
    found = {prompt.corruption for prompt in fake.prompts}
    problems = read_problems(twins / "test.jsonl")[:4]
    assert found == {Corruption(0.25, 0.5, (7, problem.id)) for problem in problems}
    assert len(fake.prompts) == 8, "two views of an item miss the same"
    assert json.loads((tmp_path / "a" / "run.json").read_text())["corrupt"] == {"text": 0.25, "image": 0.5, "seed": 7}


def test_answers_with_and_without_missing_parts_are_kept_apart(twins, tmp_path):
    plain = ask(Seeing(), twins, tmp_path / "plain")
    corrupted = {word: ask(Seeing(), twins, tmp_path / word, "--corrupt", word, *more) for word, *more in (
        ("text=0.5",), ("image=0.5",), ("text=0.6",), ("text=0.50", "--corrupt-seed", "1"))}
    keys = [row["key"] for found in (plain, *corrupted.values()) for row in found]
    assert len(set(keys)) == len(keys) == 5 * 8
    for word, old in (("text=0.5", "plain"), ("", "text=0.5"), ("text=0.6", "text=0.5")):
        with pytest.raises(ValueError, match="holds answers of another run; it differs in corrupt: give another --out"):
            ask(Seeing(), twins, tmp_path / old, "--corrupt", word)
    again = Seeing()
    ask(again, twins, tmp_path / "text=0.5", "--corrupt", "text=0.5")
    assert again.asked == 0


def test_runs_with_nothing_missing_are_what_they_were(twins, tmp_path):
    """A rate of 0 is no corruption: the same keys, and a run.json that does not know of it."""
    for name, words in (("plain", ()), ("zero", ("--corrupt", "text=0,image=0", "--corrupt-seed", "3"))):
        ask(Seeing(), twins, tmp_path / name, *words)
        assert "corrupt" not in json.loads((tmp_path / name / "run.json").read_text())
    assert [row["key"] for row in rows(tmp_path / "plain")] == [row["key"] for row in rows(tmp_path / "zero")]


def test_keys_of_answers_that_are_there_already_hold(twins, tmp_path):
    """As they were computed before prompts knew what of them is facts or question."""
    import hashlib

    (row, *_), problem = ask(Seeing(), twins, tmp_path / "a"), read_problems(twins / "test.jsonl")[0]
    row = next(one for one in rows(tmp_path / "a") if one["id"] == problem.id and one["view"] == "both")
    prompt = render(problem, "both")
    fixed = json.dumps([None, None, "fake", None, "likelihood", eval_run.PARSER_VERSION, 32, "float32",
                        {"min": 3136, "max": 1003520}])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "".join(
        prompt.messages[0]["content"][1]["text"])}]}]
    key = hashlib.sha256(json.dumps([fixed, "test", problem.id, "both", messages, prompt.choices]).encode())
    key.update(f"{prompt.images[0].size}".encode())
    key.update(prompt.images[0].tobytes())
    assert row["key"] == key.hexdigest()[:32]


# ---- a model ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def answerer(tiny):
    return Answerer(str(tiny))


def test_an_answerer_shows_what_is_left(answerer, twins):
    problem = read_problems(twins / "test.jsonl")[0]
    prompt = render(problem, "both")
    seed = (0, problem.id)
    whole, torn, all_gone = (answerer.encode(Namespace(**{**vars(prompt), "corruption": one})) for one in (
        None, Corruption(0.5, 0.5, seed), Corruption(1.0, 1.0, seed)))
    missing = answerer.encoder.missing_id
    assert missing not in whole.ids and 0 < (torn.ids == missing).sum() < (all_gone.ids == missing).sum() == whole.open.sum()
    assert 0 < (~torn.pixel_values.any(1)).sum() < len(torn.pixel_values) and not all_gone.pixel_values.any()
    encoder = answerer.encoder
    try:
        encoder.missing_id = None
        with pytest.raises(ModelError, match=r"its tokenizer has no <\|quad_end\|> to stand for missing words"):
            answerer.encode(Namespace(**{**vars(prompt), "corruption": Corruption(0.5, 0.5, seed)}))
    finally:
        encoder.missing_id = missing


def test_what_is_missing_changes_the_answers_scores(answerer, twins, tmp_path):
    plain, torn, again = (ask(answerer, twins, tmp_path / str(n), *words) for n, words in enumerate((
        (), ("--corrupt", "text=0.8,image=0.8"), ("--corrupt", "text=0.8,image=0.8"))))
    assert [row["scores"] for row in torn] == [row["scores"] for row in again]
    assert all(one["scores"] != two["scores"] for one, two in zip(plain, torn))


def test_an_adapter_with_a_mender_gets_its_slots(tiny, tmp_path, twins):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration

    from modeling.adapters import save_extras
    from modeling.mender import attach, settings_for

    base, ids = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32").eval(), Encoder(tiny)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    mender = attach(base, settings_for(base.config, slot_id=ids.slot_id, end_id=ids.end_id, slots=5, scale=0.5))
    torch.nn.init.normal_(mender.out.weight)
    model.save_pretrained(tmp_path)
    save_extras(model, tmp_path)

    answerer, prompt = Answerer(str(tiny), str(tmp_path)), render(read_problems(twins / "test.jsonl")[0], "both")
    ids.slots = 5
    row = ids.encode(prompt.messages, prompt.images, generate=True)
    assert answerer.encode(prompt).ids.tolist() == row.ids.tolist() and (row.ids == ids.slot_id).sum() == 5
    with torch.no_grad():
        said = model(**ids.batch([row])).logits[0, -1].log_softmax(-1)
    assert answerer.generate([prompt], 1)[0].text == ids.tokenizer.decode([said.argmax()]).strip()

    extras = json.loads((tmp_path / "extras.json").read_text())
    extras["mender"]["slot_id"] = 5
    (tmp_path / "extras.json").write_text(json.dumps(extras))
    with pytest.raises(ModelError, match=f"its slots are token 5, those of .* {ids.slot_id}"):
        Answerer(str(tiny), str(tmp_path))


# ---- curves ----------------------------------------------------------------------------------------------------------

RIGHT = {"control": {0.0: (0.9, 0.8), 0.4: (0.8, 0.6), 0.8: (0.5, 0.4)},      # recipe -> rate -> (both, vision)
         "better": {0.0: (0.9, 0.8), 0.4: (0.9, 0.75), 0.8: (0.7, 0.55)}}


def condition(folder: Path, name: str, seed, rate: float, modality="both", *, right=None, corrupt_seed=0, **info) -> Path:
    both, vision = right or RIGHT[name][rate]
    if rate:
        info["corrupt"] = {"text": rate if modality != "image" else 0.0, "image": rate if modality != "text" else 0.0,
                           "seed": corrupt_seed}
    info = {"seed": None, "model_sha256": f"{name}{seed}", **info}
    place = folder / name / str(seed) / (f"{modality}-{rate:g}" if rate else "complete")
    return write_run(place, {"both": both, "vision": vision}, n=80, seed=seed, info=info)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    for name, points in RIGHT.items():
        for seed in (0, 1):
            for rate in points:
                condition(folder, name, seed, rate)
    condition(folder, "control", 0, 0.8, "text", right=(0.6, 0.8))
    condition(folder, "control", 1, 0.8, "text", right=(0.5, 0.8))
    return folder


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "robustness.json"
    robustness.main(["--runs", f"control={folder / 'control'}", f"better={folder / 'better'}", "--out", str(out)])
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    return json.loads(out.read_text(encoding="utf-8"))


def test_numbers_by_hand(found):
    assert list(found["modalities"]) == ["both"] and found["corrupt_seed"] == 0 and (found["n"], found["n_groups"]) == (80, 40)
    control, better = found["modalities"]["both"]
    assert [recipe["name"] for recipe in found["recipes"]] == ["control", "better"] and better["n_seeds"] == 2
    for recipe in (control, better):
        for place, view in enumerate(("both", "vision")):
            points, expected = recipe["views"][view]["points"], RIGHT[recipe["name"]]
            assert [point["rate"] for point in points] == [0.0, 0.4, 0.8]
            assert [point["value"] for point in points] == pytest.approx([one[place] for one in expected.values()])
            mean = recipe["views"][view]["mean"]
            assert mean["value"] == pytest.approx(np.mean([one[place] for one in expected.values()]), rel=1e-5)
            assert mean["seeds"]["values"] == pytest.approx([mean["value"]] * 2)
            assert mean["low"] < mean["value"] < mean["high"] and mean["n_clusters"] == 40
    assert "against_first" not in control["views"]["both"]
    against = better["views"]["vision"]["against_first"]
    assert against["value"] == pytest.approx(0.1, rel=1e-5) and against["low"] < 0.1 < against["high"]


def test_the_difference_of_means_is_paired_by_item(folder, tmp_path, monkeypatch):
    """A copy of the first recipe differs from it by nothing, and surely."""
    for name, source in (("a", "control"), ("b", "control")):
        for rate in (0.0, 0.4):
            condition(tmp_path, name, 0, rate, right=RIGHT[source][rate])
    found = robustness.measure({"a": tmp_path / "a", "b": tmp_path / "b"}, ["both"])["modalities"]["both"][1]
    for one in found["views"].values():
        assert (one["against_first"]["value"], one["against_first"]["low"], one["against_first"]["high"]) == (0, 0, 0)
        assert one["mean"]["high"] - one["mean"]["low"] > 0.05


def test_each_modality_takes_its_own_runs(folder):
    found = robustness.measure({"control": folder / "control"}, ["text", "both"])
    assert [point["rate"] for point in found["modalities"]["text"][0]["views"]["both"]["points"]] == [0.0, 0.8]
    assert found["modalities"]["text"][0]["views"]["both"]["points"][1]["value"] == pytest.approx(0.55)
    assert len(found["modalities"]["both"][0]["views"]["both"]["points"]) == 3
    for corrupt, rates in ((None, (0, 0, 0)), ({"text": 0.5, "image": 0.0}, (0.5, None, None)),
                           ({"text": 0.0, "image": 0.2}, (None, 0.2, None)), ({"text": 0.5, "image": 0.5}, (None, None, 0.5)),
                           ({"text": 0.5, "image": 0.2}, (None, None, None))):
        info = {"corrupt": corrupt} if corrupt else {}
        assert tuple(robustness.rate_in(info, one) for one in ("text", "image", "both")) == rates


def test_table_and_figure(found):
    lines = robustness.block(found)
    assert lines[0] == "| missing in | view | recipe | complete | highest rate | mean over rates | against `control` |"
    assert len(lines) == 2 + 4 + 2
    row = next(line for line in lines if "`better`" in line and "| vision |" in line)
    assert re.search(r"\| 80\.0 \| 55\.0 \| 70\.0 \[.*\] \| \+10\.0 \[.*\] \|", row), row
    assert "Rates 0, 0.4, 0.8, each counting the same; 80 items in 40 groups" in lines[-1]
    drawn = robustness.figure(found)
    assert drawn == robustness.figure(found) and drawn.endswith(robustness.stamp(found))


@pytest.mark.parametrize("change, message", (
    (lambda to: condition(to, "b", 0, 0.8, right=(0.5, 0.5)),
     "'a' and 'b' were asked at other rates: 0, 0.4 against 0, 0.4, 0.8"),
    (lambda to: condition(to, "b", 1, 0.0, right=(0.5, 0.5)), "b: .*/b/1 has no answers at rate 0.4 of both, as others have"),
    (lambda to: condition(to, "c", 0, 0.0, right=(0.5, 0.5)),
     "c: .*/c has no answers with both corrupted beside those with nothing"),
    (lambda to: [condition(to, "c", 0, rate, right=(0.5, 0.5), corrupt_seed=3) for rate in (0.0, 0.4)],
     "differ in corrupt: .* against .*; evaluate both with the same"),
    (lambda to: [condition(to, "c", 0, rate, right=(0.5, 0.5), model_sha256=str(rate)) for rate in (0.0, 0.4)],
     "c: the models at rate 0.4 are not those at rate 0"),
    (lambda to: [condition(to, "c", 0, rate, right=(0.5, 0.5), mode=f"m{rate}" if rate else "generate") for rate in (0.0, 0.4)],
     "differ in mode"),
    (lambda to: condition(to, "b", "0/again", 0.4, right=(0.5, 0.5)).rename(to / "b" / "0" / "more"),
     "b: .*/b/0/both-0.4 and .*/b/0/more hold answers at the same rate, 0.4"),
))
def test_what_was_not_measured_alike_is_refused(tmp_path, change, message):
    for name in ("a", "b"):
        for rate in (0.0, 0.4):
            condition(tmp_path, name, 0, rate, right=(0.9, 0.8))
    change(tmp_path)
    recipes = {name: tmp_path / name for name in "abc" if (tmp_path / name).is_dir()}
    with pytest.raises(AnswersError, match=message):
        robustness.measure(recipes, ["both"])


# ---- asking ----------------------------------------------------------------------------------------------------------

def test_recipes_are_asked_at_every_rate_with_one_load_each(twins, tmp_path, monkeypatch, capsys):
    made = []

    def load(args):
        made.append((args.adapter, Seeing(args.adapter) if args.adapter else Fake(oracle)))
        return made[-1][1]

    monkeypatch.setattr("data_prep.answerer.Answerer.of", load)
    monkeypatch.setattr(robustness, "parents", lambda run, allow_dirty: {"dirty": False, "training_dirty": False})
    adapters = [tmp_path / name for name in ("s0", "s1")]
    for adapter in adapters:
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
    words = ["--model", "fake", "--adapter", "base=", "--adapter", f"tuned={adapters[0]},{adapters[1]}", "--tasks",
             str(twins / "test.jsonl"), "--limit", "4", "--rates", "0.8,0.4", "--modality", "image,both", "--out",
             str(tmp_path / "out")]
    robustness.main(words)
    assert [adapter for adapter, _ in made] == [None, *map(str, adapters)]
    answers = tmp_path / "out" / "answers"
    assert {path.parent.relative_to(answers).as_posix() for path in answers.rglob("run.json")} == {
        f"{recipe}/{one}" for recipe in ("base/0", "tuned/0", "tuned/1")
        for one in ("complete", "image-0.4", "image-0.8", "both-0.4", "both-0.8")}
    found = json.loads((tmp_path / "out" / "robustness.json").read_text(encoding="utf-8"))
    assert set(found["modalities"]) == {"image", "both"}
    for recipes in found["modalities"].values():
        base, tuned = (recipe["views"]["vision"] for recipe in recipes)
        assert [point["value"] for point in base["points"]] == [1, 1, 1] and base["mean"]["value"] == 1
        assert [point["value"] for point in tuned["points"]] == [1, 1, 0]
        assert tuned["against_first"]["value"] == pytest.approx(-1 / 3, rel=1e-5)
    seen = {prompt.corruption[:2] if prompt.corruption else None for _, fake in made[1:] for prompt in fake.prompts}
    assert seen == {None, (0.0, 0.4), (0.0, 0.8), (0.4, 0.4), (0.8, 0.8)}
    before = [fake.asked for _, fake in made]
    robustness.main(words)
    assert [fake.asked for _, fake in made[3:]] == [0, 0, 0] and [fake.asked for _, fake in made[:3]] == before
    assert "mean over rates" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", (
    (["--runs", "a", "--out", "o"], "--runs takes NAME=DIR, each name once, not 'a'"),
    (["--runs", "a=nowhere", "--out", "o"], "--runs a=nowhere: there is no SEED/RATE/run.json in it"),
    (["--runs", "a=b", "--out", "o", "--limit", "3"], "--runs asks no model, so it takes no --limit"),
    (["--runs", "a=b", "--out", "o", "--rates", "0.1"], "--runs asks no model, so it takes no --rates"),
    (["--model", "m", "--out", "o", "--modality", "sound"], "--modality: no such modality: sound"),
    (["--model", "m", "--out", "o.json"], "--out takes a folder when a model is asked"),
    (["--model", "m", "--out", "o", "--corrupt", "text=1"], "--corrupt is set by --rates and --modality"),
    (["--model", "m", "--out", "o", "--rates", "0,2"], "--rates takes rates from 0 to 1, such as 0,0.3,0.6, not '0,2'"),
    (["--model", "m", "--out", "o", "--adapter", "x=nowhere"], "--adapter x=nowhere: nowhere holds no adapter_config.json"),
    (["--model", "m", "--out", "o", "--adapter", "base=y"], "--adapter takes NAME=DIR"),
    (["--model", "m", "--out", "o", "--adapter", "base=", "--adapter", "base="], "the name 'base' is taken"),
))
def test_commands_that_cannot_be_run(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        robustness.main(words)
    assert error.value.code not in (0, None)
    assert message in f"{error.value.code}{capsys.readouterr().err}"
