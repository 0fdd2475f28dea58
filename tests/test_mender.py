"""The mender: places that are filled in the prompt, in every way a model is asked, and what its losses see."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, mse_loss
from transformers import Qwen2_5_VLForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head

from data_prep.corrupt import corrupt_row
from data_prep.encode import Encoder
from data_prep.problem import Words
from modeling.mender import Block, Settings, attach, padded, settings_for
from training.balance.lnln import losses
from training.model import add_answer_logits, add_shared_pictures

from .conftest import assistant, picture

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=r".*(q_proj|qkv|merger\.mlp\.0)")


@pytest.fixture(scope="module")
def slotted(tiny):
    encoder = Encoder(tiny)
    encoder.slots = 8
    return encoder


@pytest.fixture
def base(tiny):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32").eval()


@pytest.fixture
def mended(base, slotted):
    """A model with a mender whose weights are far from where they start."""
    return shaken(base, slotted)


def shaken(base, encoder, **changes):
    mender = attach(base, settings(base, encoder, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mender.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return base


def settings(base, encoder, **changes):
    return settings_for(base.config, slot_id=encoder.slot_id, end_id=encoder.end_id, **{"scale": 0.5, **changes})


def question(words, *sizes, answer="red"):
    content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": Words(words, [(0, len(words))])}]
    return [{"role": "user", "content": content}, assistant(answer)], tuple(picture(*size) for size in sizes)


def rows_of(encoder):
    """A picture, no picture, two pictures and a second turn."""
    two = question("Same?", (56, 84), (28, 56))
    two[0].extend(question("Sure? How sure is that?")[0])
    return [encoder.encode(*one) for one in (question("What colour is the shape at A?", (84, 56)),
                                             question("Facts: A red circle.\nWhat is at A?"), two)]


def missing(encoder, row, text, image, seed=0):
    return corrupt_row(row, text=text, image=image, seed=seed, missing=encoder.missing_id, image_id=encoder.image_id)


def logits(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more).logits


# -- what is filled, and when ----------------------------------------------------------------------


def test_a_model_without_slots_in_its_input_is_left_alone(encoder, tiny, base, mended):
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32").eval()
    batch = encoder.batch(rows_of(encoder))
    assert torch.equal(logits(mended, batch), logits(plain, batch))


def test_a_new_mender_leaves_the_placeholders_as_they_are(slotted, base):
    batch = slotted.batch(rows_of(slotted))
    before = logits(base, batch)
    mender = attach(base, settings(base, slotted))
    torch.testing.assert_close(logits(base, batch), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        mender.out.weight += 0.1
    assert (logits(base, batch) - before).abs().max() > 1e-3


def test_the_slots_hold_what_the_mender_says(slotted, mended):
    """Embeddings put there by hand give the same logits."""
    batch = slotted.batch(rows_of(slotted))
    ids, inner = batch["input_ids"], mended.model
    with torch.no_grad():
        embeddings = inner.get_input_embeddings()(ids)
        pictures = torch.cat(tuple(inner.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output))
        added = mended.mender(ids, embeddings, pictures)
        by_hand = embeddings.clone()
        for row in range(3):
            places = np.flatnonzero(ids[row].numpy() == slotted.slot_id)
            by_hand[row, places] += added[row]
        expected = logits(mended, batch)
        vars(inner)["mender"] = replaced = copy.copy(mended.mender)
        replaced.slot_id = -1                                     # so that the hook finds nothing to do
        torch.testing.assert_close(logits(mended, {**batch, "inputs_embeds": by_hand}), expected, rtol=0, atol=1e-5)
        assert (logits(mended, batch) - expected).abs().max() > 1e-3
    assert added.shape == (3, 8, 32) and len({tuple(row.flatten().tolist()) for row in added}) == 3


def test_padding_changes_nothing(slotted, mended):
    rows = rows_of(slotted)
    alone = [logits(mended, slotted.batch([row]))[0] for row in rows]
    for side in ("left", "right"):
        batch = slotted.batch(rows, side=side)
        found = logits(mended, batch)
        for i in range(len(rows)):
            torch.testing.assert_close(found[i][batch["attention_mask"][i].bool()], alone[i], rtol=0, atol=1e-4)


def test_what_is_read_is_the_turn_that_the_slots_stand_in(slotted, mended):
    """Words of the first turn and pictures are; answers and later turns are not."""
    def added(*turns, images=()):
        messages = [message for turn in turns for message in turn]
        batch = slotted.batch([slotted.encode(messages, images)])
        found = []
        handle = mended.mender.register_forward_hook(lambda *args: found.append(args[2]))
        logits(mended, batch)
        handle.remove()
        return found[0]

    first, images = question("Which one?", (56, 56))
    start = added(first, images=images)
    torch.testing.assert_close(added(first[:1] + [assistant("a long answer")], images=images), start, rtol=0, atol=1e-5)
    torch.testing.assert_close(added(first, question("And now?")[0], images=images), start, rtol=0, atol=1e-5)
    assert (added(question("Which two?", (56, 56))[0], images=images) - start).abs().max() > 1e-4
    assert (added(first, images=(picture(56, 56, seed=5),)) - start).abs().max() > 1e-4
    assert added(question("")[0]).isfinite().all(), "neither words nor pictures"


def test_every_way_to_ask_fills_the_slots(slotted, mended):
    """Logits of answers, TRL's fused head, shared pictures, and PEFT around it all."""
    batch = slotted.batch(rows_of(slotted))
    labels = batch["input_ids"].clone()
    expected = logits(mended, batch)
    wanted = expected[:, :-1].flatten(0, 1)
    alone = slotted.batch([rows_of(slotted)[0]] * 2)
    alone_logits = logits(mended, alone)
    add_fused_lm_head(mended)
    add_answer_logits(mended)
    add_shared_pictures(mended)
    model = get_peft_model(mended, LORA).eval()          # LoRA's B is 0: the same model
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, batch, labels=labels, answer_logits=True), wanted, rtol=0, atol=1e-5)
    with torch.no_grad():
        fused = model(**batch, labels=labels, fused_lm_head=True).log_probs
    own = expected[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused, own, rtol=0, atol=1e-4)
    patches = len(alone["pixel_values"]) // 2
    shared = {**alone, "pixel_values": alone["pixel_values"][:patches], "image_grid_thw": alone["image_grid_thw"][:1],
              "pictures": torch.tensor([0, 0])}
    torch.testing.assert_close(logits(model, shared), alone_logits, rtol=0, atol=1e-5)


def test_pictures_are_encoded_once(slotted, mended):
    calls = []
    mended.model.visual.register_forward_hook(lambda *args: calls.append(1))
    logits(mended, slotted.batch(rows_of(slotted)))
    assert len(calls) == 1


def test_generation_goes_on_as_scoring_does(slotted, mended):
    """With a cache the slots are in the first pass alone; without one, in every pass."""
    rows = [slotted.encode(messages[:1], images, generate=True) for messages, images in (
        question("What colour is the shape at A?", (84, 56)), question("Which?"))]
    batch = slotted.batch(rows, side="left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": slotted.pad_id}
    said = mended.generate(**batch, **options)
    assert torch.equal(said, mended.generate(**batch, **options, use_cache=False))
    start = batch["input_ids"].shape[1]
    for i, row in enumerate(rows):
        ids = row.ids
        for token in said[i, start:].tolist():
            one = slotted.batch([replace(row, ids=ids, trained=np.zeros(len(ids), bool))])
            assert int(logits(mended, one)[0, -1].argmax()) == token
            ids = np.append(ids, token)


def test_bf16_and_float32_weights(slotted, mended):
    rows = rows_of(slotted)
    expected = logits(mended, slotted.batch(rows))
    for part in (mended.model, mended.lm_head):
        part.to(torch.bfloat16)
    assert mended.mender.out.weight.dtype == torch.float32
    found = logits(mended, slotted.batch(rows))
    assert found.dtype == torch.bfloat16 and (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    mended.mender.to(torch.bfloat16)
    assert logits(mended, slotted.batch(rows)).isfinite().all()


# -- training --------------------------------------------------------------------------------------


def watched(model, encoder, rows, text=0.5, image=0.5):
    """A forward pass of corrupted rows, whose complete ones are known; the task's loss and what was seen."""
    torn = [missing(encoder, row, text, image, seed=("row", n)) for n, row in enumerate(rows)]
    whole, batch = encoder.batch(rows), encoder.batch(torn)
    model.mender.complete = whole["input_ids"], whole.get("pixel_values")
    return model(**batch).logits.float().log_softmax(-1)[..., 0].sum(), model.mender.seen, whole, batch


@pytest.mark.parametrize("places", ((0, 1, 2), (1,)), ids=("pictures", "no pictures"))
@pytest.mark.parametrize("complete", (True, False))
@pytest.mark.parametrize("mends", (True, False))
def test_every_parameter_has_a_gradient(slotted, base, places, complete, mends):
    model = shaken(base, slotted, mends=mends).requires_grad_(False)
    model.mender.requires_grad_(True)
    rows = [rows_of(slotted)[i] for i in places]
    if complete:
        task, seen, *_ = watched(model, slotted, rows)
        (task + sum(losses(seen, torch.full((len(rows),), 0.5)).values())).backward()
    else:
        model(**slotted.batch(rows)).logits.sum().backward()
    lacking = [name for name, parameter in model.mender.named_parameters() if parameter.grad is None]
    assert not lacking
    assert all(parameter.grad.isfinite().all() for parameter in model.mender.parameters())
    moved = {name.split(".")[0] for name, parameter in model.mender.named_parameters() if parameter.grad.any()}
    expected = {"text_in", "text_reader", "image_reader", "estimator"} | ({"out"} if mends else set())
    if complete:
        expected |= {"discriminator", "text_reconstruction"} | ({"image_reconstruction"} if 0 in places else set())
    if 0 in places:
        expected |= {"image_in"}
    if not mends and not complete:
        expected = set()
    assert moved == expected


def test_gradients_are_the_same_with_checkpointing(slotted, tiny):
    """Which asks the embeddings for a gradient, so that frozen ones have one."""
    found = []
    for checkpointing in (False, True):
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32").requires_grad_(False)
        shaken(base, slotted)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        task, seen, *_ = watched(base.train(), slotted, rows_of(slotted))
        (task + sum(losses(seen, torch.full((3,), 0.5)).values())).backward()
        found.append([parameter.grad for parameter in base.mender.parameters()])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_what_is_seen_is_of_the_complete_rows(slotted, mended):
    rows = rows_of(slotted)
    _, seen, whole, batch = watched(mended, slotted, rows)
    assert mended.mender.complete is None, "one pass takes it"
    assert seen.w.shape == (3,) and ((seen.w > 0) & (seen.w < 1)).all()
    assert seen.scores.shape == (48, 2) and seen.is_mended.tolist() == [True] * 24 + [False] * 24
    features = mended.model.get_image_features
    with torch.no_grad():
        pictures = torch.cat(tuple(features(whole["pixel_values"], whole["image_grid_thw"]).pooler_output))
        torn = torch.cat(tuple(features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output))
        torch.testing.assert_close(seen.image[1], pictures, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen.image[0], mended.mender.image_reconstruction(torn), rtol=0, atol=1e-5)
    assert not any(pair[1].requires_grad for pair in (seen.text, seen.image)) and seen.text[0].requires_grad
    # Rows that lost nothing are their own targets.
    _, same, *_ = watched(mended, slotted, rows, 0.0, 0.0)
    torch.testing.assert_close(same.text[1], seen.text[1], rtol=0, atol=1e-6)
    mended.mender.text_reconstruction = mended.mender.image_reconstruction = torch.nn.Identity()
    _, same, *_ = watched(mended, slotted, rows, 0.0, 0.0)
    for pair in (same.text, same.image):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


def test_losses_by_hand(slotted, mended):
    _, seen, *_ = watched(mended, slotted, rows_of(slotted))
    rate = torch.tensor([0.25, 0.0, 1.0])
    found = losses(seen, rate)
    w = seen.w.tolist()
    assert found["cc"].item() == pytest.approx(((w[0] - 0.75) ** 2 + (w[1] - 1) ** 2 + w[2] ** 2) / 3, rel=1e-5)
    labels = torch.tensor([1] * 24 + [0] * 24)
    torch.testing.assert_close(found["adv"], cross_entropy(seen.scores, labels))
    torch.testing.assert_close(found["rec"], (mse_loss(*seen.text) + mse_loss(*seen.image)) / 2)
    torch.testing.assert_close(losses(replace(seen, image=None), rate)["rec"], mse_loss(*seen.text))


def test_the_adversary_is_reversed_where_the_setting_says(tiny, slotted):
    """Of the discriminator's loss on mended tokens: turned round for the words' features, and as released not for these but
    for the proxy; the task reaches the proxy turned round as released only."""
    found = {}
    for released in (False, True):
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32").eval()
        model = shaken(base, slotted, grl_on_proxy=released)
        task, seen, *_ = watched(model, slotted, rows_of(slotted))
        mended_alone = cross_entropy(seen.scores[:24], torch.ones(24, dtype=torch.long))
        parameters = model.mender.text_reader.queries, model.mender.image_reader.queries, model.mender.discriminator[0].weight
        found[released] = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                           for loss in (mended_alone, task)]
    for (paper, released), signs in zip(zip(found[False], found[True]), ((-1, 1, 1), (1, -1, None))):
        for one, other, sign in zip(paper, released, signs):
            assert one.any() if sign else True
            torch.testing.assert_close(other, one if sign is None else sign * one, rtol=1e-4, atol=1e-7)


def test_w_learns_how_much_is_missing(slotted, base):
    """Rates are told apart after a few steps on the estimate alone, of sentences that were not trained on."""
    mender = attach(base.requires_grad_(False), settings(base, slotted))
    optimizer = torch.optim.Adam(mender.estimator.parameters(), 3e-3)
    words = "red blue green yellow black white circle square triangle cross one two three four".split()
    rng = np.random.default_rng(0)

    def step(rates, numbers):
        rows = [slotted.encode(question(" ".join(rng.permutation(words)))[0]) for _ in rates]
        torn = slotted.batch([missing(slotted, row, rate, 0.0, seed=n) for n, row, rate in zip(numbers, rows, rates)])
        ids, embed = torn["input_ids"], base.get_input_embeddings()
        shown = mender._words(ids)
        return mender.estimator(mender.text_in(padded(embed(ids)[shown], shown.sum(1).tolist())[0]),
                                padded(embed(ids)[shown], shown.sum(1).tolist())[1])

    for number in range(40):
        rates = rng.random(8)
        optimizer.zero_grad()
        mse_loss(step(rates, range(8 * number, 8 * number + 8)), torch.tensor(1 - rates, dtype=torch.float32)).backward()
        optimizer.step()
    with torch.no_grad():
        low, high = step([0.9] * 8, range(1000, 1008)), step([0.0] * 8, range(8))
    assert low.mean() < 0.35 and high.mean() > 0.75


# -- settings and errors ---------------------------------------------------------------------------


def test_a_mender_is_its_settings_and_its_weights(slotted, mended, tiny):
    other = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32").eval()
    attach(other, mended.mender.settings).load_state_dict(mended.mender.state_dict())
    batch = slotted.batch(rows_of(slotted))
    assert torch.equal(logits(other, batch), logits(mended, batch))
    names = [name for name, _ in other.named_parameters() if "mender" in name]
    assert names and all(name.startswith("mender.") for name in names), "one name each, outside the towers"


def test_initial_weights_depend_on_the_settings_alone(slotted, tiny):
    states = []
    for noise, seed in ((1, 0), (2, 0), (1, 3)):
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype="float32")
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        states.append(attach(base, settings(base, slotted, seed=seed)).state_dict()["text_reader.queries"])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_copy_of_the_model_has_a_mender_of_its_own(slotted, mended):
    batch = slotted.batch(rows_of(slotted))
    twin = copy.deepcopy(mended)
    with torch.no_grad():
        mended.mender.out.weight.zero_()
    assert twin.mender is not mended.mender and (logits(twin, batch) - logits(mended, batch)).abs().max() > 1e-3


def test_settings_that_do_not_fit(slotted, base):
    good = settings(base, slotted)
    for change, message in (({"width": 64}, "width: 64, but the model's embeddings have 32"),
                            ({"inner": 30}, "inner: 30 is not a multiple of heads, 4"),
                            ({"slots": 0}, "slots: must be at least 1, not 0"), ({"depth": 2}, "'depth'")):
        with pytest.raises(ValueError, match=f"mender: .*{message}"):
            attach(base, {**good, **change})
    with pytest.raises(ValueError, match="'width'"):
        attach(base, {key: value for key, value in good.items() if key != "width"})
    attach(base, good)
    with pytest.raises(ValueError, match="mender: the model has one"):
        attach(base, good)


def test_inputs_that_do_not_fit(slotted, encoder, mended):
    rows = rows_of(slotted)
    with pytest.raises(ValueError, match=r"rows with \[0, 8\] slots, but every row has 8"):
        logits(mended, slotted.batch([rows[0], rows_of(encoder)[1]]))
    batch = slotted.batch(rows)
    mended.mender.complete = batch["input_ids"][:2], None
    with pytest.raises(ValueError, match=r"complete rows of shape \(2, "):
        logits(mended, batch)
    mended.mender.complete = batch["input_ids"], None
    with pytest.raises(ValueError, match="complete pictures of 0 image tokens, 18 in the batch"):
        logits(mended, batch)


def test_a_block_by_hand():
    """Weights of 0 but for the value and the way out: each token gets the mean of the normed keys that are shown."""
    block = Block(4, 2)
    with torch.no_grad():
        for linear in (block.query, block.key, block.mlp[2]):
            linear.weight.zero_(), linear.bias.zero_()
        for linear in (block.value, block.out):
            linear.weight.copy_(torch.eye(4)), linear.bias.zero_()
        x, keys = torch.ones(1, 2, 4), torch.tensor([[[1.0, -1, 1, -1], [-1, -1, 1, 1], [9, 7, 5, 3]]])
        found = block(x, keys, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.0, 2.0, 1.0]] * 2]), rtol=0, atol=1e-4)


def test_default_settings_are_narrow():
    assert Settings(width=2048, slot_id=1, end_id=2, image_id=3).inner == 128
