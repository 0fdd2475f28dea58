"""LNLN: corruption masks, gradient reversal, and the losses against known numbers and by hand."""

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from tests.anchors import ANCHORS, det, numbers, same
from training.balance.lnln import (
    adversarial_loss, completeness, completeness_loss, corrupt, corruption_rate, dropped, dropped_cells, generator, hyper_layer,
    mend, mixed, patches_of, reconstruction_loss, replace, reverse_gradient, total_loss)


# -- corruption ------------------------------------------------------------------------------------


def test_a_row_of_text_by_hand():
    """The draws of this seed decide; kept positions stay whatever was drawn."""
    draws = generator(("seed", 3)).random(6)
    keep = torch.tensor([True, False, False, False, False, True])
    tokens = torch.arange(10, 16)
    found = corrupt(tokens, 0.5, seed=("seed", 3), keep=keep, missing=7)
    expected = [7 if draw < 0.5 and not kept else token for token, draw, kept in zip(range(10, 16), draws, keep.tolist())]
    assert found.tolist() == expected and 7 in expected
    assert found.dtype == tokens.dtype and tokens.tolist() == list(range(10, 16)), "what came in is not changed"


def test_rates_of_none_and_all():
    tokens, keep = torch.arange(5000).reshape(50, 100), torch.rand(50, 100) < 0.3
    assert torch.equal(corrupt(tokens, 0.0, seed=1, keep=keep, missing=-1), tokens)
    assert torch.equal(corrupt(tokens, 1.0, seed=1, keep=keep, missing=-1), torch.where(keep, tokens, -1))
    assert torch.equal(corrupt(tokens, 1.0, seed=1, keep=None, missing=-1), torch.full_like(tokens, -1))


@pytest.mark.parametrize("rate", (0.1, 0.5, 0.9))
def test_the_rate_is_met_and_a_higher_one_removes_more_of_the_same(rate):
    """40,000 positions: six standard deviations are 0.015."""
    found = dropped((200, 200), rate, seed="rate")
    assert found.double().mean().item() == pytest.approx(rate, abs=0.015)
    assert not (found & ~dropped((200, 200), min(1.0, rate + 0.1), seed="rate")).any()


def test_masks_repeat_for_one_seed_and_differ_across_epochs_and_samples():
    """The released code drew its masks with one seed for all calls."""
    seeds = [(seed, epoch, name) for seed in (0, 1) for epoch in (0, 1, 2) for name in ("a", "b", "b1")]
    masks = {seed: dropped((64,), 0.5, seed=seed) for seed in seeds}
    torch.rand(3), np.random.rand(3)
    for seed in reversed(seeds):
        assert torch.equal(dropped((64,), 0.5, seed=list(seed)), masks[seed])
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == len(seeds)
    assert torch.equal(dropped((9,), 0.5, seed=np.int64(3)), dropped((9,), 0.5, seed=3)), "whatever kind of integer"
    assert torch.equal(dropped((9,), 0.5, seed=4)[:5], dropped((5,), 0.5, seed=4)), "padding at the end changes nothing"
    for one, two in ((("a", "b"), ("ab",)), ((1, 2), (12,)), ("1", 1), (((1,), 2), ((1, 2),))):
        assert not torch.equal(dropped((64,), 0.5, seed=one), dropped((64,), 0.5, seed=two))
    with pytest.raises(TypeError):
        generator(0.5)


def test_masks_are_the_same_in_another_process():
    """Python's own hash of a string is not."""
    assert generator((0, 2, "id")).integers(10 ** 9) == 997214540


def test_features_with_a_rate_per_row_and_a_learned_vector_in_their_place():
    features = det((2, 3, 4), 0.3, 0.1).requires_grad_()
    vector = torch.full((4,), 9.0, dtype=torch.float64, requires_grad=True)
    keep = torch.zeros(2, 3, dtype=torch.bool)
    found = corrupt(features, torch.tensor([0.0, 1.0]), seed=0, keep=keep, missing=vector)
    assert torch.equal(found[0], features[0]) and torch.equal(found[1], vector.expand(3, 4))
    found.sum().backward()
    assert vector.grad.tolist() == [3.0] * 4 and features.grad[0].min() == 1 and not features.grad[1].any()


def test_masks_that_do_not_fit():
    tokens = torch.arange(6).reshape(2, 3)
    with pytest.raises(ValueError, match="first axes of the tokens"):
        corrupt(tokens, 0.5, seed=0, keep=torch.zeros(3, dtype=torch.bool), missing=0)
    with pytest.raises(ValueError, match="first axes of the tokens"):
        replace(tokens, torch.zeros(2, 3, dtype=torch.bool), keep=torch.zeros(2, dtype=torch.bool), missing=0)
    for rate in (-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0])):
        with pytest.raises(ValueError, match="between 0 and 1"):
            corrupt(tokens, rate, seed=0, keep=None, missing=0)


def test_legacy_masks():
    """The released masks (drawn by numpy's legacy generator, here in `legacy`) put through `replace`, which draws nothing."""
    known = ANCHORS["LNLN_masks"]

    def legacy(real):
        np.random.seed(1111)
        return (np.random.uniform(size=real.shape) > np.array([[0.5], [0.9]])) * real

    ids = torch.tensor([[101, 7, 8, 9, 102, 0, 0], [101, 5, 6, 102, 0, 0, 0]])
    real = (ids != 0).numpy().astype(int)
    ends = torch.zeros(2, 7, dtype=torch.bool)
    ends[:, 0] = ends[0, 4] = ends[1, 3] = True
    gone = torch.from_numpy(legacy(real) == 0)
    text = replace(ids, gone, keep=ends | (ids == 0), missing=100)
    assert text.tolist() == known["text"] and (text != 100).mul(ids != 0).double().tolist() == known["text_mask"]
    audio = legacy(np.array([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert audio.tolist() == known["audio_mask"]
    features = replace(torch.ones(2, 4, 2), torch.from_numpy(audio == 0), keep=None, missing=0.0)
    assert features[..., 0].tolist() == features[..., 1].tolist() == known["audio_mask"]


def test_the_rate_of_a_sample():
    """Half of the samples stay whole; the others' rates are uniform: mean 1/2, a quarter below 1/4."""
    rates = np.array([corruption_rate(seed=(0, i)) for i in range(4000)])
    hit = rates[rates > 0]
    assert len(hit) / 4000 == pytest.approx(0.5, abs=0.04) and hit.mean() == pytest.approx(0.5, abs=0.04)
    assert (hit < 0.25).mean() == pytest.approx(0.25, abs=0.05) and hit.max() <= 1
    assert corruption_rate(seed=1, chance=0.0) == 0 and 0 < corruption_rate(seed=1, chance=1.0, highest=0.2) <= 0.2


# -- pictures --------------------------------------------------------------------------------------


def test_cells_are_dropped_as_wholes():
    """4 x 6 patches are 2 x 3 cells of 4 patches each."""
    cells = dropped_cells((1, 4, 6), 0.5, seed="cells")
    assert cells.shape == (6,) and 0 < cells.sum() < 6
    patches = patches_of(cells)
    assert torch.equal(patches.reshape(6, 4).any(-1), cells) and torch.equal(patches.reshape(6, 4).all(-1), cells)
    assert dropped_cells(torch.tensor([2, 4, 4]), 1.0, seed=0).all() and dropped_cells((2, 4, 4), 0.3, seed=0).shape == (8,)
    with pytest.raises(ValueError, match="3 x 4 patches is not tiled"):
        dropped_cells((1, 3, 4), 0.5, seed=0)


def test_the_patches_of_a_cell_are_what_the_processor_puts_there():
    """Painting one cell of a picture white changes the four rows of `pixel_values` that `patches_of` names, and no other."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 64)
    black = np.zeros((2 * 28, 3 * 28, 3), dtype=np.uint8)
    painted = black.copy()
    painted[28:56, 28:56] = 255                                     # second row of cells, second of three columns: cell 4
    before, after = (processor(Image.fromarray(pixels), return_tensors="pt") for pixels in (black, painted))
    grid = after["image_grid_thw"][0].tolist()
    assert grid == [1, 4, 6]
    cells = torch.zeros(6, dtype=torch.bool)
    cells[4] = True
    changed = (before["pixel_values"] != after["pixel_values"])
    assert torch.equal(changed.any(-1), patches_of(cells)) and torch.equal(changed.all(-1), patches_of(cells))


# -- losses ----------------------------------------------------------------------------------------


def test_known_losses():
    known = ANCHORS["LNLN_loss"]
    terms = {
        "completeness": completeness_loss(det((2, 1), 0.7, 0.1).sigmoid(), numbers([[0.3], [0.0]])),
        "adversarial": adversarial_loss(det((8, 2), 0.31, 0.2), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])),
        "reconstruction": reconstruction_loss(det((2, 6, 3), 0.11, 0.3), det((2, 6, 3), 0.13, 0.4)),
        "task": mse_loss(det((2, 1), 0.5, 0.6), numbers([[1.2], [-0.4]]))}
    for name, term in terms.items():
        assert term.item() == pytest.approx(known[name], abs=1e-14)
    weights = {"completeness": 0.9, "adversarial": 0.8, "reconstruction": 0.1, "task": 1.0}
    assert total_loss(terms, weights).item() == pytest.approx(known["total"], abs=1e-14)
    assert total_loss(list(terms.values()), list(weights.values())).item() == pytest.approx(known["total"], abs=1e-14)


def test_a_total_leaves_out_what_has_no_weight():
    x = numbers([2.0]).requires_grad_()
    terms = {"a": x.sum(), "b": (x / 0).sum()}
    total = total_loss(terms, {"a": 0.5, "b": 0.0})
    total.backward()
    assert total.item() == 1.0 and x.grad.tolist() == [0.5], "not even an infinite one"
    assert total_loss(terms, {"a": 0, "b": 0}).item() == 0
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}):
        with pytest.raises(ValueError, match="weights for"):
            total_loss(terms, weights)
    with pytest.raises(ValueError, match="weights for"):
        total_loss({}, {})


def test_completeness_and_targets():
    assert completeness(0.3) == pytest.approx(0.7) and completeness(numbers([0, 1])).tolist() == [1, 0]
    made, target = (det((2, 3), 0.2 + k, 0.1).requires_grad_() for k in range(2))
    reconstruction_loss(made, target).backward()
    assert target.grad is None and made.grad.any()


# -- the mended feature ----------------------------------------------------------------------------


def test_reversal():
    x = det((3,), 0.4, 0.1).requires_grad_()
    y = reverse_gradient(x, 0.5)
    assert torch.equal(y, x)
    (y * numbers([1, 2, 3])).sum().backward()
    assert x.grad.tolist() == [-0.5, -1.0, -1.5]
    x.grad = None
    reverse_gradient(reverse_gradient(x)).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]


def test_mixture_by_hand():
    """w = 1/4: three quarters of the proxy. Complete rows are left alone."""
    proxy, dominant = numbers([[[4, 8]], [[4, 8]]]), numbers([[[0, 4]], [[1, 2]]])
    for w in (numbers([0.25, 1.0]), numbers([[0.25], [1.0]])):
        assert mixed(proxy, dominant, w).tolist() == [[[3, 7]], [[1, 2]]]


@pytest.mark.parametrize("grl_on_proxy", (False, True))
def test_where_the_gradient_is_reversed(grl_on_proxy):
    """w = 1/4. At the discriminator's input: the task moves both as it should, the adversary both the other way. As released:
    the task moves the proxy the wrong way, the dominant feature the right way, and the adversary reverses the proxy alone."""
    proxy, dominant = numbers([[[4, 8]]]).requires_grad_(), numbers([[[0, 4]]]).requires_grad_()
    found, seen = mend(proxy, dominant, numbers([0.25]), grl_on_proxy=grl_on_proxy)
    assert found.tolist() == seen.tolist() == [[[3, 7]]]
    task = torch.autograd.grad(found.sum(), (proxy, dominant), retain_graph=True)
    adversary = torch.autograd.grad(seen.sum(), (proxy, dominant))
    signs = (-1, 1, -1, 1) if grl_on_proxy else (1, 1, -1, -1)
    for gradient, sign, size in zip((*task, *adversary), signs, (0.75, 0.25) * 2):
        assert gradient.tolist() == [[[sign * size] * 2]]


def test_known_hyper_layer():
    known = ANCHORS["LNLN_hyper_layer"]
    weights = {}
    for i, name in enumerate(known["parameters"]):
        shape = (8,) if name.endswith("bias") else (8, 8)
        weights[name.replace("to_out.0", "to_out").replace(".weight", "")] = det(shape, 0.11 + 0.03 * i, 0.2 * i, 0.3)
    inputs = [det((1, 2, 8), 0.2 + 0.1 * k, 0.1 * k) for k in range(4)]
    same(hyper_layer(*inputs, weights, heads=2), known["out"])
