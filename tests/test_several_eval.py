"""Several pictures through the encoder, eval.run and the report; equal prompts asked once; rationales in evaluation."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from data_prep.problem import RATIONALE_TAIL, render, write_problems
from eval import report
from eval import run as eval_run
from eval.tasks import TaskError
from tests.fakes import Fake, oracle
from tests.test_several_pictures import SIZES, folder, three, words  # noqa: F401


def test_three_pictures_through_the_encoder(three, encoder):
    prompt = render(replace(three, question="Is <image 3> below <image 1>?"), "vision")
    encoded = encoder.encode(prompt.messages, prompt.images, generate=True)
    tokens = [encoder.image_tokens(*SIZES[name]) for name in ("green", "blue", "red")]
    assert len(encoded.grid) == 3 and (encoded.grid.prod(1) // 4).tolist() == tokens
    slots = (encoded.ids == encoder.image_id).astype(int)
    starts = np.flatnonzero(np.diff(slots) == 1) + 1
    runs = [int(np.argmin(slots[start:])) for start in starts]
    assert runs == tokens
    texts = [encoder.tokenizer.decode(encoded.ids[a + n : b]) for a, n, b in zip(starts, runs, [*starts[1:], None])]
    assert "Is " in texts[0] and "below" in texts[1] and texts[2].split("<|vision_end|>")[1].startswith("?\nOptions")


def ask(folder, problems, *extra, views="both,vision,blind", say=oracle):
    write_problems(folder / "items.jsonl", problems)
    fake = Fake(say)
    args = eval_run.parse(
        ["--model", "fake", "--tasks", str(folder / "items.jsonl"), "--views", views, "--out", str(folder / "out"), *extra]
    )
    eval_run.run(args, lambda: fake)
    return fake, [json.loads(line) for line in (folder / "out/answers.jsonl").read_text().splitlines()]


def test_three_pictures_through_evaluation_and_report(three, folder):
    entry = {"image": ["white.png", "black.png"], "question": "Told."}
    problems = [three, replace(three, id="p2", image="red.png", meta={**three.meta, "published": {"both": entry}})]
    _, rows = ask(folder, [*problems, replace(three, id="p3", image=None)], views="both,vision,text")
    assert {(row["id"], row["view"]): row["image"] for row in rows} == {
        **{("p1", view): ["red.png", "green.png", "blue.png"] for view in ("both", "vision", "text")},
        ("p2", "both"): ["white.png", "black.png"], ("p2", "vision"): "red.png", ("p2", "text"): "red.png",
        ("p3", "text"): None,
    }  # fmt: skip
    report.main(["--runs", f"a={folder / 'out'}", "--out", str(folder / "page.html")])
    page = (folder / "page.html").read_text()
    cards = {re.search(r", (p\d)</p>", card)[1]: card for card in page.split("<article")[1:]}
    assert set(cards) == {"p1", "p2"}, "the items that every view holds"
    assert [alt for alt in re.findall(r'alt="([^"]+)"', cards["p1"])] == [f"picture {n} of item p1" for n in (1, 2, 3)]
    assert "shown in" not in cards["p1"]
    captions = re.findall(r"shown in (\w+):|alt=\"(.+?)\"", cards["p2"])
    assert [a or b for a, b in captions] == [
        "both", "picture 1 of item p2", "picture 2 of item p2", "vision", "picture 3 of item p2",
    ]  # fmt: skip


def test_equal_prompts_are_asked_once(three, folder):
    """p1 and p2 show the same in every view but differ in id; p3 has the same words and other pixels, p4 other words."""
    open_question = replace(three, options=None, image=("red.png", "green.png"), meta={})
    problems = [
        open_question,
        replace(open_question, id="p2", group="h", answer="first"),
        replace(open_question, id="p3", image=("green.png", "red.png")),
        replace(open_question, id="p4", question="Which is smaller?"),
    ]
    fake, rows = ask(folder, problems)
    # p1: three views; p3: both and vision (its blind prompt is p1's); p4: three
    assert (fake.asked, len(rows)) == (8, 12)
    assert len({row["key"] for row in rows}) == 12
    right = {(row["id"], row["view"]): row["correct"] for row in rows}
    assert [right["p1", "vision"], right["p2", "vision"]] == [True, False], "each answer is scored with its own item's"
    again, rows = ask(folder, problems)
    assert (again.asked, len(rows)) == (0, 12)


def test_equal_prompts_with_options(three, folder):
    """Options of p1 and p2 stand in one order, so both prompts are one; the order of `other` is another."""
    fixed = {**three.meta, "keep_order": True}
    problems = [replace(three, meta=fixed), replace(three, id="p2", meta=fixed)]
    other = replace(three, id="p3", meta=fixed, options=("second", "first"))
    fake, rows = ask(folder, [*problems, other], views="vision")
    assert (fake.asked, len(rows)) == (2, 3)
    assert {row["id"]: (row["pred"], row["scores"]) for row in rows} == {
        "p1": ("second", [-1.0, 0.0]), "p2": ("second", [-1.0, 0.0]), "p3": ("second", [0.0, -1.0]),
    }  # fmt: skip


def test_rationales_in_evaluation(three, folder):
    problem = replace(three, meta={**three.meta, "rationale": "Not the first one."})
    budgets = []

    class Careful(Fake):
        def generate(self, prompts, max_new_tokens):
            budgets.append(max_new_tokens)
            assert all(words(prompt).endswith(RATIONALE_TAIL) for prompt in prompts)
            return super().generate(prompts, max_new_tokens)

        def likelihoods(self, prompts):
            pytest.fail("the options were scored straight after the prompt")

    write_problems(folder / "items.jsonl", [problem])
    common = ["--model", "fake", "--tasks", str(folder / "items.jsonl"), "--views", "vision,text", "--rationale"]
    for out, extra in (("a", []), ("b", ["--max-new-tokens", "9"])):
        eval_run.run(eval_run.parse([*common, "--out", str(folder / out), *extra]), lambda: Careful(lambda prompt: prompt.target))
    assert budgets == [64, 9]
    info = json.loads((folder / "a/run.json").read_text())
    assert (info["rationale"], info["mode"], info["max_new_tokens"]) == (True, "generate", 64)
    rows = [json.loads(line) for line in (folder / "a/answers.jsonl").read_text().splitlines()]
    assert [(row["pred"], row["correct"]) for row in rows] == [("second", True)] * 2, "read behind 'Answer:'"
    plain = eval_run.parse([*common[:-1], "--out", str(folder / "c")])
    assert (plain.mode, plain.max_new_tokens, plain.rationale) == ("likelihood", 32, False)


def test_rationales_that_cannot_be_asked_for(three, folder, capsys):
    with pytest.raises(SystemExit):
        eval_run.parse(["--model", "m", "--out", "o", "--rationale", "--mode", "likelihood"])
    assert "--rationale: an option's likelihood straight after the prompt" in capsys.readouterr().err
    write_problems(folder / "items.jsonl", [three])
    args = eval_run.parse(["--model", "m", "--tasks", str(folder / "items.jsonl"), "--out", str(folder / "o"), "--rationale"])
    with pytest.raises(TaskError, match=r"items.jsonl: p1: meta.rationale: missing, so --rationale cannot ask for it"):
        eval_run.run(args, lambda: pytest.fail("a model was loaded before the problems were checked"))
