"""Losses and loss weights, by hand."""

import numpy as np
import pytest
import torch

from training.collate import loss_weights
from training.losses import weighted_nll


def test_weighted_nll_by_hand():
    """Row 1: 1 * 0.5 + 2 * 1.0 = 2.5; row 2: 0.25 * 4.0 = 1.0. Together 3.5, over a step that weighs 7: 0.5."""
    log_probs = torch.tensor([[-0.5, -1.0, -9.0], [-4.0, -9.0, -9.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 0.0], [0.25, 0.0, 0.0]])
    loss = weighted_nll(log_probs, weight, 7.0)
    assert loss.shape == () and loss.item() == pytest.approx(0.5)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -weight / 7)


def test_the_step_may_be_cut_anywhere():
    log_probs, weight = -torch.rand(8, 5), torch.rand(8, 5)
    whole = weighted_nll(log_probs, weight, weight.sum())
    parts = sum(weighted_nll(log_probs[i : i + 2], weight[i : i + 2], weight.sum()) for i in range(0, 8, 2))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("total", (0.0, torch.tensor(0.0), torch.tensor(5)))
def test_no_weight_is_a_loss_of_zero_with_a_gradient_of_zero(total):
    log_probs = torch.full((2, 3), -2.0, requires_grad=True)
    loss = weighted_nll(log_probs, torch.zeros(2, 3), total)
    loss.backward()
    assert loss.item() == 0 and torch.equal(log_probs.grad, torch.zeros(2, 3))


def test_half_precision_is_weighed_and_summed_in_single():
    log_probs = torch.full((1, 4096), -1.0, dtype=torch.bfloat16)
    assert weighted_nll(log_probs, torch.full((1, 4096), 1 / 3), 1.0).item() == pytest.approx(4096 / 3, rel=1e-6)


def test_rows_share_a_weight_of_one():
    """Two answers, of 3 tokens and of 1: thirds and a whole. By tokens, all count 1."""
    trained = np.array([0, 1, 1, 1, 0, 0, 1, 0], dtype=bool)
    third = np.float32(1 / 3)
    assert loss_weights(trained, "rows").tolist() == [0, third, third, third, 0, 0, 1, 0]
    assert loss_weights(trained, "tokens").tolist() == [0, 1, 1, 1, 0, 0, 1, 0]
    assert loss_weights(trained, "rows").dtype == loss_weights(trained, "tokens").dtype == np.float32


@pytest.mark.parametrize(
    "trained, expected", (([1, 1], [0.5, 0.5]), ([1, 0, 1], [1, 0, 1]), ([0, 0], [0, 0]), ([1], [1]), ([], []))
)
def test_rows_at_the_edges(trained, expected):
    assert loss_weights(np.array(trained, dtype=bool), "rows").tolist() == expected
