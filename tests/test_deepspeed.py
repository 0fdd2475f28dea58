"""Training under DeepSpeed on two ranks: as in one process, with every launcher; what is refused; what the documents say.

A launch costs more than the small runs in it, so that every launch trains several recipes in turn (tests.launched). The runs are
those of tests.deepspeed_runs; EVENSIGHT_SLOW=1 adds the long list.
"""

import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train
from benchmarks import zero_memory
from data_prep.problem import Problem, write_problems
from modeling.adapters import MENDER
from training import sharding
from training.balance.methods import METHODS
from training.balance.settings import Lnln
from training.callbacks import last_checkpoint
from training.config import AnswerLoss, CrossModalKL, Loss, Preference, RecipeError, load_recipe
from training.estimate import sharded_gb
from training.model import count_parameters, parameter_groups
from training.plan import Plan
from training.preference import answer_terms

from .conftest import merged, picture
from .deepspeed_runs import CONFIGS, CUT, DOCUMENT, FAST, MIXED, ROOT, RUNS, Case, changes_of, recipe_of, refused, slow, table
from .pairs_for_tests import pairs_of, without, written
from .running import metrics, refusal, run, trainer_of, weights

BIN = Path(sys.executable).parent
SLOW = pytest.mark.skipif("EVENSIGHT_SLOW" not in os.environ, reason="half an hour on an idle machine; EVENSIGHT_SLOW=1 runs it")
STEPS = {"zero2": 8, "zero3": 4}       # of supervised runs under torchrun; of others that are cut 4, else 3


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Problems without a picture, with one and with two, answers of 2 and 20 words."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "images").mkdir()
    rows = []
    for n in range(24):
        names = tuple(f"images/{n}-{i}.png" for i in range(n % 3))
        for i, name in enumerate(names):
            picture(28 * (2 + n % 3), 28 * (2 + i), seed=n).save(folder / name)
        rows.append(Problem(id=str(n), group=str(n), source="demo", image=names or None, facts=f"a {n} red circle",
                            question=f"What is {n}?", options=None, answer=" ".join(["red circle"] * (1 if n % 2 else 10)), license="CC0-1.0", meta={}, root=folder))
    write_problems(folder / "all.jsonl", rows)
    return folder / "all.jsonl"


@pytest.fixture(scope="module")
def files(tiny, twins, mixed, tmp_path_factory):
    """files(what, name, steps) -> (path of a recipe, its run folder)."""
    folder = tmp_path_factory.mktemp("deepspeed")
    pairs = pairs_of(twins)
    answers = written(twins, pairs, "deepspeed-pairs.jsonl")
    pictures = written(twins, [without(pair, "rejected_images", "rejected_images_answer") if n % 3 else pair for n, pair in enumerate(pairs)],
                       "deepspeed-pictures.jsonl")
    probe = folder / "probe.yaml"
    probe.write_text(yaml.safe_dump({"sources": {"twins": {"problems": str(twins / "test.jsonl"), "views": {"both": 1.0}}}}))

    def write(what: str, name: str, steps: int = 3) -> tuple[Path, Path]:
        views, rank, rate = RUNS[what].views, {"rank": 4}, 1e-3
        if views is None:
            source = {"pairs": str(answers if RUNS[what].data == "twins" else pictures), "rate": 1.0}
        else:
            source = {"problems": str(mixed if RUNS[what].data == "mixed" else twins / "train.jsonl"), "views": views}
        (folder / f"{name}-mixture.yaml").write_text(yaml.safe_dump({"sources": {"demo": source}}))
        values = {"name": name, "seed": 1, "model": {"name": str(tiny), "dtype": "float32"}, "data": {"mixture": f"{name}-mixture.yaml"},
                  "lora": {"vision": rank, "merger": rank, "language": rank}, "run_dir": str(folder / "runs" / name),
                  "optim": {"lr": {"vision": rate, "merger": rate, "language": rate}, "schedule": "linear", "warmup_steps": 1},
                  "steps": steps, "batch": 4, "micro_batch": 1, "log_every": 1, "save": {"every": max(steps // 2, 2)}}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(values, changes_of(what, probe)), sort_keys=False))
        return path, folder / "runs" / name
    return write


@pytest.fixture(scope="module")
def one(files):
    """one(case) -> the run folder of the same recipe in this process."""
    found: dict[tuple[str, int], Path] = {}

    def of(case: Case) -> Path:
        key = case.what, steps_of(case)
        if key not in found:
            found[key] = run(files(case.what, f"one-{case.what}-{key[1]}", key[1])[0])
        return found[key]
    return of


def steps_of(case: Case) -> int:
    return STEPS[case.config] if case in CUT and case.what == "supervised" else 4 if case in CUT else 3


def launch(launcher: str, script: list[str], limit_s: int = 1500) -> None:
    """A command under a launcher, as a user types it, with two ranks (one for plain python)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = {
        "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port],
        "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", port],
        "accelerate": [BIN / "accelerate", "launch", "--config_file", "recipes/launch/accelerate.yaml", "--num_processes", "2",
                       "--main_process_port", port],
        "python": [sys.executable]}[launcher]
    # The launchers look for python and ninja on the path.
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{env['PATH']}"}
    process = subprocess.Popen([*map(str, command), *script], cwd=ROOT, env=env, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = process.communicate(timeout=limit_s)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    assert process.returncode == 0, said[-6000:]


def trained(files, cases: list[Case], folder: Path, first: Sequence[dict] = (), then: Sequence[dict] = ()) -> dict[Case, Path]:
    """Train cases of one launcher, torchrun's in one launch, in which other runs come before and after; returns their run folders."""
    found, runs = {}, [*first]
    for case in cases:
        steps = steps_of(case)
        path, found[case] = files(case.what, "-".join(case), steps)
        config = [] if case.launcher == "accelerate" and case.config == "zero2" else ["--deepspeed", f"ds_configs/{case.config}.json"]
        if case.launcher == "torchrun":
            runs.append({"argv": [str(path), *config], "stop_at": None})
            if case in CUT:     # once more, interrupted half-way
                path, found[case, "cut"] = files(case.what, "-".join((*case, "cut")), steps)
                runs += [{"argv": [str(path), *config], "stop_at": steps // 2},
                         {"argv": [str(path), *config, "--resume"], "stop_at": None}]
        else:
            launch(case.launcher, ["train.py", str(path), *config])
    if runs := [*runs, *then]:
        (folder / "runs.json").write_text(json.dumps(runs))
        launch("torchrun", ["tests/launched.py", str(folder / "runs.json")], limit_s=3600)
    return found


def compare(two: Path, one: Path) -> None:
    """The same losses and, but for rounding, the same weights."""
    mine, theirs = metrics(two), metrics(one)
    assert theirs and [row["step"] for row in mine] == [row["step"] for row in theirs]
    shown = [key for key in theirs[-1] if key in mine[-1] and re.match("loss$|grad_norm$|terms/|balance/(factor|value)|probe/|lr_", key)]
    assert {"loss", "grad_norm"} <= set(shown)
    for a, b in zip(mine, theirs):
        keys = [key for key in shown if key in a and key in b]
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=2e-3, abs=2e-4), a["step"]
    mine, theirs = weights(two), weights(one)
    if "lm_head.weight" in mine and "lm_head.weight" not in theirs:     # DeepSpeed's copies look untied, and both are written
        (tied,) = (mine[name] for name in mine if name.endswith("embed_tokens.weight"))
        assert torch.equal(mine.pop("lm_head.weight"), tied)
    assert set(mine) == set(theirs) and all(mine[name].shape == theirs[name].shape for name in mine)
    # Adam divides by the size of a gradient: where that is rounding, so is the step.
    assert torch.cat([(mine[name] - theirs[name]).abs().flatten() for name in mine]).median() < 1e-6


@pytest.fixture(scope="module")
def fast(files, small, tmp_path_factory):
    """The run folders of FAST; of `ddp`, a run without DeepSpeed that was stopped half-way; and of `small`, one of mixed batches."""
    (ddp, stopped), (path, mixture) = files("supervised", "ddp", STEPS["zero2"]), small("small", MIXTURE_STEPS)
    found = trained(files, FAST, tmp_path_factory.mktemp("torchrun"), [{"argv": [str(ddp)], "stop_at": STEPS["zero2"] // 2}],
                    [{"argv": [str(path), "--deepspeed", "ds_configs/zero2.json"], "stop_at": None}])
    return {**found, "ddp": (ddp, stopped), "small": (path, mixture)}


@pytest.mark.parametrize("case", FAST, ids="-".join)
def test_ranks_train_as_one_process(fast, one, case):
    compare(fast[case], one(case))


def test_what_two_ranks_began_one_process_continues(fast, one):
    """Without DeepSpeed the number of ranks may change: the order, the moments and so the losses and the adapter are the same."""
    path, run_dir = fast["ddp"]
    half = STEPS["zero2"] // 2
    assert last_checkpoint(run_dir).name == f"checkpoint-{half}" and [row["step"] for row in metrics(run_dir)] == list(range(1, half + 1))
    run(path, "--resume")
    compare(run_dir, one(Case("torchrun", "zero2", "supervised")))


# --- batches with and without pictures ------------------------------------------------------------------------------------

MIXTURE_STEPS = 24


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """small(name, steps) -> (path of a recipe, its run folder): two short conversations a step, of text alone, one picture or two."""
    folder = tmp_path_factory.mktemp("small")
    rows = []
    for n in range(30):
        names = tuple(f"{n}-{i}.png" for i in range(n % 3))
        for name in names:
            picture(56, 56, seed=n).save(folder / name)
        rows.append(Problem(id=str(n), group=str(n), source="demo", image=names or None, facts="red", question="red?", options=None,
                            answer="red" if n % 2 else "blue", license="CC0-1.0", meta={}, root=folder))
    write_problems(folder / "all.jsonl", rows)
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"sources": {"demo": {"problems": str(folder / "all.jsonl"), "views": MIXED}}}))

    def write(name: str, steps: int) -> tuple[Path, Path]:
        rank, rate = {"rank": 2}, 1e-4
        values = {"name": name, "model": {"name": str(tiny), "dtype": "float32"}, "data": {"mixture": "mixture.yaml"}, "steps": steps,
                  "lora": {"vision": rank, "merger": rank, "language": rank}, "run_dir": str(folder / "runs" / name), "batch": 2,
                  "optim": {"lr": {"vision": rate, "merger": rate, "language": rate}}, "micro_batch": 1, "log_every": 1,
                  "save": {"every": 10_000}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return folder / f"{name}.yaml", folder / "runs" / name
    return write


def check_mixture(path: Path, run_dir: Path, steps: int) -> None:
    """Every step was made and logged, whatever the ranks had: pictures on both, on either alone, on none; one and two of them."""
    rows, plan = metrics(run_dir), Plan(load_recipe(path))
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    counts = [len(plan.conversation(plan.draw(number))[1]) for number in range(2 * steps)]
    together = Counter((bool(one), bool(two)) for one, two in zip(counts[::2], counts[1::2]))
    assert set(counts) == {0, 1, 2} and len(together) == 4 and min(together.values()) >= steps // 20, together


def test_batches_with_and_without_pictures(fast):
    check_mixture(*fast["small"], MIXTURE_STEPS)


@SLOW
@pytest.mark.parametrize("config", (None, "zero2", "zero3"))
def test_three_hundred_steps_of_mixed_batches(small, tmp_path, config):
    """Without DeepSpeed too, where ranks wait for each other's gradients."""
    path, run_dir = small(f"long-{config}", 300)
    argv = [str(path), *(("--deepspeed", f"ds_configs/{config}.json") if config else ())]
    (tmp_path / "runs.json").write_text(json.dumps([{"argv": argv, "stop_at": None}]))
    launch("torchrun", ["tests/launched.py", str(tmp_path / "runs.json")], limit_s=2400)
    check_mixture(path, run_dir, 300)


def test_ranks_of_the_long_run_have_pictures_in_any_order(files):
    """None, one and two, on one rank alone and on the other alone; but every step has some. (In a step without any, one process
    leaves the vision tower as it is, while ranks have gradients of zeros, with which Adam moves it on by its momentum.)"""
    trainer = trainer_of(files("supervised", "pictures", STEPS["zero2"])[0])
    counts = [len(trainer.data_collator([{"draw": draw}]).get("image_grid_thw", ())) for draw in range(4 * STEPS["zero2"])]
    assert set(counts) == {0, 1, 2} and all(any(counts[start:start + 4]) for start in range(0, len(counts), 4))
    together = {(bool(one), bool(two)) for one, two in zip(counts[::2], counts[1::2])}
    assert together == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize("case", (case for case in CUT if case in FAST), ids="-".join)
def test_a_resumed_run_ends_as_the_straight_one(fast, case):
    check_resumed(case, fast[case], fast[case, "cut"])


@SLOW
@pytest.mark.parametrize("case", (case for case in CUT if case not in FAST), ids="-".join)
def test_a_resumed_run_with_modules_ends_as_the_straight_one(others, case):
    """The modules that lnln adds are in the checkpoint, beside their moments."""
    others(case)
    straight, cut = others(case), others((case, "cut"))
    check_resumed(case, straight, cut)
    mine, theirs = (load_file(folder / "adapter" / MENDER) for folder in (cut, straight))
    begun = load_file(cut / "checkpoints" / f"checkpoint-{steps_of(case) // 2}" / MENDER)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(begun[name], theirs[name]) for name in theirs), "they learn"


@SLOW
def test_configurations_continue_each_others_checkpoints(files, one, tmp_path):
    """Those that check_checkpoint lets through."""
    runs, found = [], []
    for before, after in (("zero1", "zero2"), ("zero2", "zero1"), ("zero3", "zero3_offload"), ("zero3_offload", "zero3")):
        path, run_dir = files("supervised", f"{before}-then-{after}", 4)
        runs += [{"argv": [str(path), "--deepspeed", f"ds_configs/{before}.json"], "stop_at": 2},
                 {"argv": [str(path), "--deepspeed", f"ds_configs/{after}.json", "--resume"], "stop_at": None}]
        found.append(run_dir)
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launch("torchrun", ["tests/launched.py", str(tmp_path / "runs.json")], limit_s=3600)
    for run_dir in found:
        compare(run_dir, one(Case("torchrun", "zero3", "supervised")))


@SLOW
@pytest.mark.parametrize("first, then", (("torchrun", "python"), ("python", "torchrun")))
@pytest.mark.parametrize("config, what", (("zero1", "lnln"), ("zero2", "supervised")))
def test_another_number_of_ranks_continues(files, one, tmp_path, config, what, first, then):
    """Two ranks and then one, or the other way round: the moments are those that were saved, and those of lnln's modules too."""
    path, run_dir = files(what, f"{first}-{config}-{what}-{then}", 4)
    for launcher, stop_at in ((first, 2), (then, None)):
        argv = [str(path), "--deepspeed", f"ds_configs/{config}.json", *(["--resume"] if launcher == then else [])]
        (tmp_path / "runs.json").write_text(json.dumps([{"argv": argv, "stop_at": stop_at}]))
        launch(launcher, ["tests/launched.py", str(tmp_path / "runs.json")])
    compare(run_dir, one(Case("torchrun", "zero1", "lnln") if what == "lnln" else Case("torchrun", "zero3", "supervised")))
    assert not list((run_dir / "checkpoints").glob("universal*"))


def check_resumed(case: Case, straight: Path, cut: Path) -> None:
    half, steps = steps_of(case) // 2, steps_of(case)
    assert [path.name for path in sorted((cut / "checkpoints").iterdir())] == sorted(f"checkpoint-{n}" for n in (half, steps))
    compare(cut, straight)
    assert [row["loss"] for row in metrics(cut)] == pytest.approx([row["loss"] for row in metrics(straight)], rel=1e-6)
    mine, theirs = weights(cut), weights(straight)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config, how, ranks, said", (
    ("zero2", None, 2, "under DeepSpeed's ZeRO: continue with --deepspeed"), ("zero2", "zero1", 2, None), ("zero2", "zero2", 4, None),
    ("zero2", "zero3", 2, "without ZeRO-3"), ("zero3", "zero3_offload", 2, None), ("zero3", "zero3", 4, "by 2 ranks under ZeRO-3"), ("zero3", "zero2", 2, "under ZeRO-3")))
def test_checkpoints_are_continued_as_they_were_written(fast, config, how, ranks, said):
    checkpoint = last_checkpoint(fast[Case("torchrun", config, "supervised")])
    given = how and str(ROOT / "ds_configs" / f"{how}.json")
    if said is None:
        sharding.check_checkpoint(checkpoint, given, ranks)
    else:
        with pytest.raises(RecipeError, match=said):
            sharding.check_checkpoint(checkpoint, given, ranks)


def test_a_checkpoint_of_plain_training_is_continued_without_deepspeed(tmp_path):
    sharding.check_checkpoint(tmp_path, None, 2)
    with pytest.raises(RecipeError, match="without DeepSpeed's ZeRO: continue without it"):
        sharding.check_checkpoint(tmp_path, str(ROOT / "ds_configs" / "zero1.json"), 2)


@pytest.fixture(scope="module")
def others(files, tmp_path_factory):
    """others(case) -> its run folder; a launch per launcher and configuration, when it is first asked for."""
    found: dict = {}

    def of(case: Case | tuple[Case, str]) -> Path:
        if case not in found:
            found.update(trained(files, [other for other in slow() if other[:2] == case[:2]], tmp_path_factory.mktemp(case.config)))
        return found[case]
    return of


@SLOW
@pytest.mark.parametrize("case", slow(), ids="-".join)
def test_every_other_run(others, one, case):
    compare(others(case), one(case))


# --- what cannot be trained, and the documents ----------------------------------------------------------------------------

@pytest.mark.parametrize("what, config, said", (
    ("msam", "zero1", "msam changes gradients"), ("ogm_ge", "zero2", "ogm_ge changes gradients"), ("skip", "zero1", "guard.non_finite"),
    ("lnln", "zero3", "modules that lnln adds"), ("ahead", "zero3", "preference.reference: ahead"), ("quantised", "zero3", "model.quantize"),
    ("moments", "zero2", "optim.name: adamw_8bit")))
def test_what_is_refused_before_anything_is_loaded(files, monkeypatch, what, config, said):
    monkeypatch.setattr("training.model.load_base", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("training.sharding.begin", lambda: pytest.fail("ranks were joined"))
    path, run_dir = files(what, f"refused-{what}-{config}")
    message = refusal(path, "--deepspeed", f"{ROOT}/ds_configs/{config}.json")
    assert said in message and message == f"error: {refused(what, config)}" and not run_dir.exists()


def test_an_adapter_with_modules_is_refused_in_parts(files, tmp_path):
    (tmp_path / "extras.json").write_text('{"mender": {}}')
    path, _ = files("language", "adapter-with-modules")
    overrides = f"model.adapter={tmp_path}", "--deepspeed", f"{ROOT}/ds_configs/zero3.json"
    assert "has modules that are neither saved nor loaded in parts" in refusal(path, *overrides)


@pytest.mark.parametrize("text, said", (
    ("{", "cannot be read"), ("[]", "a JSON object"), ('{"optimizer": {"type": "Adam"}}', "optimizer: the recipe's `optim` decides"),
    ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage: 0 to 3")))
def test_files_that_are_no_configurations(files, tmp_path, text, said):
    (tmp_path / "ds.json").write_text(text)
    assert said in refusal(files("supervised", "no-configuration")[0], "--deepspeed", str(tmp_path / "ds.json"))


def test_accelerate_names_a_file(files, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert sharding.config_of("given.json") == "given.json"
    with pytest.raises(RecipeError, match="deepspeed_config_file"):
        sharding.config_of(None)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / "ds_configs" / "zero2.json"))
    assert sharding.config_of(None) == str(ROOT / "ds_configs" / "zero2.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert sharding.config_of(None) is None


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_leave_to_recipes_what_is_theirs(config):
    settings = sharding.settings_of(ROOT / "ds_configs" / f"{config}.json")
    assert sharding.stage_of(settings) == int(config[4])
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"):
        assert settings[key] == "auto"
    assert settings["bf16"] == {"enabled": "auto"} and not {"optimizer", "scheduler", "fp16"} & set(settings)
    zero = settings["zero_optimization"]
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == config.startswith("zero3")
    assert ("offload_param" in zero, "offload_optimizer" in zero) == 2 * ("offload" in config,)


def test_the_order_of_a_blank_picture_is_a_pictures(files, monkeypatch):
    """Modules run, forward and backward, in one order with and without a picture, whether all towers are trained or one."""
    for what in ("supervised", "language", "all_weights"):
        trainer = trainer_of(files(what, f"order-{what}")[0])
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
        batches = [trainer.data_collator([{"draw": draw}]) for draw in range(12)]
        pictures = next(batch for batch in batches if len(batch.get("image_grid_thw", ())) == 2)
        words = next(batch for batch in batches if "pixel_values" not in batch)
        made: list[tuple[str, str]] = []
        for name, module in trainer.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda *_, name=name: made.append(("forward", name)))
                module.register_full_backward_hook(lambda *_, name=name: made.append(("backward", name)))
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: made.append(("gradient", name)))

        def order(batch: dict) -> list[tuple[str, str]]:
            made.clear()
            trainer.compute_loss(trainer.model, dict(batch)).backward()
            return list(made)

        shown = order(pictures)
        if what == "language":      # without a gradient, a blank picture is needed under ZeRO-3 alone
            monkeypatch.setattr("training.trainers.gathers", lambda arguments: True)
        assert order(words) == shown and {"forward", "backward", "gradient"} == {kind for kind, _ in made}
        assert any("visual" in name for _, name in made)


def test_parts_count_as_wholes_and_vectors_get_no_weight_decay(files):
    trainer = trainer_of(files("all_weights", "parts")[0])
    before = count_parameters(trainer.model)
    groups = {group["weight_decay"]: len(group["params"]) for group in parameter_groups(trainer.model, trainer.recipe)}
    for parameter in trainer.model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert count_parameters(trainer.model) == before
    assert {group["weight_decay"]: len(group["params"]) for group in parameter_groups(trainer.model, trainer.recipe)} == groups


def test_every_method_loss_and_term_has_a_row(tmp_path):
    """Whatever a recipe can ask for stands in the table, as tested or refused."""
    recipes = {what: recipe_of(what, tmp_path) for what in RUNS}
    methods = [recipe.active_balance for recipe in recipes.values() if recipe.active_balance is not None]
    assert {one.method for one in methods} == set(METHODS)
    levels = get_args(Lnln.__dataclass_fields__["level"].type)
    assert {one.level for one in methods if one.method == "lnln"} == set(levels)

    losses = [recipe.stage_loss(number) for recipe in recipes.values() for number in range(max(1, len(recipe.stages)))]
    assert {one.weigh for one in losses} == set(get_args(Loss.__dataclass_fields__["weigh"].type))
    kinds = get_args(CrossModalKL.__dataclass_fields__["estimator"].type)
    assert {one.cross_modal_kl.estimator for one in losses if one.cross_modal_kl is not None} == set(kinds)
    assert all(any(getattr(one, field.name) != getattr(Loss(), field.name) for one in losses) for field in fields(Loss)
               if field.name != "evidence_floor")

    preferences = [recipe.preference for recipe in recipes.values() if recipe.preference is not None]
    assert {name for one in preferences for name in answer_terms(one)} == set(get_args(AnswerLoss))
    numbers = {"beta", "anchor_delta", "cache", "watch"}    # which are no terms
    for name in {field.name for field in fields(Preference)} - numbers:
        assert any(getattr(one, name) != getattr(Preference(), name) for one in preferences), name
    named = {case.what for case in (*FAST, *slow()) if case.launcher == "torchrun"}
    assert {what for what in RUNS if any(refused(what, config) is None for config in CONFIGS)} == named


def test_the_table_of_runs_is_up_to_date():
    sharding.rewrite(DOCUMENT, "runs under DeepSpeed", table(), check=True)
    with pytest.raises(SystemExit, match="out of date: README.md: the block 'runs under DeepSpeed'"):
        sharding.rewrite(DOCUMENT, "runs under DeepSpeed", table()[1:], check=True)


def test_memory_of_parts_by_hand():
    """3 G frozen and 0.25 G trained weights in bfloat16: 6.5 GB of weights, 0.5 of gradients, 3 of optimizer state."""
    frozen, trained = 3 * 2**30, 2**28
    for stage, ranks, expected in ((0, 4, (6.5, 0.5, 3.0)), (1, 4, (6.5, 0.5, 0.75)), (2, 4, (6.5, 0.125, 0.75)), (3, 2, (3.25, 0.25, 1.5)),
                                   (3, 1, (6.5, 0.5, 3.0))):
        found = sharded_gb(frozen, trained, size=2, stage=stage, ranks=ranks)
        assert (found["weights"], found["gradients"], found["optimizer"]) == expected
        assert found["gathered"] == (pytest.approx(2e9 / 2**30) if stage == 3 else 0)
    found = sharded_gb(1000, 24, size=4, stage=3, ranks=4, offload=True)
    assert found == {"weights": 0, "optimizer": 0, "gradients": 24 / 2**30, "gathered": 4096 / 2**30}
    with pytest.raises(ValueError, match="offload is for stage 3, not 2"):
        sharded_gb(1, 1, size=2, stage=2, ranks=2, offload=True)


def test_the_table_of_memory_is_up_to_date():
    sharding.rewrite(DOCUMENT, zero_memory.BLOCK, zero_memory.table(), check=True)


def test_launch_files_name_commands_that_fit(monkeypatch):
    """Every launcher's line in recipes/launch: train.py understands its words, and its files are there."""
    folder = ROOT / "recipes" / "launch"
    assert yaml.safe_load((folder / "accelerate.yaml").read_text())["deepspeed_config"]["deepspeed_config_file"] == "ds_configs/zero2.json"
    found = []
    for path in sorted(folder.iterdir()):
        text = re.sub(r"\s*\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for line in text.splitlines():
            if " train.py " in line:
                words = shlex.split(line.strip("# ").replace('"${1:-', '"').replace('}"', '"'))
                args = train.parse(words[words.index("train.py") + 1:])
                assert all((ROOT / name).is_file() for name in (args.recipe, args.deepspeed) if name is not None), path
                found.append((path.name, Path(words[0]).name))
    assert found == [("accelerate.yaml", "accelerate"), ("hostfile", "deepspeed"), ("slurm.sh", "srun"), ("torchrun.sh", "torchrun")]
    for script in folder.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
    for line in (folder / "hostfile").read_text().splitlines():
        assert re.fullmatch(r"#.*|\S+ slots=\d+", line)
