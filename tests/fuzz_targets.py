"""The sets of files that tests.fuzzing damages, and the commands' ways to read them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from tests.fuzzing import Target


def data_folder(folder: Path) -> Path:
    """Problems and pairs of 6 pictures; beside them links that lead out of the folder and round in a circle."""
    from PIL import Image

    from data_prep.pair import Pair, write_pairs
    from data_prep.problem import Problem, write_problems

    (folder / "images").mkdir(parents=True)
    outside = folder.parent / "outside.png"
    Image.new("RGB", (28, 28), "red").save(outside)
    (folder / "images" / "out.png").symlink_to(outside)
    (folder / "images" / "loop.png").symlink_to("loop.png")
    problems, pairs = [], []
    for n in range(6):
        image = f"images/{n}.png"
        Image.new("RGB", (28 * (1 + n % 2), 28), (40 * n, 0, 0)).save(folder / image)
        meta = {"kind": "colour", "published": {"vision": {"image": image, "question": "What is in the picture?"}}} if n == 1 else {}
        problems.append(Problem(
            id=f"p{n}", group=f"g{n // 2}", source="demo", image=image if n else (image, "images/1.png"), facts=f"circle {n}",
            question="Which colour has <image 1>?", options=("red", "blue", f"green {n}") if n % 2 else None,
            answer="red", license="CC0-1.0", meta=meta, root=folder))
        pairs.append(Pair(
            id=f"q{n}", group=f"g{n}", source="demo", license="CC0-1.0", images=(image,), chosen="red", rejected="blue",
            rejected_prior="green" if n % 2 else None, rejected_images=(f"images/{(n + 1) % 6}.png",),
            rejected_images_answer="black", meta={"from": f"p{n}"}, root=folder,
            prompt=({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},)))
    write_problems(folder / "problems.jsonl", problems)
    write_pairs(folder / "pairs.jsonl", pairs)
    return folder


RECIPE = """\
base: base.yaml
name: demo
optim: {lr: {vision: 1e-4, merger: 1e-4, language: 1e-4}, schedule: cosine, warmup_steps: 1}
stages:
- {share: 0.5, loss: {weigh: rows}}
- {share: 0.5, mixture: mixture.yaml, optimizer: restart}
lora: {vision: {rank: 4}, merger: {rank: 4}, language: {rank: 4, alpha: 8}}
loss: {weigh: tokens, cross_modal_kl: {coef: 0.5, estimator: k3, clamp: 10}}
balance: {method: unimodal_losses, strength: 0}
guard: {non_finite: skip}
"""
BASE = """\
name: base
model: {name: nowhere/tiny, dtype: float32}
data: {mixture: mixture.yaml, workers: 0}
optim: {lr: {vision: 1e-3, merger: 1e-3, language: 1e-3}, betas: [0.9, 0.99]}
steps: 8
batch: 4
micro_batch: 2
save: {every: 2, keep: 2}
"""
MIXTURE = """\
sources:
  one: {problems: problems.jsonl, turns: 2, views: {vision: 0.4, both: 0.2}, max_epochs: 50}
  two: {problems: problems.jsonl, views: {text: 0.4}, paired: true}
"""


def data_targets(folder: Path) -> list[Target]:
    from data_prep.pair import read_pairs
    from data_prep.problem import ProblemError, partners, possible_views, read_problems, render

    data = data_folder(folder / "data")

    def show(**options: Any) -> None:
        problems = read_problems(data / "problems.jsonl", **options)
        for problem, other in zip(problems, partners(problems)):
            for view in possible_views(problem, other):
                if view.value != "rendered":                # a character that no font has is an error of its own
                    render(problem, view, other)

    def pairs() -> None:
        for pair in read_pairs(data / "pairs.jsonl"):
            pair.load(), pair.load("rejected_images")

    def lenient() -> None:
        read_problems(data / "problems.jsonl", skip_bad=True)
        read_pairs(data / "pairs.jsonl", skip_bad=True)

    return [Target("problems", data, ["problems.jsonl"], show, (ProblemError,), share=3),
            Target("pictures", data, ["images/0.png", "images/1.png"], show, (ProblemError,)),
            Target("pairs", data, ["pairs.jsonl"], pairs, (ProblemError,), share=2),
            Target("rows left out", data, ["problems.jsonl", "pairs.jsonl"], lenient, (ProblemError,))]


def recipe_targets(folder: Path) -> list[Target]:
    from training.config import RecipeError, load_recipe

    data = data_folder(folder / "recipes-of-fuzz")
    for name, text in (("recipe.yaml", RECIPE), ("base.yaml", BASE), ("mixture.yaml", MIXTURE)):
        (data / name).write_text(text, encoding="utf-8")
    plain = {"optim.lr.vision": 1e-4, "steps": 8, "stages.1.share": 0.5, "loss": {"weigh": "rows"}, "balance": {"method": "unimodal_losses"}}
    (data / "overrides.json").write_text(json.dumps(plain))

    def overridden() -> None:
        try:
            given = json.loads((data / "overrides.json").read_text(encoding="utf-8"))
            words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
        except (ValueError, AttributeError, RecursionError):            # then the bytes themselves are an override
            words = [(data / "overrides.json").read_text(encoding="utf-8", errors="surrogateescape")]
        load_recipe(data / "recipe.yaml", words)

    return [Target("recipe", data, ["recipe.yaml", "base.yaml"], lambda: load_recipe(data / "recipe.yaml"), (RecipeError,), share=4, lines=40,
                   names=("recipe.yaml", "base.yaml", "the list that this changes")),
            Target("overrides", data, ["overrides.json"], overridden, (RecipeError,), share=2, lines=40,
                   names=("override", "recipe.yaml"))]


def run_targets(folder: Path) -> list[Target]:
    """A run folder with a checkpoint, as --resume reads it."""
    from training.callbacks import COMPLETE, Metrics, last_checkpoint
    from training.config import RecipeError, load_recipe
    from training.plan import Plan
    from training import run as module
    from training.run import RunFolder

    data = data_folder(folder / "run-of-fuzz")
    for name, text in (("recipe.yaml", RECIPE), ("base.yaml", BASE), ("mixture.yaml", MIXTURE)):
        (data / name).write_text(text, encoding="utf-8")
    run_dir = data / "run"
    recipe = load_recipe(data / "recipe.yaml", [f"run_dir={run_dir}"])
    plan = Plan(recipe)
    RunFolder(recipe, resume=False).start(plan.hashes)
    checkpoint = run_dir / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    plan.save(checkpoint, 4)
    for name, values in (("balance.json", {"seen": 3, "factors": [1.0, 0.5]}), ("trainer_state.json", {"global_step": 4, "log_history": []})):
        (checkpoint / name).write_text(json.dumps(values))
    (checkpoint / COMPLETE).touch()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1.0, "seconds": 2.0 * n}) + "\n" for n in range(1, 6)))

    def resumed() -> None:
        found = RunFolder(recipe, resume=True)
        if found.finished:
            f"{found.info['seconds']:.0f}"              # what train.py says of a finished run
        last = last_checkpoint(run_dir)
        plan.check(last, int(last.name.rpartition("-")[2]))
        log = Metrics(run_dir / "metrics.jsonl", 4)
        before = (run_dir / "metrics.jsonl").read_bytes()
        assert 0 <= log._forget_after(4) < float("inf")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        (run_dir / "metrics.jsonl").write_bytes(before)
        assert all(row["step"] <= 4 for row in rows)

    def started(allow_changes: bool = False) -> None:
        """What a resumed run writes, without asking git for the commit each time."""
        kept, module.parents = module.parents, lambda: {"commit": None}
        try:
            RunFolder(recipe, resume=True, allow_changes=allow_changes).start(plan.hashes)
        finally:
            module.parents = kept

    run_files = [f"run/{name}" for name in ("run.json", "recipe.yaml")]
    states = [f"run/checkpoints/checkpoint-4/{name}" for name in ("plan.json", "balance.json", "trainer_state.json", COMPLETE)]
    return [Target("resume", data, [*run_files, "run/metrics.jsonl", *states], resumed, (RecipeError,), share=3),
            Target("start", data, run_files, started, (RecipeError,)),
            Target("start changed", data, run_files, lambda: started(True), (RecipeError,), lines=40)]


def eval_targets(folder: Path) -> list[Target]:
    from data_prep.problem import ProblemError
    from eval import gap, report
    from eval import run as eval_run
    from eval.answers import AnswersError, check_pair, read_side
    from eval.tasks import TaskError
    from tests.fakes import Fake, blind

    data = data_folder(folder / "answers-of-fuzz")
    words = ["--model", "fake", "--tasks", str(data / "problems.jsonl"), "--views", "both,vision,text,blind"]

    def ask(out: str) -> None:
        eval_run.run(eval_run.parse([*words, "--out", str(data / out)]), lambda: Fake(blind))

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name in ("one", "two", "three"):
            ask(name)

    def again() -> None:
        """The same command once more, which completes what is there."""
        kept = {path: path.read_bytes() for path in (data / "three").iterdir()}
        try:
            ask("three")
        finally:
            for path, content in kept.items():
                path.write_bytes(content)

    def side() -> None:
        check_pair(read_side(None, str(data / "one")), read_side(None, str(data / "two")))

    def page() -> None:
        """Without its figures, which take a second."""
        kept, report._figures = report._figures, lambda *_: [""]
        try:
            report.main(["--runs", f"one={data / 'one'}", f"two={data / 'two'}", "--out", str(data / "page.html"), "--sample", "4"])
        finally:
            report._figures = kept

    answers = ["one/answers.jsonl", "one/run.json"]
    return [Target("answers", data, answers, side, (AnswersError,), share=4),
            Target("report", data, answers, page, (), share=1),
            Target("gap", data, answers, lambda: gap.main([str(data / "one"), str(data / "two"), "--out", str(data / "gap")]), (), share=1),
            Target("eval again", data, ["three/answers.jsonl", "three/run.json", "problems.jsonl"], again, (TaskError, ProblemError), share=1.5)]


def targets(folder: Path) -> list[Target]:
    return [*data_targets(folder), *recipe_targets(folder), *run_targets(folder), *eval_targets(folder)]
