"""Training as a user runs it: the gradient of a step, a pace per tower, and the files that come out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

import train
from data_prep.problem import Problem, write_problems
from training import model as model_module
from training import trainers
from training.config import TOWERS, load_recipe
from training.model import load_base, tower_of

from .conftest import picture
from .running import metrics, refusal, run, run_in_two_processes, trainer_of, weights


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Problems with answers of 1 to 60 words, pictures of several sizes, and some without a picture."""
    folder = tmp_path_factory.mktemp("uneven")
    (folder / "images").mkdir()
    rows = []
    for n in range(24):
        image = None if n % 4 == 3 else f"images/{n}.png"
        if image:
            picture(28 * (2 + n % 3), 56, seed=n).save(folder / image)
        rows.append(
            Problem(
                id=str(n),
                group=str(n),
                source="demo",
                image=image,
                facts=f"a {n} red circle",
                question=f"What is {n}?",
                options=None,
                answer=" ".join(["red circle"] * (1 if n % 2 else 30)),
                license="CC0-1.0",
                meta={},
                root=folder,
            )
        )
    write_problems(folder / "all.jsonl", rows)
    return folder / "all.jsonl"


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.first:
            self.first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def seeded(path: Path, *overrides: str):
    """A trainer whose adapter does something: the same for the same recipe."""
    torch.manual_seed(0)
    trainer = trainer_of(path, overrides)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # away from 0, where the gradient of the other half is 0
            parameter.data.normal_(std=0.05)
    return trainer


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm().item()


def one_step(path: Path, *overrides: str, steps: int = 1):
    """First-step loss, gradients, and weights after `steps`."""
    trainer = seeded(path, f"steps={steps}", *overrides)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return (
        loss,
        seen.first,
        {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
    )


@pytest.mark.parametrize("weigh", ("tokens", "rows"))
def test_the_micro_batch_changes_nothing(recipe_file, uneven, weigh):
    path = recipe_file(
        problems=uneven,
        views={"both": 0.3, "vision": 0.3, "text": 0.4},
        batch=8,
        micro_batch=8,
        seed=1,
        optim={"clip": 0.0},
        loss={"weigh": weigh},
    )
    loss, gradient, after = one_step(path, steps=2)
    assert norm_of(gradient) > 1e-3
    batch = next(iter(trainer_of(path, ["steps=1"]).get_train_dataloader()))
    lengths = (batch["labels"] != -100).sum(1)
    images = (batch["input_ids"] == load_base(load_recipe(path).model).config.image_token_id).sum(1)
    assert lengths.max() > 10 * lengths.min() and (images == 0).any() and (images > 0).any(), "the batch is not uneven"
    for micro_batch in (1, 2):
        other_loss, other, other_after = one_step(path, f"micro_batch={micro_batch}", steps=2)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert set(other) == set(gradient)
        assert norm_of({name: other[name] - gradient[name] for name in gradient}) < 1e-5 * norm_of(gradient)
        # Adam divides by the size of a gradient: where that is rounding, so is the step.
        moved = torch.cat([(after[name] - other_after[name]).abs().flatten() for name in after])
        assert moved.median() < 1e-6 and moved.mean() < 1e-5


def test_the_loss_is_that_of_the_stock_model(recipe_file, uneven):
    """Cross-entropy over the trained tokens, from the stock forward pass, one row at a time."""
    path = recipe_file(problems=uneven, views={"vision": 0.5, "text": 0.5}, batch=4, micro_batch=2, steps=1)
    loss = one_step(path)[0]
    trainer = seeded(path)
    total, count = 0.0, 0
    for draw in range(4):
        batch = trainer.data_collator([{"draw": draw}])
        labels = batch.pop("labels")[:, 1:]
        batch.pop("loss_weight")
        with torch.no_grad():
            logits = trainer.model(**batch).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits[labels != -100], labels[labels != -100], reduction="sum"
        ).item()
        count += int((labels != -100).sum())
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_rows_and_tokens_are_different_losses(recipe_file, uneven):
    tokens, rows = (
        metrics(
            run(
                recipe_file(name=weigh, problems=uneven, views={"text": 1.0}, batch=8, micro_batch=4, steps=1),
                f"loss.weigh={weigh}",
            )
        )[0]
        for weigh in ("tokens", "rows")
    )
    assert abs(tokens["loss"] - rows["loss"]) > 1e-3
    assert tokens["token_accuracy"] == rows["token_accuracy"] and tokens["entropy"] == rows["entropy"]


def test_image_pads_and_prompts_are_never_trained(recipe_file):
    trainer = trainer_of(recipe_file(steps=5, batch=8, micro_batch=8, turns=3, views={"vision": 0.5, "both": 0.5}))
    encoder = trainer.data_collator.encoder
    for batch in trainer.get_train_dataloader():
        assert {"input_ids", "attention_mask", "mm_token_type_ids", "labels", "loss_weight", "pixel_values"} <= set(
            batch
        )
        trained = batch["labels"] != -100
        assert trained.any() and (batch["input_ids"] == encoder.image_id).any()
        assert not (trained & (batch["input_ids"] == encoder.image_id)).any()
        assert not (trained & (batch["attention_mask"] == 0)).any()
        assert torch.equal(trained, batch["loss_weight"] > 0)
        assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
        ends = (trained & (batch["input_ids"] == encoder.end_id)).sum(1)
        assert ((ends >= 1) & (ends <= 3)).all() and (ends == 3).any(), "one end per answer"


def moved(trainer, steps: int = 2) -> dict[str, float]:
    """How far each tower's trained and frozen parameters move in a run: {"vision": ..}, and "frozen"."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    far: dict[str, float] = dict.fromkeys([*TOWERS, "frozen"], 0.0)
    for name, parameter in trainer.model.named_parameters():
        key = tower_of(name) if parameter.requires_grad else "frozen"
        far[key] += (parameter.detach() - before[name]).abs().sum().item()
        assert parameter.requires_grad or parameter.grad is None
    return far


@pytest.mark.parametrize("lora", (True, False))
@pytest.mark.parametrize("frozen", TOWERS)
def test_a_frozen_tower_does_not_move(recipe_file, frozen, lora):
    path = recipe_file(
        views={"vision": 1.0}, optim={"lr": {frozen: 0.0}, "weight_decay": 0.1}, **({} if lora else {"lora": None})
    )
    far = moved(trainer_of(path))
    assert far["frozen"] == 0 and far[frozen] == 0
    assert all(far[tower] > 0 for tower in TOWERS if tower != frozen)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_rate_moves_its_tower_and_no_other(recipe_file, tower):
    def after(rate: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        # One step: its gradient does not know of the change yet, so that the other towers must be equal exactly.
        trainer = trainer_of(recipe_file(steps=1, views={"vision": 1.0}, optim={"lr": {tower: rate}, "clip": 0.0}))
        trainer.train()
        return {
            name: p.detach().clone()
            for name, p in trainer.model.named_parameters()
            if p.requires_grad and "lora_B" in name
        }

    slow, fast = after(1e-4), after(1e-3)
    for name in slow:
        if tower_of(name) == tower:
            torch.testing.assert_close(fast[name], 10 * slow[name], rtol=1e-4, atol=1e-9)
        else:
            assert torch.equal(fast[name], slow[name])
    assert any(tower_of(name) == tower and slow[name].abs().sum() > 0 for name in slow)


def test_rates_of_the_towers_are_logged(recipe_file):
    run_dir = run(
        recipe_file(optim={"lr": {"vision": 1e-3, "merger": 2e-3, "language": 3e-4}, "schedule": "linear"}, steps=2)
    )
    rows = metrics(run_dir)
    for row, factor in zip(rows, (1.0, 0.5)):
        assert [row[f"lr_{tower}"] for tower in TOWERS] == pytest.approx([1e-3 * factor, 2e-3 * factor, 3e-4 * factor])


def test_the_adapter_loads_with_plain_peft(recipe_file, tiny, monkeypatch):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    kept = {}
    original = train.save
    monkeypatch.setattr(train, "save", lambda trainer, path: (original(trainer, path), kept.update(trainer=trainer)))
    lora = {"vision": {"rank": 2}, "merger": {"rank": 3}, "language": {"rank": 4, "alpha": 5}}
    run_dir = run(recipe_file(lora=lora, optim={"lr": {"vision": 0.05, "merger": 0.05, "language": 0.05}}))
    trainer = kept["trainer"]
    batch = trainer.data_collator([{"draw": 0}, {"draw": 1}])
    labels, _ = batch.pop("labels"), batch.pop("loss_weight")
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32")
    with torch.no_grad():
        trained = trainer.model.eval()(**batch).logits
        before = base(**batch).logits
        loaded = PeftModel.from_pretrained(base, run_dir / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).logits, trained, rtol=0, atol=1e-5)
    assert (trained - before)[labels != -100].abs().max() > 0.1, "training changed nothing"
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)


def test_full_fine_tuning_leaves_a_model(recipe_file, tiny):
    from transformers import Qwen2_5_VLForConditionalGeneration

    from data_prep.encode import Encoder

    run_dir = run(recipe_file(lora=None, optim={"lr": {"vision": 0.0, "merger": 1e-2, "language": 1e-2}}))
    assert not (run_dir / "adapter").exists()
    after = Qwen2_5_VLForConditionalGeneration.from_pretrained(run_dir / "model").state_dict()
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny).state_dict()
    assert set(after) == set(before)
    changed = {tower_of(name) for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"merger", "language"}
    assert Encoder(run_dir / "model").text_ids("red circle") == Encoder(tiny).text_ids("red circle")


@pytest.mark.parametrize(
    "changes",
    (
        {"model": {"dtype": "bfloat16"}},
        {"model": {"checkpointing": True}},
        {"model": {"attention": "eager"}},
        {"model": {"max_pixels": 28 * 28 * 4}},
    ),
    ids=str,
)
def test_other_settings_of_the_model_run(recipe_file, changes):
    rows = metrics(run(recipe_file(steps=1, **changes)))
    assert rows[0]["loss"] > 0 and rows[0]["grad_norm"] > 0


def test_checkpointing_changes_no_gradient(recipe_file):
    path = recipe_file(steps=1, views={"vision": 1.0})
    loss, gradient, _ = one_step(path)
    other_loss, other, _ = one_step(path, "model.checkpointing=true")
    assert other_loss == loss and all(
        torch.allclose(other[name], gradient[name], rtol=1e-5, atol=1e-8) for name in gradient
    )


def test_dry_run_prints_the_tables_and_loads_no_weights(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr(model_module, "load_base", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setenv("COLUMNS", "200")
    path = recipe_file(optim={"lr": {"vision": 3e-5}}, lora={"merger": {"rank": 7}})
    run_dir = run(path, "--dry-run", "batch=8")
    out = capsys.readouterr().out
    assert not run_dir.exists()
    for words in (
        "name: recipe",
        "batch: 8",
        "towers",
        "3e-05",
        "7",
        "16 draws",
        "image tokens",
        "answer tokens",
        "estimate",
        "memory of one device",
        "image tokens per picture (min, median, max)",
    ):
        assert words in out, words
    printed = yaml.safe_load(out[: out.index("towers")].rstrip().removesuffix("towers"))
    assert printed == load_recipe(path, ["batch=8"]).to_dict()


def test_dry_run_needs_no_weights_on_disk(recipe_file, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    run(recipe_file(model={"name": str(tmp_path / "empty")}), "--dry-run")


@pytest.mark.parametrize(
    "changes, arguments, said",
    (
        (dict(model={"name": "no/such-model"}), (), "no/such-model"),
        (dict(views={"vision": 0.5}), (), "must sum to 1"),
        (dict(), ("stepz=3",), "did you mean 'steps'"),
        (dict(), ("steps",), "key=value is needed"),
        (dict(), ("--deepspeed", "nowhere.json"), "nowhere.json"),
        (dict(), ("--dry-run", "model.name=no/such-model"), "no/such-model"),
    ),
    ids=str,
)
def test_refusals_are_one_sentence(recipe_file, changes, arguments, said):
    path = recipe_file(**changes)
    assert said in refusal(path, *arguments)
    assert not (path.parent / "runs").exists()


def test_a_recipe_that_is_not_there(tmp_path):
    assert "nowhere.yaml" in refusal(tmp_path / "nowhere.yaml")


def test_a_batch_that_ranks_cannot_share(recipe_file):
    recipe = load_recipe(recipe_file(batch=4, micro_batch=2))
    with pytest.raises(ValueError, match="batch=4 is not a multiple of micro_batch=2 x 4 ranks"):
        trainers.sft_arguments(recipe, Path(recipe.run_dir), world_size=4)


def test_a_rank_without_pictures_makes_all_gradients_in_the_usual_order(recipe_file, monkeypatch):
    """DDP waits for every gradient, and DeepSpeed's ZeRO-2 mixes them up when ranks make them in different orders."""
    trainer = seeded(recipe_file(views={"vision": 0.5, "text": 0.5}, batch=8, micro_batch=1))
    batches = [trainer.data_collator([{"draw": draw}]) for draw in range(8)]
    pictures = next(batch for batch in batches if "pixel_values" in batch)
    words = next(batch for batch in batches if "pixel_values" not in batch)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    made = []
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: made.append(name))

    def order(batch: dict) -> list[str]:
        made.clear()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return list(made)

    expected = order(pictures)
    assert order(words) == expected and {tower_of(name) for name in expected} == set(TOWERS)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad.abs().sum() > 0) == (tower_of(name) == "language")


@pytest.mark.parametrize("loss", ({}, {"cross_modal_kl": {"coef": 1.0, "answers": "all"}}), ids=("nll", "cross_modal_kl"))
def test_two_processes_train_as_one(recipe_file, uneven, loss):
    """Same global batch, text-only rows on some ranks: the same losses and, but for rounding, the same adapter."""
    changes = dict(
        problems=uneven, views={"vision": 0.4, "text": 0.6}, steps=4, batch=4, micro_batch=1, save={"every": 2}, loss=loss
    )
    path = recipe_file(name="two", **changes)
    run_in_two_processes(path)
    two, one = Path(load_recipe(path).run_dir), run(recipe_file(name="one", **changes))
    assert [row["step"] for row in metrics(two)] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "token_accuracy", "entropy", *loss):
        assert [row[key] for row in metrics(two)] == pytest.approx([row[key] for row in metrics(one)], rel=1e-4)
    mine, theirs = weights(two), weights(one)
    assert set(mine) == set(theirs)
    assert torch.cat([(mine[name] - theirs[name]).abs().flatten() for name in mine]).median() < 1e-6
