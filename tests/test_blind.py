"""What a picture is worth, against a model whose every probability is known; the filter; and a run that is cut short."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_prep import blind
from data_prep.blind import needs_picture, orders_of, read_scores, score
from data_prep.problem import Problem, ProblemError, partners, read_problems, render, shown_options, write_problems

OPTIONS = ("ant", "bee", "cat", "dog")


def problem(folder: Path, name: str, colour: str | None = "red", **changes) -> Problem:
    if colour is not None:
        Image.new("RGB", (56, 56), colour).save(folder / f"{name}.png")
    image = None if colour is None else f"{name}.png"
    values = dict(id=name, group=name, source="s", image=image, facts="An ant.", question="What is it?", options=OPTIONS,
                  answer="ant", license="CC0-1.0", meta={})
    return Problem(**{**values, **changes}, root=folder)


class Known:
    """Gives the right option 0.7 with a red picture, 0.1 with another, 0.4 without; and 0.9 more log-odds to the letter A."""

    RIGHT = {"red": 0.7, "other": 0.1, "none": 0.4}

    def __init__(self, *, letter_bias: float = 0.0, stop_after: int | None = None) -> None:
        self.bias, self.stop_after, self.asked, self.batches = letter_bias, stop_after, 0, []

    def identity(self) -> dict:
        return {"model": "known", "letter_bias": self.bias}

    def _right(self, prompt) -> float:
        if not prompt.images:
            return self.RIGHT["none"]
        return self.RIGHT["red" if prompt.images[0].getpixel((0, 0)) == (255, 0, 0) else "other"]

    def likelihoods(self, prompts):
        self.batches.append(len(prompts))
        self.asked += len(prompts)
        if self.stop_after is not None and self.asked > self.stop_after:
            raise KeyboardInterrupt
        found = []
        for prompt in prompts:
            right = self._right(prompt)
            rest = (1 - right) / (len(prompt.choices) - 1)
            # -3: only differences between the options count
            found.append([math.log(right if choice == prompt.answer else rest) - 3 + self.bias * (place == 0)
                          for place, choice in enumerate(prompt.choices)])
        return found

    def answer_log_probs(self, prompts):
        return [math.log(self._right(prompt)) for prompt in prompts]


def rows_of(problems, model=None, **options) -> list[dict]:
    return list(score(model or Known(), list(zip(problems, partners(problems))), **{"orders": 3, "batch_size": 32, **options}))


def test_probabilities_and_gains_by_hand(tmp_path) -> None:
    red, _ = rows_of([problem(tmp_path, "x"), problem(tmp_path, "y", "blue")])
    assert {key: red[key] for key in ("id", "n_orders", "p_vision", "p_blind", "p_shuffled", "gain_blind", "gain_shuffled")} == {
        "id": "x", "n_orders": 3, "p_vision": 0.7, "p_blind": 0.4, "p_shuffled": 0.1, "gain_blind": 0.3, "gain_shuffled": 0.6}
    # 0.4 is still the largest of 0.4, 0.2, 0.2, 0.2; 0.1 is the smallest
    assert [red[f"correct_{view}"] for view in ("vision", "blind", "shuffled")] == [1, 1, 0]
    assert (red["correct_gain_blind"], red["correct_gain_shuffled"]) == (0, 1)


def test_orders_put_every_option_everywhere(tmp_path) -> None:
    one = problem(tmp_path, "x")
    orders = [shown_options(form) for form in orders_of(one, 9)]
    assert orders[0] == shown_options(one) and len(orders) == 4
    for place in range(4):
        assert {order[place] for order in orders} == set(OPTIONS)
    assert [shown_options(form)[0] for form in orders_of(replace(one, options=tuple("abcdefghij"), answer="a"), 3)] == [
        shown_options(replace(one, options=tuple("abcdefghij"), answer="a"))[start] for start in (0, 3, 6)]
    assert len(orders_of(replace(one, options=("ant", "bee")), 3)) == 2
    assert len(orders_of(replace(one, meta={"keep_order": True}), 3)) == len(orders_of(replace(one, options=None), 3)) == 1
    assert all(render(form, "blind").options[ord(render(form, "blind").answer) - 65] == "ant" for form in orders_of(one, 4))


def test_a_liking_for_a_letter_is_averaged_out(tmp_path) -> None:
    """Log-odds b more for A: once in four orders the right option stands there, three times it is a wrong one."""
    odds = math.exp(0.9)
    expected = (0.4 * odds / (0.4 * odds + 0.6) + 3 * 0.4 / (0.4 + 0.4 + 0.2 * odds)) / 4
    row, _ = rows_of([problem(tmp_path, "x"), problem(tmp_path, "y", "blue")], Known(letter_bias=0.9), orders=4)
    assert row["n_orders"] == 4 and row["p_blind"] == pytest.approx(expected, abs=1e-6)
    assert row["correct_blind"] == 0.25     # elsewhere 0.2 e^0.9 = 0.49 beats 0.4


def test_what_cannot_be_known_is_null(tmp_path) -> None:
    bare, alone = problem(tmp_path, "bare", None), problem(tmp_path, "alone", source="other")
    no_picture, no_partner = rows_of([bare, alone])
    assert no_picture["p_vision"] is no_picture["p_shuffled"] is no_picture["gain_blind"] is None and no_picture["p_blind"] == 0.4
    assert no_partner["p_shuffled"] is no_partner["gain_shuffled"] is None and no_partner["gain_blind"] == 0.3


def test_open_problems_are_scored_by_their_answer(tmp_path) -> None:
    row, _ = rows_of([problem(tmp_path, "x", options=None), problem(tmp_path, "y", "blue")])
    assert (row["n_orders"], row["p_vision"], row["p_blind"], row["gain_shuffled"]) == (1, 0.7, 0.4, 0.6)
    assert row["correct_vision"] is row["correct_gain_blind"] is None


def test_batches_are_no_larger_than_asked_and_change_nothing(tmp_path) -> None:
    problems = [problem(tmp_path, f"p{number}", "red" if number % 2 else "blue") for number in range(7)]
    model = Known()
    assert rows_of(problems, model, batch_size=5) == rows_of(problems)
    assert max(model.batches) == 5 and sum(model.batches) == 7 * 3 * 3


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """A file of four problems, a function that scores it, and the fake that answers."""
    problems = [problem(tmp_path, "a"), problem(tmp_path, "b", "blue"), problem(tmp_path, "c"), problem(tmp_path, "d", None)]
    write_problems(tmp_path / "train.jsonl", problems)

    def run(model=None, *words: str) -> list[dict]:
        model = model or Known()
        args = blind.parse([str(tmp_path / "train.jsonl"), "--model", "known", "--batch-size", "1", *words])
        blind.run(args, lambda: model)
        return list(read_scores(tmp_path / "train.blind.jsonl").values())

    return run


def test_filter(scored, tmp_path) -> None:
    rows = {row["id"]: row for row in scored()}
    problems = read_problems(tmp_path / "train.jsonl")
    scores = tmp_path / "train.blind.jsonl"
    assert (rows["a"]["gain_blind"], rows["b"]["gain_blind"], rows["b"]["gain_shuffled"]) == (0.3, -0.3, -0.6)

    def kept(**options) -> str:
        return "".join(one.id for one in needs_picture(problems, scores, **options))

    assert kept() == kept(min_gain=0.3) == "a" and kept(min_gain=0.300001) == ""     # c borrows the red picture of a
    assert kept(against="blind") == "ac" and kept(against="shuffled", min_gain=0.6) == "a"
    assert kept(against="blind", min_gain=-1) == "abc"          # d has no picture
    assert kept(against="blind", min_gain=-1, max_blind=0.39) == "" and kept(against="blind", max_blind=0.4) == "ac"
    with pytest.raises(ProblemError, match="against must be one of blind, shuffled, both, not 'white'"):
        needs_picture(problems, scores, against="white")


def test_stale_scores_are_refused(scored, tmp_path) -> None:
    scored()
    problems, scores = read_problems(tmp_path / "train.jsonl"), tmp_path / "train.blind.jsonl"
    needs_picture([replace(problems[0], facts="A bee.", license="MIT", meta={"rationale": "Look."})], scores)     # not shown
    for change in ({"question": "What?"}, {"answer": "bee"}, {"options": OPTIONS[:3]}, {"meta": {"answer_with": "text"}},
                   {"image": "b.png"}):
        with pytest.raises(ProblemError, match=r"train.blind.jsonl: problem 'a' has changed"):
            needs_picture([replace(problems[0], **change)], scores)
    with pytest.raises(ProblemError, match=r"train.blind.jsonl: no row for problem 'z'"):
        needs_picture([problems[0], replace(problems[1], id="z")], scores)
    Image.new("RGB", (56, 56), "pink").save(tmp_path / "a.png")
    with pytest.raises(ProblemError, match="'a' has changed"):
        needs_picture(problems, scores)


def test_cut_short_and_continued(scored, tmp_path, capsys) -> None:
    whole = scored()
    (tmp_path / "train.blind.jsonl").rename(tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        scored(Known(stop_after=14))        # 9 prompts a problem
    scores = tmp_path / "train.blind.jsonl"
    assert [json.loads(line)["id"] for line in scores.read_text().splitlines()] == ["a"]
    with scores.open("a") as file:
        file.write('{"id": "b", "half')
    again = Known()
    assert scored(again) == whole and scores.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert again.asked == 9 + 9 + 3
    assert scored(none := Known()) == whole and none.asked == 0
    info = json.loads((tmp_path / "train.blind.json").read_text())
    assert info["finished"] is True and info["n"] == 4 and info["orders"] == 3 and info["model"] == "known" and "commit" in info
    assert "1 of 4 problems have no picture" in capsys.readouterr().err


def test_changed_problems_are_scored_again_and_other_settings_refused(scored, tmp_path, capsys) -> None:
    scored()
    problems = read_problems(tmp_path / "train.jsonl")
    write_problems(tmp_path / "train.jsonl", [*problems[:3], replace(problems[3], question="What else?")])
    rows = scored(model := Known())
    assert [row["id"] for row in rows] == list("abcd") and model.asked == 3
    assert "1 rows are of problems that have changed or gone" in capsys.readouterr().err
    with pytest.raises(ProblemError, match=r"holds scores of other settings \(letter_bias\)"):
        scored(Known(letter_bias=0.9))
    with pytest.raises(ProblemError, match=r"other settings \(orders\)"):
        scored(None, "--orders", "2")
    (tmp_path / "train.blind.json").unlink()
    with pytest.raises(ProblemError, match="has no train.blind.json beside it"):
        scored()


def test_scores_in_a_new_folder_and_unreadable_settings(scored, tmp_path) -> None:
    out = tmp_path / "new" / "runs" / "scores.jsonl"
    args = blind.parse([str(tmp_path / "train.jsonl"), "--model", "known", "--out", str(out)])
    blind.run(args, Known)
    assert len(read_scores(out)) == 4
    out.with_suffix(".json").write_text('{"half')
    with pytest.raises(ProblemError, match="scores.json: row: is not JSON"):
        blind.run(args, Known)


def test_scores_of_another_file_are_not_thrown_away(scored, tmp_path) -> None:
    scored()
    files = {name: (tmp_path / f"train.blind.{name}").read_bytes() for name in ("json", "jsonl")}
    problems = read_problems(tmp_path / "train.jsonl")
    write_problems(tmp_path / "train.jsonl", [replace(one, id=f"{one.id}2") for one in problems])
    with pytest.raises(ProblemError, match="holds scores of 4 other problems; give another --out or delete it"):
        scored()
    assert all((tmp_path / f"train.blind.{name}").read_bytes() == data for name, data in files.items())


def test_limit_then_all(scored, tmp_path) -> None:
    scored(None, "--limit", "2")
    assert json.loads((tmp_path / "train.blind.json").read_text())["finished"] is False
    assert len(scored(model := Known())) == 4 and model.asked == 9 + 3


def test_kept_file(scored, tmp_path) -> None:
    scored(None, "--keep", "0.1", "--against", "blind", "--out-kept", str(tmp_path / "kept.jsonl"))
    assert [one.id for one in read_problems(tmp_path / "kept.jsonl")] == ["a", "c"]
    for words, message in ((("--keep", "0.1"), "belong together"),
                           (("--keep", "0.1", "--out-kept", "/elsewhere/kept.jsonl"), "must lie in"),
                           (("--keep", "0.9", "--out-kept", str(tmp_path / "none.jsonl")), "no problem is left")):
        with pytest.raises(ProblemError, match=message):
            scored(None, *words)
    assert not (tmp_path / "none.jsonl").exists()


def test_standard_error_of_groups() -> None:
    """Values 0, 1 in one group and 1, 2 in another: mean 1, group sums of deviations -1 and 1, SE^2 = 2 / 1 / 16 * 2."""
    rows = [{"group": group, "x": value} for group, value in (("g", 0.0), ("g", 1.0), ("h", 1.0), ("h", 2.0), ("h", None))]
    assert blind._mean(rows, "x") == (1.0, 0.5)


def test_bad_scores_are_named(tmp_path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ProblemError, match=r"scores.jsonl:1: content: missing field"):
        read_scores(path)
    with pytest.raises(ProblemError, match="cannot be read"):
        read_scores(tmp_path / "gone.jsonl")


def test_a_real_model(tiny, twins, tmp_path, capsys) -> None:
    """A random model of the real class: probabilities equal those of each prompt asked alone, also of an open answer."""
    import torch

    from data_prep.answerer import Answerer

    problems = read_problems(twins / "test.jsonl")[:3]
    problems.append(replace(problems[0], id="open", options=None, answer="a red circle"))
    answerer = Answerer(str(tiny))
    rows = rows_of(problems, answerer, orders=2)
    for one, row in zip(problems[:3], rows):
        alone = []
        for form in orders_of(one, 2):
            prompt = render(form, "vision")
            scores = torch.tensor(answerer.likelihoods([prompt])[0]).softmax(0)
            alone.append(scores[prompt.choices.index(prompt.answer)].item())
        assert row["p_vision"] == pytest.approx(sum(alone) / 2, abs=1e-4)
    prompt = render(problems[3], "vision")
    row = answerer.encoder.encode([*prompt.messages, {"role": "assistant", "content": prompt.answer}], prompt.images)
    with torch.inference_mode():
        logps = answerer.model(**answerer.encoder.batch([row])).logits[0].log_softmax(-1)
    said = [logps[i - 1, row.ids[i]].item() for i in range(1, len(row)) if row.trained[i]]
    assert rows[3]["p_vision"] == pytest.approx(math.exp(sum(said) / len(said)), abs=1e-5)
    blind.main([str(twins / "test.jsonl"), "--model", str(tiny), "--limit", "2", "--out", str(tmp_path / "scores.jsonl")])
    assert "gain" in capsys.readouterr().out and len(read_scores(tmp_path / "scores.jsonl")) == 2
    with pytest.raises(SystemExit, match="error: --model nowhere: "):
        blind.main([str(twins / "test.jsonl"), "--model", "nowhere", "--out", str(tmp_path / "s.jsonl")])
