"""Pairs from problems, with a model whose every answer is known; a run cut short; and what stock TRL makes of the files."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data_prep import pairs
from data_prep.answerer import Generated
from data_prep.pair import read_pairs
from data_prep.pair_answers import half
from data_prep.problem import Problem, ProblemError, read_problems, render, shown_options, write_problems

OPTIONS = ("ant", "bee", "cat", "dog")
TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"


def problem(folder: Path, name: str, **changes) -> Problem:
    Image.new("RGB", (28, 28), "red").save(folder / f"{name}.png")
    values = dict(id=name, group=f"group of {name}", source="s", image=f"{name}.png", facts="An ant.", question="What is it?",
                  options=OPTIONS, answer="ant", license="CC0-1.0", meta={"answer_with": "text", "kind": "lookup"})
    return Problem(**{**values, **changes}, root=folder)


class Known:
    """Prefers options in the order of `own` when it sees a picture, of `gray` when that is gray, of `none` without, and says
    the whole of these when a question is open. What is begun it ends with " no"."""

    def __init__(self, own="ant bee cat dog", none="bee ant cat dog", gray="dog ant bee cat", *, stop_after=None,
                 finish="stop") -> None:
        self.likes = {"own": own, "none": none, "gray": gray}
        self.asked, self.stop_after, self.finish, self.batches, self.begun = 0, stop_after, finish, [], []
        self.encoder = SimpleNamespace(text_ids=lambda text: tuple(text.encode()))

    def identity(self) -> dict:
        return {"model": "known"}

    def _like(self, prompt) -> str:
        levels = {picture.getpixel((0, 0)) for picture in prompt.images}
        return self.likes["gray" if (128, 128, 128) in levels else "own" if levels else "none"]

    def _count(self, prompts) -> None:
        self.batches.append(len(prompts))
        self.asked += len(prompts)
        if self.stop_after is not None and self.asked > self.stop_after:
            raise KeyboardInterrupt

    def likelihoods(self, prompts):
        self._count(prompts)
        orders = [self._like(prompt).split() for prompt in prompts]
        return [[-float(order.index(option)) for option in prompt.options] for prompt, order in zip(prompts, orders)]

    def generate(self, prompts, max_new_tokens, begun=None):
        self._count(prompts)
        self.begun.append(begun)
        said = [bytes(ids).decode() + " no" for ids in begun] if begun else [self._like(prompt) for prompt in prompts]
        return [Generated(text, 2, self.finish) for text in said]


@pytest.fixture
def made(tmp_path):
    """Makes pairs of problems: made(problems, "--kinds", ...) -> {id: pair}; a fake is `model`."""

    def make(problems, *words: str, model=None) -> dict:
        write_problems(tmp_path / "train.jsonl", problems)
        words = [*words, *(() if model is None else ("--model", "known"))]
        args = pairs.parse(["from-problems", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "pairs.jsonl"), *words])
        pairs.make(args, lambda: model)
        return {pair.id: pair for pair in read_pairs(tmp_path / "pairs.jsonl")}

    return make


# Answers


def test_a_drawn_option(made, tmp_path) -> None:
    one = problem(tmp_path, "one", license="CC-BY-NC-4.0")
    (pair,) = made([one], "--kinds", "other_answer").values()
    assert (pair.chosen, pair.images, pair.group, pair.source, pair.license) == (
        "ant", ("one.png",), "group of one", "s", "CC-BY-NC-4.0")
    assert list(pair.prompt) == render(one, "vision").messages
    assert pair.rejected in OPTIONS[1:] and pair.rejected_prior is None and pair.rejected_images == ()
    assert pair.meta == {"problem": "one", "view": "vision", "kind": "lookup", "negatives": ["other_answer"],
                         "rejected": "drawn option"}
    (both,) = made([one], "--kinds", "other_answer", "--view", "both").values()
    assert list(both.prompt) == render(one, "both").messages and both.rejected == pair.rejected


def test_draws_follow_seed_and_id_and_no_order(made, tmp_path) -> None:
    problems = [problem(tmp_path, f"p{number}") for number in range(12)]
    first = made(problems, "--kinds", "other_answer")
    data = (tmp_path / "pairs.jsonl").read_bytes()
    assert {pair.rejected for pair in first.values()} == set(OPTIONS[1:])
    again = made(problems[::-1], "--kinds", "other_answer")
    assert first == again and list(again) == [one.id for one in problems[::-1]]
    made(problems, "--kinds", "other_answer")
    assert (tmp_path / "pairs.jsonl").read_bytes() == data
    other = made(problems, "--kinds", "other_answer", "--seed", "1")
    assert {name for name in first if first[name].rejected != other[name].rejected}


def test_letters_are_those_shown(made, tmp_path) -> None:
    problems = [problem(tmp_path, f"p{number}", meta={}) for number in range(6)]
    found = made(problems, "--kinds", "other_answer,language_prior", model=Known())
    for one in problems:
        letters = dict(zip("ABCD", shown_options(one)))
        pair = found[one.id]
        assert letters[pair.chosen] == "ant" and letters[pair.rejected] in OPTIONS[1:] and letters[pair.rejected_prior] == "bee"
    assert len({pair.chosen for pair in found.values()}) > 1


@pytest.mark.parametrize("own, rejected, how", [("ant cat bee dog", "cat", "most likely wrong option"),
                                                ("dog ant cat bee", "dog", "most likely option")])
def test_the_models_other_answer(made, tmp_path, own, rejected, how) -> None:
    (pair,) = made([problem(tmp_path, "one")], "--kinds", "other_answer", "--other-answer", "model", model=Known(own)).values()
    assert (pair.rejected, pair.meta["rejected"]) == (rejected, how)


@pytest.mark.parametrize("prior, said", [("blind", "bee"), ("gray", "dog")])
def test_priors_come_from_what_is_shown(made, tmp_path, prior, said) -> None:
    (pair,) = made([problem(tmp_path, "one")], "--kinds", "language_prior", "--prior", prior, model=Known()).values()
    assert (pair.rejected, pair.rejected_prior, pair.meta["rejected_prior"]) == (None, said, prior)


def test_a_right_prior_is_no_negative(made, tmp_path, capsys) -> None:
    model = Known(none="ant dog bee cat")
    with pytest.raises(ProblemError, match="pairs.jsonl: no pair is left, so it is not written"):
        made([problem(tmp_path, "one")], "--kinds", "language_prior", model=model)
    out = capsys.readouterr().out
    assert "1 of 1 problems keep no negative and are left out" in out and not (tmp_path / "pairs.jsonl").exists()
    (pair,) = made([problem(tmp_path, "one")], "--kinds", "language_prior,other_answer", model=model).values()
    assert pair.rejected_prior is None and pair.meta["negatives"] == ["other_answer"]
    counts = json.loads((tmp_path / "pairs.json").read_text())["negatives"]
    assert counts == {"rejected": {"made": 1, "kept": 1}, "rejected_prior": {"made": 1, "kept": 0, "equals the answer": 1}}
    (pair,) = made([problem(tmp_path, "one")], "--kinds", "language_prior", "--prior-wrong", model=model).values()
    assert pair.rejected_prior == "dog"


def test_half_of_the_answer_continued(made, tmp_path) -> None:
    """"a red circle" has 12 bytes, which are the fake's tokens; without a picture " no" follows the first six."""
    one = problem(tmp_path, "one", options=None, answer="a red circle")
    (pair,) = made([one], "--kinds", "language_prior", "--prior", "continued", model=(model := Known())).values()
    assert pair.rejected_prior == "a red  no" and model.begun == [[tuple(b"a red ")]]
    assert [half(range(count)) for count in (1, 2, 3, 4, 5)] == [(0,), (0,), (0,), (0, 1), (0, 1)]
    closed = made([problem(tmp_path, "two")], "--kinds", "language_prior", "--prior", "continued", model=Known())
    assert closed["two"].rejected_prior == "a no"


def test_open_answers_are_generated_and_filtered(made, tmp_path, capsys) -> None:
    open_, closed = problem(tmp_path, "open", options=None, answer="an ant"), problem(tmp_path, "closed")
    words = ("--kinds", "other_answer,language_prior", "--other-answer", "model")
    model = Known("a bee", "Sorry, I cannot see it")
    (pair,) = made([open_], *words, model=model).values()
    assert (pair.rejected, pair.rejected_prior, pair.meta["rejected"]) == ("a bee", None, "generated")
    (tmp_path / "pairs.answers.jsonl").unlink()
    (pair,) = made([open_], *words, model=Known("It is an ant.", "a dog")).values()
    assert (pair.rejected, pair.rejected_prior) == (None, "a dog")
    (tmp_path / "pairs.answers.jsonl").unlink()
    with pytest.raises(ProblemError, match="no pair is left"):
        made([open_], *words, model=Known("a bee", "a dog", finish="length"))
    made([open_, closed], "--kinds", "other_answer")
    assert "1 of 2 problems are open: there is no option to draw from" in capsys.readouterr().out


# Pictures


class Fake(SimpleNamespace):
    picture = Image.new("RGB", (28, 28), "blue")


@pytest.fixture
def worlds(monkeypatch):
    """Stands in for data_prep.twins.counterfactual: what is next is in `found`, what was asked in `asked`."""
    fake = SimpleNamespace(found=Fake(name="shapes-1.png", facts="A bee.", answer="bee", changed="ant -> bee"), asked=[])

    def counterfactual(problem, *, seed):
        fake.asked.append((problem.id, seed))
        return fake.found

    monkeypatch.setitem(sys.modules, "data_prep.twins.counterfactual", SimpleNamespace(counterfactual=counterfactual))
    return fake


def twin(folder: Path, name: str, **changes) -> Problem:
    (folder / "images").mkdir(exist_ok=True)
    return problem(folder, f"images/{name}", **{"id": name, "source": "shapes", "image": f"images/{name}.png", **changes})


def test_another_picture(made, tmp_path, worlds) -> None:
    (pair,) = made([twin(tmp_path, "one")], "--kinds", "other_image", "--seed", "3").values()
    assert (pair.rejected, pair.rejected_images, pair.rejected_images_answer) == (
        None, ("images/counterfactuals/shapes-1.png",), None)
    assert pair.load("rejected_images")[0].getpixel((0, 0)) == (0, 0, 255) and worlds.asked == [("one", 3)]
    assert pair.meta["changed"] == "ant -> bee" and pair.meta["negatives"] == ["other_image"]


def test_a_symmetric_pair(made, tmp_path, worlds) -> None:
    one = twin(tmp_path, "one", meta={})
    (pair,) = made([one], "--kinds", "symmetric").values()
    bee = "ABCD"[shown_options(one).index("bee")]
    assert pair.rejected_images_answer == pair.rejected == bee != pair.chosen and pair.meta["rejected"] == "counterfactual"
    model = Known("ant dog cat bee")
    (pair,) = made([one], "--kinds", "symmetric,other_answer", "--other-answer", "model", model=model).values()
    assert pair.rejected_images_answer == bee and pair.rejected == "ABCD"[shown_options(one).index("dog")]
    assert pair.meta["negatives"] == ["other_answer", "symmetric"]


def test_pictures_are_written_once_and_mended(made, tmp_path, worlds) -> None:
    made([twin(tmp_path, "one")], "--kinds", "other_image")
    file = tmp_path / "images" / "counterfactuals" / "shapes-1.png"
    data, written = file.read_bytes(), file.stat().st_mtime_ns
    made([twin(tmp_path, "one")], "--kinds", "other_image")
    assert file.stat().st_mtime_ns == written
    file.write_bytes(b"half")
    made([twin(tmp_path, "one")], "--kinds", "other_image")
    assert file.read_bytes() == data and [path.name for path in file.parent.iterdir()] == ["shapes-1.png"]


def test_problems_without_another_picture(made, tmp_path, worlds, capsys) -> None:
    """Not twins by source, or by lack of facts; and a twin for which there is none."""
    others = [problem(tmp_path, "other"), twin(tmp_path, "bare", facts=None)]
    found = made([*others, twin(tmp_path, "one")], "--kinds", "other_image,other_answer")
    assert [bool(pair.rejected_images) for pair in found.values()] == [False, False, True] and worlds.asked == [("one", 0)]
    assert "2 of 3 problems are no twins: their other pictures are left to training" in capsys.readouterr().out
    worlds.found = None
    found = made([twin(tmp_path, "one")], "--kinds", "symmetric,other_answer")
    assert found["one"].rejected_images == () and found["one"].rejected_images_answer is None
    out = capsys.readouterr().out
    assert "1 of 1 problems have no counterfactual" in out and "no twins" not in out
    with pytest.raises(ProblemError, match="no pair is left"):
        made([*others, twin(tmp_path, "one")], "--kinds", "symmetric")


@pytest.mark.parametrize("answer", ["ant", "fly"])
def test_a_counterfactual_that_is_none(made, tmp_path, worlds, answer) -> None:
    worlds.found = Fake(name="x.png", facts="", answer=answer, changed="")
    with pytest.raises(ProblemError, match=f"one: the counterfactual's answer '{answer}' is no other option of it"):
        made([twin(tmp_path, "one")], "--kinds", "other_image")


def test_real_counterfactuals(tmp_path) -> None:
    module = pytest.importorskip("data_prep.twins.counterfactual")
    from data_prep.twins.__main__ import write as write_twins

    write_twins(tmp_path, {"train": 8}, seed=1)
    pairs.main(["from-problems", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "pairs.jsonl"), "--kinds", "symmetric"])
    found = {pair.id: pair for pair in read_pairs(tmp_path / "pairs.jsonl")}
    problems = read_problems(tmp_path / "train.jsonl")
    assert len(found) >= 10
    for one in problems:
        other = module.counterfactual(one, seed=0)
        assert (other is None) == (one.id not in found)
        if other is not None:
            pair = found[one.id]
            assert pair.rejected_images_answer == pair.rejected == other.answer and pair.meta["changed"] == other.changed
            (before,), (after,) = pair.load(), pair.load("rejected_images")
            assert before.size == after.size and before.tobytes() != after.tobytes() == other.picture.tobytes()


def test_pictures_stand_in_the_order_of_the_prompt(made, tmp_path) -> None:
    """Markers put the second picture first; equal pictures are as good as each other."""
    for name, colour in (("a", "blue"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (28, 28), colour).save(tmp_path / f"{name}.png")
    names = ("a.png", "b.png", "c.png")
    one = problem(tmp_path, "one", image=names, question="Is <image 2> like <image 1> <image 3>?")
    (pair,) = made([one], "--kinds", "other_answer").values()
    assert pair.images[0] == "b.png" and sorted(pair.images) == sorted(names)
    shown, loaded = ([picture.getpixel((0, 0)) for picture in side] for side in (render(one, "vision").images, pair.load()))
    assert loaded == shown == [(0, 128, 0), (0, 0, 255), (0, 0, 255)]
    assert [part["type"] for part in pair.prompt[0]["content"]] == ["text", "image", "text", "image", "text", "image", "text"]


# Runs


def test_cut_short_and_continued(made, tmp_path) -> None:
    problems = [problem(tmp_path, f"p{number}", **({"options": None} if number % 2 else {})) for number in range(6)]
    words = ("--kinds", "other_answer,language_prior", "--other-answer", "model", "--batch-size", "2")
    whole = made(problems, *words, model=(model := Known("cat bee ant dog")))
    data, answers = (tmp_path / "pairs.jsonl").read_bytes(), tmp_path / "pairs.answers.jsonl"
    assert model.asked == 12 and max(model.batches) == 2 and len(answers.read_text().splitlines()) == 12
    answers.unlink()
    with pytest.raises(KeyboardInterrupt):
        made(problems, *words, model=Known("cat bee ant dog", stop_after=7))
    assert len(answers.read_text().splitlines()) == 6
    with answers.open("a") as file:
        file.write('{"id": "p5", "half')
    assert made(problems, *words, model=(again := Known("cat bee ant dog"))) == whole and again.asked == 6
    assert (tmp_path / "pairs.jsonl").read_bytes() == data
    made(problems, *words, "--seed", "5", model=(none := Known("cat bee ant dog")))
    assert none.asked == 0


def test_only_what_changed_is_asked_again(made, tmp_path) -> None:
    one, two = problem(tmp_path, "one"), problem(tmp_path, "two", options=None)
    words = ("--kinds", "language_prior")

    def asked(problems, *more: str) -> int:
        made(problems, *words, *more, model=(model := Known()))
        return model.asked

    assert asked([one, two]) == 2 and asked([one, two]) == 0
    assert asked([replace(one, question="What else?"), two]) == 1 and asked([one, two]) == 0
    assert asked([one, two], "--max-new-tokens", "9") == 1      # scores have no budget
    assert asked([one, two], "--prior", "gray") == 2 and asked([one], "--limit", "1") == 0
    assert asked([replace(one, facts="A bee.", license="MIT")]) == 0
    Image.new("RGB", (28, 28), "pink").save(tmp_path / "one.png")
    assert asked([one, two]) == 1


def test_bad_answers_are_named(made, tmp_path) -> None:
    for row, message in (("{}", "key: missing"), ('{"key": "x"}', "scores: neither they nor text"), ("[", "row: is not JSON")):
        (tmp_path / "pairs.answers.jsonl").write_text(row + "\n")
        with pytest.raises(ProblemError, match=rf"pairs.answers.jsonl:1: {message}"):
            made([problem(tmp_path, "one")], "--kinds", "language_prior", model=Known())


def test_what_is_recorded(made, tmp_path) -> None:
    made([problem(tmp_path, "one"), problem(tmp_path, "bare", image=None)], "--kinds", "language_prior", model=Known())
    info = json.loads((tmp_path / "pairs.json").read_text())
    assert (info["kinds"], info["view"], info["prior"], info["n"]) == (["language_prior"], "vision", "blind", 1)
    assert info["model"] == "known" and {"commit", "packages", "data_sha256"} <= set(info)


@pytest.mark.parametrize("words, message", [
    (["--kinds", "language_prior"], "--kinds language_prior: asks a model; give --model"),
    (["--kinds", "other_answer", "--other-answer", "model"], "--kinds other_answer with --other-answer model: asks a model"),
    (["--kinds", "other_answer", "--model", "tiny"], "--model tiny: is asked nothing by --kinds other_answer"),
    (["--kinds", "symmetric,other_image", "--view", "both"], "--kinds other_image,symmetric: in view both the facts stand"),
    (["--kinds", "other_answer", "--prior", "gray"], "--prior gray: goes with --kinds language_prior"),
    (["--kinds", "symmetric", "--other-answer", "model"], "--other-answer model: goes with --kinds other_answer"),
    (["--kinds", "language_prior", "--prior", "continued", "--prior-wrong"], "--prior-wrong: chooses among options"),
    (["--kinds", "language_prior", "--model", "nowhere"], "--model nowhere: "),
    (["--kinds", "other_answer", "--out", "elsewhere/pairs.jsonl"], "--out elsewhere/pairs.jsonl: must lie in"),
])
def test_refused_in_one_sentence(tmp_path, words, message) -> None:
    write_problems(tmp_path / "train.jsonl", [problem(tmp_path, "one")])
    out = ["--out", str(tmp_path / "pairs.jsonl")] if "--out" not in words else []
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        pairs.main(["from-problems", str(tmp_path / "train.jsonl"), *out, *words])
    assert not (tmp_path / "pairs.jsonl").exists()


def test_wrong_words_are_refused(tmp_path, capsys) -> None:
    for words, message in ((["from-problems", "x", "--out", "y", "--kinds", "other"], "'other': not among other_answer, lang"),
                           (["export", "x", "--out", "y.json"], "--out y.json: must be a .parquet file")):
        with pytest.raises(SystemExit, match="2"):
            pairs.parse(words)
        assert message in capsys.readouterr().err


def test_check(made, tmp_path, worlds, capsys) -> None:
    made([twin(tmp_path, "one", license="CC-BY-NC-4.0"), twin(tmp_path, "two", license="OPEN-LICENCE-1"),
          problem(tmp_path, "three", options=None, answer="a big ant")], "--kinds", "symmetric,language_prior", model=Known())
    capsys.readouterr()
    pairs.main(["check", str(tmp_path / "pairs.jsonl")])
    out = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for line in out.splitlines()
            if line.startswith("│") and (cells := [cell.strip() for cell in line.strip("│").split("│")])}
    assert rows["pairs"] == ["1", "2"] and rows["groups"] == ["1", "2"] and rows["pictures"] == ["1", "3"]
    assert rows["rejected"] == rows["rejected_images"] == rows["rejected_images_answer"] == ["0", "2"]
    assert rows["rejected_prior"] == ["1", "2"]
    assert rows["words of chosen"] == ["3 to 3, mean 3.0", "1 to 1, mean 1.0"] and rows["words of rejected"][0] == "-"
    assert rows["licences"] == ["CC0-1.0 (1)", "CC-BY-NC-4.0 (1), OPEN-LICENCE-1 (1)"]
    assert out.splitlines()[-1] == "CC-BY-NC-4.0: 1 pairs, non-commercial use only"
    (tmp_path / "images" / "counterfactuals" / "shapes-1.png").unlink()
    with pytest.raises(SystemExit, match=r"error: .*pairs.jsonl:1: rejected_images\[0\]: .* does not exist"):
        pairs.main(["check", str(tmp_path / "pairs.jsonl")])


# Models


def test_a_real_model_continues_what_it_would_have_said(tiny) -> None:
    """Greedy, so an answer that is begun with its own first tokens ends the same; in one batch with others."""
    from data_prep.answerer import Answerer

    answerer = Answerer(str(tiny))
    prompt = render(Problem("x", "x", "s", None, "A red. B blue.", "Which colour is at A?", None, "red", "MIT", {}), "text")
    (whole,) = answerer.generate([prompt], 12)
    encoded = answerer.encode(prompt)
    batch = answerer.encoder.batch([encoded], side="left")
    ids = answerer.model.generate(**batch, max_new_tokens=12, do_sample=False)[0, len(encoded):].tolist()
    none, three, again = answerer.generate([prompt] * 3, 9, [(), ids[:3], ids[:3]])
    assert whole.tokens == 12 and whole.finish == "length"
    assert three == again and three.text == whole.text and three.tokens == 9 and whole.text.startswith(none.text)
    other = answerer.generate([prompt], 9, [answerer.encoder.text_ids("blue circle")])[0]
    assert other.text.startswith("blue circle") and other.text != whole.text


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Pairs of four twins, with a prior of the embedded model."""
    from data_prep.twins.__main__ import write as write_twins

    folder = tmp_path_factory.mktemp("pairs")
    write_twins(folder, {"train": 2}, seed=0)
    pairs.main(["from-problems", str(folder / "train.jsonl"), "--out", str(folder / "pairs.jsonl"), "--limit", "4",
                "--kinds", "other_answer,language_prior", "--prior-wrong", "--model", str(TINY)])
    return folder


def stock_processor():
    """The embedded model's processor, but for its video processor, which needs torchvision."""
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin, Qwen2_5_VLProcessor

    class WithoutVideo(Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return WithoutVideo(AutoImageProcessor.from_pretrained(TINY, backend="pil"), tokenizer, tokenizer.chat_template)


def test_the_embedded_model(written) -> None:
    for pair in read_pairs(written / "pairs.jsonl"):
        assert pair.rejected != pair.chosen != pair.rejected_prior and pair.rejected_prior is not None


def test_stock_trl_takes_the_parquet(written, tmp_path, capsys) -> None:
    import datasets
    from transformers import AutoModelForImageTextToText
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in (written / "pairs.jsonl").read_text().splitlines()]
    bare = {name: value for name, value in rows[2].items() if name != "rejected"}
    (written / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[1], bare)))
    pairs.main(["export", str(written / "mixed.jsonl"), "--out", str(tmp_path / "x.parquet")])
    assert "x.parquet: 2 pairs; 1 without a rejected answer are left out" in capsys.readouterr().out
    file, cache = str(tmp_path / "x.parquet"), str(tmp_path / "cache")
    data = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=cache)
    assert data.column_names == ["images", "prompt", "chosen", "rejected", "id", "source", "license"]
    assert isinstance(data.features["images"].feature, datasets.Image)
    assert data[0]["images"][0].convert("RGB").tobytes() == read_pairs(written / "mixed.jsonl")[0].load()[0].tobytes()
    config = DPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, max_length=None,
                       use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
                       logging_steps=1, disable_tqdm=True)
    trainer = DPOTrainer(AutoModelForImageTextToText.from_pretrained(TINY), args=config, train_dataset=data,
                         processing_class=stock_processor())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)       # policy = reference: ln 2


def test_stock_trl_takes_the_jsonl(written, tmp_path) -> None:
    import datasets
    from data_prep.encode import Encoder
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    file = str(written / "pairs.jsonl")
    data = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    data = data.map(lambda row: {"images": [str(written / name) for name in row["images"]]})
    data = data.cast_column("images", datasets.Sequence(datasets.Image()))
    processor = stock_processor()
    batch = DataCollatorForVisionPreference(processor)([data[0], data[1]])
    encoder, (first, second, *_) = Encoder(TINY), read_pairs(file)
    sides = ((first, first.chosen), (second, second.chosen), (first, first.rejected), (second, second.rejected))
    tensors = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    for (pair, answer), ids, mask, asked in zip(sides, *tensors):
        row = encoder.encode(pair.messages(answer), pair.load())
        assert ids[mask.bool()].tolist() == row.ids.tolist()        # the template puts a line break after the turn
        said = ids[asked.bool()].tolist()
        assert said[:row.trained.sum()] == row.ids[row.trained].tolist() and len(said) == row.trained.sum() + 1
    assert len(batch["image_grid_thw"]) == 4


def test_export_keeps_pixels(tmp_path, made) -> None:
    """Rotated, transparent and 16-bit pictures as Pair.load shows them; others byte for byte."""
    import io

    import numpy as np
    import pyarrow.parquet

    left = Image.fromarray(np.dstack([np.arange(28 * 56, dtype=np.uint8).reshape(28, 56)] * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((28, 28), 30000, dtype=np.uint16))
    pictures = {"plain.png": (left, {}), "turned.jpg": (left, {"exif": exif}), "clear.png": (clear, {}), "deep.png": (deep, {}),
                "gray.png": (left.convert("L"), {})}
    problems = [problem(tmp_path, name, image=name, id=name) for name in pictures]
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
    found = made(problems, "--kinds", "other_answer")
    pairs.main(["export", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "x.parquet")])
    for row in pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist():
        (entry,), name = row["images"], row["id"]
        seen = Image.open(io.BytesIO(entry["bytes"]))
        assert seen.getexif().get(0x0112) is None
        assert seen.convert("RGB").tobytes() == found[name].load()[0].tobytes(), name
        assert (entry["bytes"] == (tmp_path / name).read_bytes()) == (name in ("plain.png", "gray.png"))
    with pytest.raises(SystemExit, match="none of 1 pairs has a rejected answer"):
        made(problems[:1], "--kinds", "language_prior", model=Known())
        pairs.main(["export", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "y.parquet")])
    assert not (tmp_path / "y.parquet").exists()
