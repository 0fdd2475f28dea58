"""What goes wrong around training and evaluation: processes that are killed, disks that are full, pictures that are gone.

Whatever happens, the message is one sentence, nothing half written is taken for whole, and continuing ends where an undisturbed run
does, to the last bit.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader

from data_prep.problem import ProblemError, read_problems
from eval import run as eval_run
from eval.tasks import TaskError
from training import callbacks
from training.config import RecipeError, load_recipe
from training.plan import Plan
from training.run import RunFolder

from .fakes import Fake, blind
from .lives import Evaluation, Fate, Training, begin, end, make_room
from .running import metrics, refusal, run, same, trainer_of, wait_for_step, weights
from .test_resume import after_steps

KILLS = 25 if os.environ.get("EVENSIGHT_LONG") else 3
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is done to the processes is Linux's")
# Every step is a checkpoint, and dropout and a schedule notice what is done twice or not at all.
SHORT = dict(steps=10, batch=2, micro_batch=1, save={"every": 1}, optim={"schedule": "cosine", "warmup_steps": 3}, lora={"dropout": 0.1})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def adapter_of(run_dir: Path) -> dict[str, bytes]:
    """The files of the adapter; what it names is where it was trained."""
    assert not list(run_dir.glob("*.part"))
    return files_of(run_dir / "adapter")


def said(log: Path) -> str:
    """The sentence that a command ended with."""
    text = log.read_text(encoding="utf-8")
    assert "Traceback" not in text, text[-3000:]
    sentences = re.findall(r"(?:error: ).+", text)
    assert len(sentences) == 1 and len(sentences[0]) < 600, text[-3000:]
    return sentences[0]


# -- killed ----------------------------------------------------------------------------------------


def test_killed_again_and_again(recipe_file, tmp_path):
    """Between two files, in the middle of one, or at any moment; half of the lives end while a checkpoint is written."""
    path, log = recipe_file(name="killed", **SHORT), tmp_path / "log"
    run_dir = Path(load_recipe(path).run_dir)
    chance, ends = random.Random(0), []
    for number in range(KILLS):
        kind = ("cut", "kill", "moment")[number % 3]
        fate = {"cut": lambda: Fate("cut", chance.randrange(1, 60), size=chance.randrange(200, 60_000)),
                "kill": lambda: Fate("kill", chance.randrange(1, 60)), "moment": lambda: None}[kind]()
        process = begin(Training(path, "--resume"), log, run_dir, fate)
        if kind == "moment":
            before = callbacks.last_checkpoint(run_dir)
            while process.is_alive() and callbacks.last_checkpoint(run_dir) == before:
                time.sleep(0.005)
            time.sleep(chance.random() / 5)
            process.kill()
        ends.append(end(process))
        if ends[-1] == 0:               # a run of 10 steps has an end, and 25 kills need a run that has not
            assert json.loads((run_dir / "run.json").read_text())["finished"]
            shutil.rmtree(run_dir)
            continue
        assert ends[-1] in (-signal.SIGKILL, -signal.SIGXFSZ), log.read_text()[-3000:]
        assert not (run_dir / "run.json").exists() or not json.loads((run_dir / "run.json").read_text())["finished"]
    assert ends.count(0) < KILLS / 2, ends
    assert end(begin(Training(path, "--resume"), log, run_dir)) == 0, log.read_text()[-3000:]
    straight = run(recipe_file(name="straight", **SHORT))
    assert same(weights(run_dir), weights(straight)) and adapter_of(run_dir) == adapter_of(straight)
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 11))


def test_a_recipe_half_written_does_not_end_the_run(recipe_file, tmp_path):
    """Continuing writes the recipe anew; who is killed there must be able to continue."""
    path, log = recipe_file(name="killed", **{**SHORT, "steps": 2}), tmp_path / "log"
    run_dir = Path(load_recipe(path).run_dir)
    assert end(begin(Training(path), log, run_dir, Fate("kill", name="metrics.jsonl"))) == -signal.SIGKILL
    recorded = (run_dir / "recipe.yaml").read_bytes()
    assert end(begin(Training(path, "--resume"), log, run_dir, Fate("cut", name="*recipe.yaml*", size=10))) == -signal.SIGXFSZ
    assert (run_dir / "recipe.yaml").read_bytes() == recorded
    assert json.loads((run(path, "--resume") / "run.json").read_text())["finished"]


# -- a full disk -----------------------------------------------------------------------------------

# Where there is no room, in the order in which a run comes by: what Python writes itself, and what torch and safetensors write.
FULL = {
    "the log": Fate("full", 2, "metrics.jsonl"),
    "the optimizer": Fate("full", name="checkpoint-3", inside="optimizer.pt"),
    "the adapter": Fate("full", name="checkpoint-4", size=20_000),
    "the trainer's state": Fate("full", name="checkpoint-5", inside="trainer_state.json"),
    "the plan": Fate("full", name="checkpoint-6", inside="plan.json.part"),
    "the end": Fate("full", 3, "run.json.part"),            # opened and moved when the run begins, too
}


def test_a_full_disk(recipe_file, tmp_path):
    """One run that comes by every place where the disk may be full, continued after each."""
    path, log = recipe_file(name="full", **SHORT), tmp_path / "log"
    run_dir = Path(load_recipe(path).run_dir)
    for place, fate in FULL.items():
        assert end(begin(Training(path, "--resume"), log, run_dir, fate)) == 1, log.read_text()[-3000:]
        message = said(log)
        assert "No space left on device" in message or "could not be written" in message, (place, message)
        make_room(run_dir)
        last = callbacks.last_checkpoint(run_dir)
        plan = Plan(load_recipe(path))
        plan.check(last, callbacks.step_of(last))
        assert not (run_dir / "adapter").exists() or place == "the end"
        assert not json.loads((run_dir / "run.json").read_text())["finished"]
    straight = run(recipe_file(name="straight", **SHORT))
    assert end(begin(Training(path, "--resume"), log, run_dir)) == 0, log.read_text()[-3000:]
    assert same(weights(run_dir), weights(straight)) and adapter_of(run_dir) == adapter_of(straight)
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 11))


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (0, 1))
def test_a_picture_that_goes_bad_while_training_runs(recipe_file, twins, tmp_path, monkeypatch, workers):
    """Gone, or cut off, after the data was checked and before it is drawn: named with its problem, by a worker too."""
    data = tmp_path / "data"
    shutil.copytree(twins, data)
    changes = {**SHORT, "data": {"workers": workers}, "views": {"vision": 1.0}, "problems": data / "train.jsonl"}
    path = recipe_file(name="bad", **changes)
    plan, run_dir = Plan(load_recipe(path)), Path(load_recipe(path).run_dir)
    late = [plan.stages[0].mixture.problems["twins"][plan.draw(number).problems[0]] for number in range(14, 20)]
    early = {plan.stages[0].mixture.problems["twins"][plan.draw(number).problems[0]].image for number in range(14)}
    problem = next(problem for problem in late if problem.image not in early)
    picture = data / problem.image
    whole = picture.read_bytes()

    def damage(step: int) -> None:
        if step == 3 and workers:
            picture.write_bytes(whole[: len(whole) // 2])
        elif step == 3:
            picture.unlink()

    with monkeypatch.context() as patch:
        after_steps(patch, damage)
        message = refusal(path)
    why = "cannot be decoded" if workers else "does not exist"
    assert "\n" not in message and "Traceback" not in message and "Caught" not in message
    assert problem.id in message and Path(problem.image).name in message and why in message, message
    last = callbacks.last_checkpoint(run_dir)
    assert 3 <= callbacks.step_of(last) < 10 and not (run_dir / "adapter").exists()
    plan.check(last, callbacks.step_of(last))
    if not workers:
        assert f"{data / 'train.jsonl'}:" in refusal(path, "--resume"), "continuing looks at every picture's header first"
    picture.write_bytes(whole)
    straight = run(recipe_file(name="straight", **{**changes, "data": {"workers": 0}}))
    assert same(weights(run(path, "--resume")), weights(straight))


# -- continuing as something else ------------------------------------------------------------------


def test_a_checkpoint_of_a_users_own_is_left_alone(recipe_file):
    """What is kept under another name beside the checkpoints is neither continued from nor deleted."""
    path = recipe_file(steps=4, save={"every": 1, "keep": 1})
    run_dir = Path(load_recipe(path).run_dir)
    for name in ("checkpoint-2-best", "checkpoint-old"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        (run_dir / "checkpoints" / name / callbacks.COMPLETE).touch()
    (run_dir / "checkpoints" / "checkpoint-3").write_text("no folder")
    assert callbacks.last_checkpoint(run_dir) is None
    (run_dir / "checkpoints" / "checkpoint-3").unlink()
    run(path)
    assert sorted(place.name for place in (run_dir / "checkpoints").iterdir()) == ["checkpoint-2-best", "checkpoint-4", "checkpoint-old"]


def test_what_another_recipe_differs_in_is_named(recipe_file, tmp_path):
    """However much it is: eight keys, and how many more."""
    recipe = load_recipe(recipe_file())
    RunFolder(recipe, resume=False).start({"data.jsonl": "ab"})
    other = load_recipe(recipe_file(steps=3, batch=8, seed=4, log_every=7, loss={"weigh": "rows"}, model={"max_pixels": 3136},
                                    optim={"clip": 0.5, "schedule": "linear", "weight_decay": 0.1, "lr": {"vision": 1e-5}}))
    with pytest.raises(RecipeError, match=r"of another recipe; it differs in batch \(4 then, 8 now\), .* and 2 more") as caught:
        RunFolder(other, resume=True)
    assert len(str(caught.value)) < 600
    with pytest.raises(RecipeError, match=r"the data changed since the run began: data.jsonl, more.jsonl"):
        RunFolder(recipe, resume=True).start({"data.jsonl": "cd", "more.jsonl": "ef"})


@pytest.mark.parametrize("ranks", [(1, 2, 4), (4, 1, 2), (2, 4, 1)], ids=str)
def test_another_number_of_ranks_continues_the_same_order(recipe_file, ranks):
    """Three steps with each: what the ranks draw together in a step depends on its number alone."""
    batch, micro_batch = 8, 2
    rows = range(len(Plan(load_recipe(recipe_file(steps=9, batch=batch, micro_batch=micro_batch)))))
    drawn = []
    for part, world in enumerate(ranks):
        accumulation, done = batch // micro_batch // world, 3 * part
        shards = [BatchSamplerShard(BatchSampler(rows, micro_batch, drop_last=False), world, rank) for rank in range(world)]
        # As the trainer skips when it continues: the steps done, times the micro-batches of one rank.
        left = [list(skip_first_batches(DataLoader(rows, batch_sampler=shard, collate_fn=list), done * accumulation)) for shard in shards]
        for step in range(3):
            drawn.append(sorted(row for rank in left for one in rank[step * accumulation:(step + 1) * accumulation] for row in one))
    assert drawn == [list(range(batch * step, batch * (step + 1))) for step in range(9)]


# -- evaluation ------------------------------------------------------------------------------------


def evaluation(twins: Path, out: Path) -> list[str]:
    return ["--model", "fake", "--tasks", str(twins / "test.jsonl"), "--out", str(out), "--batch-size", "4"]


def answer(twins: Path, out: Path, say=blind) -> list[str]:
    """The lines of a whole evaluation, in order of their content."""
    eval_run.run(eval_run.parse(evaluation(twins, out)), lambda: Fake(say))
    assert json.loads((out / "run.json").read_text())["finished"]
    return sorted((out / "answers.jsonl").read_text(encoding="utf-8").split("\n"))


def test_answers_end_where_the_disk_does(twins, tmp_path):
    """Killed in the middle of a line, and without room for the next one: the same command completes both."""
    whole, out, log = answer(twins, tmp_path / "whole"), tmp_path / "out", tmp_path / "log"
    middle = (tmp_path / "whole" / "answers.jsonl").stat().st_size // 3
    assert end(begin(Evaluation(evaluation(twins, out)), log, out, Fate("cut", name="answers.jsonl", size=middle))) == -signal.SIGXFSZ
    there = (out / "answers.jsonl").read_bytes()
    assert len(there) == middle and not there.endswith(b"\n") and not json.loads((out / "run.json").read_text())["finished"]
    assert end(begin(Evaluation(evaluation(twins, out)), log, out, Fate("full", name="answers.jsonl", size=2 * middle))) == 1
    message = said(log)
    assert os.strerror(errno.EFBIG) in message and str(out / "answers.jsonl") in message
    assert (out / "answers.jsonl").stat().st_size == 2 * middle and not json.loads((out / "run.json").read_text())["finished"]
    assert answer(twins, out) == whole


def test_a_picture_that_goes_bad_while_answers_are_given(twins, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(twins, data)
    whole = answer(data, tmp_path / "whole")
    problems = read_problems(data / "test.jsonl")
    picture = data / problems[-1].image
    content, out = picture.read_bytes(), tmp_path / "out"

    def take_away(prompt) -> str:
        picture.unlink(missing_ok=True)
        return blind(prompt)

    with pytest.raises(ProblemError, match=f"view .*{picture.name}' does not exist") as caught:
        answer(data, out, take_away)
    assert any(problem.id in str(caught.value) for problem in problems if problem.image == problems[-1].image)
    kept = (out / "answers.jsonl").read_bytes()
    assert kept.endswith(b"\n") and 0 < kept.count(b"\n") < len(whole) - 1
    picture.write_bytes(content)
    assert answer(data, out) == whole and (out / "answers.jsonl").read_bytes().startswith(kept)


@pytest.mark.parametrize("damage", [
    lambda lines: [lines[0], lines[1][:40], *lines[2:]], lambda lines: [lines[0], "[]", *lines[2:]], lambda lines: [*lines[:3], lines[0], *lines[3:]],
    lambda lines: [lines[0], "", *lines[2:]], lambda lines: [lines[0], '{"key": 3}', *lines[2:]],
], ids=("cut", "no object", "twice", "blank", "no key"))
def test_answers_with_a_damaged_line_are_not_continued(twins, tmp_path, damage):
    """A line that is not the last was not left by a process that was killed."""
    answer(twins, tmp_path)
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(damage(path.read_text(encoding="utf-8").split("\n"))), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(TaskError, match=r"answers.jsonl:[24]: is no answer of its own"):
        answer(twins, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("word", ("a\u2028b", "a\x85b\x0b", "half \ud83d of a pair"))
def test_any_answer_can_be_written_and_continued(twins, tmp_path, word):
    """Characters that end a line for Python but not for JSON, and half a surrogate pair, which servers may send."""
    words = [*evaluation(twins, tmp_path), "--mode", "generate"]
    for _ in range(2):
        fake = Fake(lambda prompt: word)
        eval_run.run(eval_run.parse(words), lambda: fake)
    assert not fake.asked
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert {json.loads(line)["text"] for line in lines} == {word}
