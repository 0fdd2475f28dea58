"""Preference training on the small random model: parity with stock TRL, one encoding per picture, references, what is saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.encode import Encoder
from data_prep.pair import Pair
from data_prep.problem import ProblemError
from training.collate import load_encoder
from training.collate_pairs import PairCollator, Rows
from training.config import load_recipe
from training.model import load_base, prepare, unwrap
from training.plan import Plan
from training.preference import BLIND, CHOSEN, OTHER_IMAGE, REJECTED, Side
from training.preference_trainer import as_reference, dpo_arguments

from .pairs_for_tests import pairs_of, without, written
from .running import ROOT, metrics, refusal, run, run_in_two_processes, same, trainer_of, weights

MDPO = {"conditional": 1.0, "anchor": 1.0}
ALL_TERMS = {"answer": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "conditional": 1.0, "anchor": 1.0, "attend": 0.5,
             "language_prior": 0.1, "svco": 0.5, "sympmo": {}, "noise_aware": {"weight": 0.5}}


@pytest.fixture(scope="session")
def pairs(twins) -> list[Pair]:
    return pairs_of(twins)


@pytest.fixture
def pair_file(twins, pairs, recipe_file, tmp_path):
    """A recipe on those pairs: pair_file({"conditional": 1.0}, steps=3)."""
    def write(preference=None, *, rows=None, **changes) -> Path:
        name = changes.pop("name", "recipe")
        file = written(twins, rows or pairs, f"{tmp_path.name}-{name}.jsonl")
        changes.setdefault("steps", 2)
        return recipe_file(sources={"twins": {"pairs": str(file), "rate": 1.0}}, preference=preference or {}, name=name, **changes)
    return write


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir)]


def test_a_pair_too_long_for_the_model_is_named(pair_file, pairs):
    """As in supervised training: with its side, before the model is asked for positions that it has none for."""
    recipe = load_recipe(pair_file({"conditional": 1.0}, rows=pairs[:2]))
    collator = PairCollator(Plan(recipe), load_encoder(recipe.model), recipe)
    batch = collator([{"draw": 0}])
    longest = int(batch["learn"]["attention_mask"].sum(1).max())
    collator.encoder.longest = longest
    collator([{"draw": 0}])
    collator.encoder.longest = longest - 1
    said = rf"({pairs[0].id}|{pairs[1].id}): (chosen|rejected): {longest} tokens together, and the model has positions for {longest - 1}: lower"
    with pytest.raises(ProblemError, match=said):
        collator([{"draw": 0}])


# --- the same as stock TRL -----------------------------------------------------------------------------------------------

def stock_trainer(path: Path, rows: list[Pair]):
    """Stock DPOTrainer on the same pairs: standard format, because chat format would also train the newline after the turn."""
    import trl
    from datasets import Dataset, Image, Sequence
    from transformers import Qwen2_5_VLProcessor

    recipe = load_recipe(path)
    encoder = Encoder(recipe.model.name)

    class Processor(Qwen2_5_VLProcessor):
        """Without the video processor, which needs torchvision."""
        def __init__(self, image_processor, tokenizer):
            self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, tokenizer.chat_template
            self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")

        def __call__(self, images=None, text=None, **kwargs):
            kwargs.pop("add_special_tokens", None)
            tokens = self.tokenizer(text, add_special_tokens=False, padding=True, padding_side=kwargs["padding_side"], return_tensors="pt")
            return tokens if images is None else self.with_images(images, text, kwargs["padding_side"])

        def with_images(self, images, text, side):
            out = self.image_processor([image for row in images for image in row], return_tensors="pt")
            counts = iter((out["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist())
            text = [row.replace(self.image_token, self.image_token * next(counts)) for row in text]
            tokens = self.tokenizer(text, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
            types = (tokens["input_ids"] == self.image_token_id).long()
            return {**tokens, "mm_token_type_ids": types, "pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}

    tokenizer = encoder.tokenizer
    table = {"images": [], "prompt": [], "chosen": [], "rejected": []}
    for pair in rows:
        table["images"].append([str(pair.root / name) for name in pair.images])
        table["prompt"].append(tokenizer.apply_chat_template(list(pair.prompt), tokenize=False, add_generation_prompt=True))
        table["chosen"].append(pair.chosen + "<|im_end|>")
        table["rejected"].append(pair.rejected + "<|im_end|>")
    data = Dataset.from_dict(table).cast_column("images", Sequence(Image()))
    args = dpo_arguments(recipe, Path(recipe.run_dir) / "stock")
    args.remove_unused_columns = True
    return trl.DPOTrainer(model=prepare(load_base(recipe.model), recipe), args=args, train_dataset=data,
                          processing_class=Processor(encoder.image_processor, tokenizer))


@pytest.mark.parametrize(("answer", "beta"), [
    ({"sigmoid": 1.0}, 0.1), ({"ipo": 1.0}, 1.0), ({"sigmoid": 1.0, "sft": 0.2}, 0.1), ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 0.1)])
def test_five_steps_are_those_of_stock_trl(pair_file, pairs, answer, beta):
    """On the embedded model; ipo at a beta at which its loss is no large number, because single precision is relative."""
    path = pair_file({"answer": answer, "beta": beta, "watch": False}, steps=5, model={"name": str(ROOT / "assets/tiny")})
    ours = trainer_of(path)
    drawn = [ours.data_collator.plan.stages[0].mixture.pair(ours.data_collator.plan.draw(i)) for i in range(5 * 4)]
    torch.manual_seed(0)
    stock = stock_trainer(path, drawn)
    stock.model.load_state_dict({name: value.clone() for name, value in ours.model.state_dict().items()}, strict=False)
    ours.train()
    stock.train()
    trace = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (ours, stock)]
    assert len(trace[0]) == 5 and trace[0] == pytest.approx(trace[1], abs=1e-5)
    assert trace[0][0] != pytest.approx(trace[0][-1], abs=1e-4), "nothing was learned, so nothing was compared"
    for name in ("rewards/margins", "logps/chosen", "entropy"):
        one, two = ([row[name] for row in trainer.state.log_history if name in row] for trainer in (ours, stock))
        assert one == pytest.approx(two, abs=1e-4)


def test_the_names_of_answer_terms_are_trls():
    import inspect
    import re
    from typing import get_args

    from trl import DPOTrainer

    from training.config import AnswerLoss

    assert set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))) == set(get_args(AnswerLoss))


# --- one encoding per picture -------------------------------------------------------------------------------------------

def naive(model, encoder: Encoder, pair: Pair, side: Side) -> torch.Tensor:
    """Log-probability of a side, alone in its batch, through the model's ordinary forward."""
    from training.preference import answer_of

    pictures = {"own": pair.load, "other": lambda: pair.load("rejected_images"), "none": tuple}[side.picture]()
    messages = pair.messages(answer_of(pair, side))
    if side.picture == "none":
        messages = [{**m, "content": [p for p in m["content"] if p["type"] == "text"]} if isinstance(m["content"], list) else m
                    for m in messages]
    row = encoder.encode(messages, pictures)
    batch = encoder.batch([row])
    logits = model(**batch, use_cache=False).logits.float().log_softmax(-1)
    trained = torch.from_numpy(row.trained)
    return logits[0, :-1][trained[1:]].gather(1, batch["input_ids"][0, 1:][trained[1:]][:, None]).sum()


@pytest.mark.parametrize("frozen", [True, False])
def test_shared_pictures_give_the_log_probabilities_and_gradients_of_the_naive_way(pair_file, encoder, frozen):
    rate = 0.0 if frozen else 1e-3
    path = pair_file(ALL_TERMS, optim={"lr": {"vision": rate, "merger": rate}}, batch=3, micro_batch=3)
    trainer = trainer_of(path)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    collator, model = trainer.data_collator, trainer.model
    batch = collator([{"draw": n} for n in range(3)])
    rows = batch["learn"]
    assert len(rows["image_grid_thw"]) < len(rows["pictures"]), "no picture is shared, so nothing is shown"
    found = trainer._look(model, rows, trainer._features(rows)).log_probs.sum(1)
    drawn = [collator.plan.stages[0].mixture.pair(collator.plan.draw(n)) for n in range(3)]
    weights = {side: torch.linspace(0.3, 1.7, 3) * (k + 1) for k, side in enumerate(batch["places"]["learn"])}
    shared = sum((weights[side] * found[place]).sum() for side, place in batch["places"]["learn"].items())
    shared.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = sum(weights[side][i] * naive(model, encoder, pair, side) for side in weights for i, pair in enumerate(drawn))
    alone.backward()
    for side, place in batch["places"]["learn"].items():
        for i, pair in enumerate(drawn):
            assert found[place[i]].item() == pytest.approx(naive(model, encoder, pair, side).item(), abs=1e-4), side
    assert gradients and any("visual" in name for name in gradients) != frozen
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-4)


def count_encodings(trainer, monkeypatch) -> list[int]:
    """Pictures in each call of the vision tower."""
    seen, visual = [], unwrap(trainer.model).model.visual
    forward = visual.forward
    monkeypatch.setattr(visual, "forward", lambda pixels, grid_thw=None, **kw: (seen.append(len(grid_thw)), forward(pixels, grid_thw=grid_thw, **kw))[1])
    return seen


@pytest.mark.parametrize(("frozen", "calls"), [(True, 1), (False, 2)])
def test_each_picture_is_encoded_once_a_step(pair_file, monkeypatch, frozen, calls):
    """Own and rejected picture of two pairs: once for chosen, rejected, policy and reference together when nothing that encodes
    them is trained, else once for the policy and once for the reference."""
    rate = 0.0 if frozen else 1e-3
    trainer = trainer_of(pair_file(MDPO | {"watch": False}, steps=1, batch=2, micro_batch=2, optim={"lr": {"vision": rate, "merger": rate}}))
    rows = trainer.data_collator([{"draw": 0}, {"draw": 1}])["learn"]
    seen = count_encodings(trainer, monkeypatch)
    trainer.train()
    assert seen == [len(rows["image_grid_thw"])] * calls and len(rows["pictures"]) == 6


# --- the reference ------------------------------------------------------------------------------------------------------

def test_first_step_has_no_log_ratio(pair_file):
    row = metrics(run(pair_file(ALL_TERMS, steps=1)))[0]
    ratios = [value for name, value in row.items() if name.startswith("log_ratio/")]
    assert len(ratios) == 8 and ratios == pytest.approx([0.0] * 8, abs=1e-5)
    assert row["terms/svco"] == pytest.approx(4 * 0.6931472, abs=1e-4)
    assert row["terms/sympmo"] == pytest.approx(0.6931472 * 3, abs=1e-4)


@pytest.fixture
def adapter(pair_file, recipe_file):
    """A trained adapter of the small model."""
    return run(recipe_file(name="before", steps=3, views={"both": 1.0}, optim={"lr": {"vision": 3e-2, "merger": 3e-2, "language": 3e-2}})) / "adapter"


def test_a_trained_adapter_is_the_reference_and_is_carried_on(pair_file, adapter):
    path = pair_file(MDPO, model={"adapter": str(adapter)}, steps=3)
    trainer = trainer_of(path)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora" in name}
    assert all(torch.equal(start[name], start[name.replace(".default.", ".ref.")]) for name in start if ".default." in name)
    trainer.train()
    end = {name: value for name, value in trainer.model.state_dict().items() if "lora" in name}
    assert all(torch.equal(start[name], end[name]) for name in start if ".ref." in name), "the reference moved"
    assert any(not torch.equal(start[name], end[name]) for name in start if ".default." in name)
    run_dir = run(path)
    assert metrics(run_dir)[0]["log_ratio/own.chosen"] == pytest.approx(0.0, abs=1e-5)
    assert sorted(p.name for p in (run_dir / "adapter").iterdir() if p.is_dir()) == [], "the reference was saved too"
    saved = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert set(saved) == set(load_file(adapter / "adapter_model.safetensors")) and not any(".ref." in name for name in saved)


def test_switching_to_the_reference_leaves_everything_as_it_was(pair_file, adapter):
    """Also what the recipe freezes, and also after an error."""
    trainer = trainer_of(pair_file(MDPO, model={"adapter": str(adapter)}, optim={"lr": {"vision": 0.0}}))
    model = trainer.model
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values()) and not any(value for name, value in before.items() if "visual.blocks" in name or ".ref." in name)
    with pytest.raises(RuntimeError, match="on purpose"), as_reference(model):
        assert model.active_adapter == "ref"
        raise RuntimeError("on purpose")
    assert model.active_adapter == "default"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_all_weights_against_a_second_model(pair_file):
    run_dir = run(pair_file(MDPO, lora=None, steps=2))
    assert losses(run_dir)[0] == pytest.approx(3 * 0.6931472, abs=1e-5) and losses(run_dir)[1] != pytest.approx(losses(run_dir)[0], abs=1e-4)


def test_reference_ahead_of_training_gives_the_same_run_and_is_not_asked_again(pair_file, monkeypatch, tmp_path):
    live = run(pair_file(ALL_TERMS, steps=3, name="live"))
    path = pair_file(ALL_TERMS | {"reference": "ahead", "cache": str(tmp_path / "kept")}, steps=3, name="ahead")
    ahead = run(path)
    assert losses(ahead) == pytest.approx(losses(live), abs=1e-6) and same(weights(ahead), weights(live))
    from training.preference_trainer import VisionDPOTrainer

    def never(*_, **__):
        raise AssertionError("the reference was run")
    monkeypatch.setattr(VisionDPOTrainer, "reference_log_probs", never)
    assert same(weights(run(path, f"run_dir={tmp_path / 'again'}")), weights(live))


@pytest.mark.parametrize(("override", "names"), [("preference.negative=gray", "negative"), ("model.max_pixels=7000", "pixels"), ("seed=3", "seed")])
def test_reference_log_probabilities_of_something_else_are_refused(pair_file, tmp_path, override, names):
    path = pair_file(MDPO | {"reference": "ahead", "cache": str(tmp_path / "kept")}, steps=1)
    run(path)
    message = refusal(path, override, f"run_dir={tmp_path / 'other'}")
    assert "kept: holds the reference's log-probabilities of something else; it differs in " + names in message


def test_reference_ahead_is_resumed(pair_file, tmp_path, monkeypatch):
    from training import reference

    path = pair_file(MDPO | {"reference": "ahead", "cache": str(tmp_path / "kept")}, steps=3)
    expected = weights(run(path))
    (tmp_path / "kept").rename(tmp_path / "whole")
    asked = []
    values = reference._values

    def stops(trainer, batch, numbers):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(numbers)
        return values(trainer, batch, numbers)
    monkeypatch.setattr(reference, "SAVE_EVERY", 1)
    monkeypatch.setattr(reference, "_values", stops)
    with pytest.raises(SystemExit):
        run(path, f"run_dir={tmp_path / 'two'}")
    monkeypatch.setattr(reference, "_values", lambda trainer, batch, numbers: (asked.append(numbers), values(trainer, batch, numbers))[1])
    assert same(weights(run(path, f"run_dir={tmp_path / 'two'}", "--resume")), expected)
    assert sorted(n for numbers in asked for n in numbers) == list(range(12)), "a draw was computed twice, or never"


# --- negatives ----------------------------------------------------------------------------------------------------------

def test_a_drawn_negative_keeps_the_tokens_and_is_the_same_whenever_it_is_drawn(pair_file):
    collator: PairCollator = trainer_of(pair_file(MDPO | {"negative": "crop:0.1-0.3", "watch": False}, steps=40)).data_collator
    one, two = (collator.build([n], {"learn": (CHOSEN, OTHER_IMAGE)})["learn"] for n in (5, 5))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert torch.equal(one["input_ids"][0], one["input_ids"][1]) and torch.equal(*one["image_grid_thw"])
    half = len(one["pixel_values"]) // 2
    assert not torch.equal(one["pixel_values"][:half], one["pixel_values"][half:])
    drawn = [collator.plan.draw(n) for n in range(160)]
    again = next(n for n in range(160) if drawn[n].epoch == 1 and drawn[n].problems == drawn[5].problems)
    later = collator.build([again], {"learn": (CHOSEN, OTHER_IMAGE)})["learn"]
    assert torch.equal(later["pixel_values"][:half], one["pixel_values"][:half]), "not the same pair"
    assert not torch.equal(later["pixel_values"][half:], one["pixel_values"][half:]), "another epoch draws anew"


def test_equal_rows_and_pictures_are_one():
    """A symmetric pair's rejected answer is the other picture's right one: one row for both."""
    class Stub:
        def pixels(self, images):
            return [object()], [object()]

        def encode(self, messages, images, pixels):
            return messages

    rows = Rows(Stub())
    assert [rows.add(("a", k), [k], [(("p", i), None) for i in shown]) for k, shown in ((1, [1]), (2, [2, 1]), (1, [1]), (3, []))] == [0, 1, 0, 2]
    assert len(rows.patches) == 2 and rows.shown == [0, 1, 0] and len(rows.encoded) == 3


# --- mixed and bad data -------------------------------------------------------------------------------------------------

def words_only(pair: Pair) -> Pair:
    prompt = tuple({**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in pair.prompt)
    return replace(without(pair, "rejected_images", "rejected_images_answer"), id=f"{pair.id}-words", prompt=prompt, images=())


def test_rows_with_and_without_pictures_are_trained_together(pair_file, pairs):
    mixed = [words_only(pair) if i % 2 else pair for i, pair in enumerate(pairs)]
    path = pair_file(MDPO, rows=mixed, steps=4)
    rows = metrics(run(path))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    collator = trainer_of(path, [f"run_dir={path.parent / 'x'}"]).data_collator
    batch = collator.build(range(12), {"learn": (CHOSEN, REJECTED, OTHER_IMAGE, BLIND)})
    there = {side: place >= 0 for side, place in batch["places"]["learn"].items()}
    assert there[CHOSEN].all() and not there[OTHER_IMAGE].all() and there[OTHER_IMAGE].any()
    assert torch.equal(there[OTHER_IMAGE], there[BLIND])


def test_a_batch_without_any_picture(pair_file, pairs):
    row = metrics(run(pair_file({}, rows=[words_only(pair) for pair in pairs], steps=1)))[0]
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-5) and "log_ratio/none.chosen" not in row


def test_pairs_that_differ_in_their_pictures_only(pair_file, pairs):
    rows = [without(pair, "rejected", "rejected_prior") for pair in pairs]
    row = metrics(run(pair_file({"answer": {}, "conditional": 1.0}, rows=rows, steps=1)))[0]
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-5) and row["log_ratio/other.chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("preference", "changes", "message"), [
    ({"conditional": 1.0, "negative": "crop:2"}, {}, "preference.negative"),
    ({"answer": {"sigmoidal": 1.0}}, {}, "sigmoidal"),
    ({"language_prior": 2.0}, {}, "preference.language_prior"),
    ({"beta": 0.0}, {}, "preference.beta"),
    ({"cache": "kept"}, {}, "cache: keeps what reference: ahead computes"),
    ({"anchor_delta": 0.5}, {}, "anchor_delta: changes nothing without anchor"),
    ({"label_smoothing": 0.1}, {}, "label_smoothing: changes nothing but"),
    ({}, {"lora": {"dropout": 0.1}}, "lora.dropout: must be 0 with a preference"),
    ({}, {"loss": {"weigh": "rows"}}, "loss: is for mixtures of problems"),
    ({}, {"model": {"adapter": "nowhere"}}, "model.adapter: nowhere"),
])
def test_recipes_that_cannot_be_trained(pair_file, preference, changes, message):
    assert message in refusal(pair_file(preference, **changes))


def test_pairs_and_problems_are_not_mistaken_for_each_other(pair_file, recipe_file, twins):
    assert "needs pairs, not problems" in refusal(recipe_file(name="one", preference={}))
    assert "holds pairs, which a recipe without a preference section cannot train on" in refusal(
        pair_file(name="two"), "preference=null")


def test_bad_rows_of_a_pair_file_are_named(pair_file, twins, tmp_path):
    path = pair_file()
    file = twins / f"{tmp_path.name}-recipe.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[2])
    row["rejected"] = row["chosen"]
    file.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n", encoding="utf-8")
    assert f"{file}:3: rejected: is the same as chosen" in refusal(path)


def test_what_is_watched_has_the_same_names_where_no_pair_has_it(pair_file, pairs):
    """Another rank may have pairs with pictures, and all add up the same names."""
    rows = metrics(run(pair_file({}, rows=pairs[:1] + [words_only(pair) for pair in pairs[1:]], steps=1, batch=2, micro_batch=1)))
    trainer = trainer_of(pair_file({}, rows=[words_only(pair) for pair in pairs], name="words", steps=1))
    trainer.train()
    trainer._compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator([{"draw": 0}, {"draw": 1}])), False)
    assert {"log_ratio/none.chosen", "log_ratio/other.chosen", "margin/picture", "margin/blind"} <= set(trainer._sums)
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)


# --- runs ---------------------------------------------------------------------------------------------------------------

def test_a_resumed_run_is_the_same_run(pair_file):
    """With noise-aware terms, which remember a running mean."""
    preference = ALL_TERMS | {"noise_aware": {"weight": 1.0, "memory": 0.9}}
    whole = run(pair_file(preference, name="whole", steps=4, save={"every": 2}))
    path = pair_file(preference, name="cut", steps=4, save={"every": 2})
    import train
    from training.callbacks import MarkComplete

    saved = MarkComplete.on_save

    def stop(self, args, state, control, **kwargs):
        saved(self, args, state, control, **kwargs)
        if state.global_step == 2:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MarkComplete, "on_save", stop)
        with pytest.raises(SystemExit):
            train.main([str(path)])
    cut = run(path, "--resume")
    assert same(weights(whole), weights(cut)) and losses(whole) == losses(cut)
    assert metrics(whole)[-1]["noise_aware/q"] == metrics(cut)[-1]["noise_aware/q"]


def test_micro_batches_do_not_change_the_gradient(pair_file):
    one, two = (run(pair_file(MDPO | {"noise_aware": {"q": 0.5}}, name=f"m{size}", steps=2, batch=4, micro_batch=size)) for size in (4, 1))
    assert losses(one) == pytest.approx(losses(two), abs=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[name], rtol=1e-3, atol=2e-5)


def test_two_processes_train_as_one(pair_file, pairs):
    """The reference computed ahead by both; pairs without pictures on some ranks."""
    preference = MDPO | {"reference": "ahead"}
    changes = dict(rows=[words_only(pair) if i % 3 else pair for i, pair in enumerate(pairs)], steps=3, batch=4, micro_batch=1)
    path = pair_file(preference, name="two", **changes)
    run_in_two_processes(path)
    one, two = run(pair_file(preference, name="one", **changes)), Path(load_recipe(path).run_dir)
    for key in ("loss", "grad_norm", "log_ratio/own.chosen", "margin/answer"):
        assert [row[key] for row in metrics(two)] == pytest.approx([row[key] for row in metrics(one)], rel=1e-4, abs=1e-5), key
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-3, atol=2e-5)


def test_every_logged_step_says_what_happened(pair_file):
    rows = metrics(run(pair_file(MDPO, steps=3, log_every=2)))
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert {"terms/conditional", "terms/anchor", "log_ratio/own.chosen", "log_ratio/own.rejected", "log_ratio/other.chosen",
                "log_ratio/none.chosen", "margin/answer", "margin/picture", "margin/blind", "chosen_below_0", "answer_tokens",
                "hardness", "rewards/margins", "logps/chosen", "lr_language"} <= set(row)
        assert row["answer_tokens"] >= 2 and 0 < row["hardness"] < 1 and 0 <= row["chosen_below_0"] <= 1
