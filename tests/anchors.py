"""Published or worked-out numbers of the balance methods, and the closed form of their inputs; see anchors.json."""

import json
import math
from pathlib import Path

import torch

ANCHORS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def det(shape: tuple[int, ...], a: float, b: float, s: float = 1.0) -> torch.Tensor:
    """s sin(a (i + 1) + b) in row-major order, float64."""
    number = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (s * torch.sin(a * number + b)).reshape(shape)


def numbers(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(found: torch.Tensor, expected, tolerance: float = 1e-12) -> None:
    """Asserts that two tensors agree to the last digits of double precision."""
    expected = numbers(expected).reshape(found.shape)
    torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=tolerance)
