"""The whole road on real data, in their authors' layout: prepare, train a few steps, evaluate every view, compare, report."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import train
from data_prep.answerer import Answerer
from data_prep.encode import Encoder
from data_prep.problem import View, partners, possible_views, read_problems, render
from data_prep.sources import nlvr, puzzlevqa
from eval import gap, report
from eval import run as eval_run

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "assets" / "tiny")
REAL = os.environ.get("EVENSIGHT_REALDATA")
needs_real = pytest.mark.skipif(not REAL, reason="EVENSIGHT_REALDATA is not set")

MIXTURE = """
sources:
  real:
    problems: {problems}
    views: {{vision: 0.5, both: 0.3, text: 0.2}}
"""


@needs_real
@pytest.mark.parametrize("source, words", [(nlvr, ["--from", f"{REAL}/nlvr"]), (puzzlevqa, ["--from", f"{REAL}/puzzlevqa"])],
                         ids=["nlvr", "puzzlevqa"])
def test_real_data(source, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    name = source.__name__.rpartition(".")[2]
    source.main([*words, "--out", f"data/{name}", "--limit", "40"])
    Path("mixture.yaml").write_text(MIXTURE.format(problems=f"data/{name}/train.jsonl"))
    train.main([str(ROOT / "recipes/demo/full_text.yaml"), f"model.name={TINY}", f"data.mixture={tmp_path / 'mixture.yaml'}", "steps=3",
                "batch=2", "micro_batch=1", "optim.warmup_steps=0", "run_dir=run", "log_every=1"])
    every = read_problems(f"data/{name}/test.jsonl")
    views = [view for view in View if any(view in possible_views(p, other) for p, other in zip(every, partners(every)))]
    assert {View.both, View.vision, View.text, View.blind, View.shuffled, View.noise, View.rendered} <= set(views)
    common = ["--model", TINY, "--tasks", name, "--views", ",".join(views), "--limit", "6", "--batch-size", "4"]
    eval_run.main([*common, "--out", "answers/before"])
    eval_run.main([*common, "--out", "answers/after", "--adapter", "run/adapter"])
    gap.main(["answers/before", "answers/after"])
    assert "gap (both - vision)" in capsys.readouterr().out
    report.main(["--runs", "before=answers/before", "after=answers/after", "--out", "report.html"])
    page = Path("report.html").read_text()
    assert "data:image/png;base64," in page and "<svg" in page


def test_adapter_gives_the_same_answers_in_plain_peft(tmp_path, monkeypatch, twins) -> None:
    """The adapter of a run, loaded as PEFT's documentation says, ranks the options as eval.run recorded."""
    monkeypatch.chdir(tmp_path)
    Path("mixture.yaml").write_text(MIXTURE.format(problems=twins / "train.jsonl"))
    train.main([str(ROOT / "recipes/demo/full_text.yaml"), f"model.name={TINY}", f"data.mixture={tmp_path / 'mixture.yaml'}", "steps=4",
                "batch=8", "micro_batch=8", "optim.warmup_steps=0", "run_dir=run"])
    eval_run.main(["--model", TINY, "--adapter", "run/adapter", "--tasks", str(twins / "test.jsonl"), "--views", "both,vision,text",
                   "--out", "answers"])
    rows = [json.loads(line) for line in Path("answers/answers.jsonl").read_text().splitlines()]
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32), "run/adapter").eval()
    encoder = Encoder(TINY)
    problems = {problem.id: problem for problem in read_problems(twins / "test.jsonl")}
    for row in rows[:30]:
        prompt = render(problems[row["id"]], row["view"])
        batch = encoder.batch([encoder.encode(prompt.messages, prompt.images, generate=True)])
        with torch.inference_mode():
            last = model(**batch).logits[0, -1].log_softmax(-1)
        scores = [last[encoder.text_ids(choice)[0]].item() for choice in prompt.choices]
        assert scores == pytest.approx(row["scores"], abs=1e-3)
        assert prompt.choices[scores.index(max(scores))] == row["pred"]


@pytest.mark.parametrize("model, adapter, message", [
    ("nowhere", None, "--model nowhere: "), (TINY, "nowhere", "--adapter nowhere: "), (TINY, TINY, f"--adapter {TINY}: ")])
def test_what_cannot_be_loaded_is_named(model, adapter, message, twins, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--model", model, "--tasks", str(twins / "test.jsonl"), "--out", str(tmp_path / "out"),
             *(["--adapter", adapter] if adapter else [])]
    with pytest.raises(SystemExit, match=f"error: {message}"):
        eval_run.main(words)
    assert not (tmp_path / "out").exists()


def test_likelihood_and_generation_agree(twins) -> None:
    """A model that knows the format generates the option that it finds most likely, in every view."""
    problems = read_problems(twins / "test.jsonl")
    answerer = Answerer(TINY)
    prompts = [render(problem, view) for problem in problems for view in ("both", "vision", "text", "blind")]
    scores = answerer.likelihoods(prompts)
    likely = [prompt.choices[row.index(max(row))] for prompt, row in zip(prompts, scores)]
    said = [answer.text for answer in answerer.generate(prompts, 4)]
    assert sum(a == b for a, b in zip(likely, said)) >= 0.9 * len(prompts)


def test_likelihood_of_choices_of_several_tokens(twins) -> None:
    """Batched and padded, the score of a choice is the sum over its tokens and the end of the turn, as computed alone."""
    from dataclasses import replace

    problem = read_problems(twins / "test.jsonl")[0]
    long = replace(problem, options=("a red circle", "a red circle and a cross", "nothing"), answer="nothing")
    prompts = [render(long, "both"), render(problem, "vision"), render(long, "text")]
    answerer = Answerer(TINY)
    together = answerer.likelihoods(prompts)
    encoder, model = answerer.encoder, answerer.model
    for prompt, scores in zip(prompts[::2], together[::2]):
        for choice, score in zip(prompt.choices, scores):
            messages = [*prompt.messages, {"role": "assistant", "content": choice}]
            row = encoder.encode(messages, prompt.images)
            with torch.inference_mode():
                logps = model(**encoder.batch([row])).logits[0].log_softmax(-1)
            alone = sum(logps[i - 1, row.ids[i]].item() for i in range(1, len(row)) if row.trained[i])
            assert score == pytest.approx(alone, abs=1e-3)
