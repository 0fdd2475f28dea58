"""Corrupted inputs, level 0 of LNLN (arXiv 2409.20012): words and parts of pictures that are missing.

Training on them is a method, answering them a measurement (eval.robustness); both take them from here. Every mask is a function
of a seed, never of the batch, the process or what was drawn before. Where the released code (Haoyu-ha/LNLN) differs, the
functions say so.
"""

import dataclasses
import hashlib
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_prep.encode import Encoded

Seed = int | str | Sequence        # numbers and names, nested as one likes: (seed, epoch, "problem id", "text")


def generator(seed: Seed) -> np.random.Generator:
    """Random numbers that depend on the seed alone: not on the process, the order of rows, or what was drawn before.

    Raises:
        TypeError: a seed with something else than integers, strings and sequences of these.
    """
    return np.random.default_rng(np.frombuffer(hashlib.sha256(_spell(seed).encode()).digest(), dtype=np.uint32))


def _spell(seed: Seed) -> str:
    if isinstance(seed, str):
        return repr(seed)
    if isinstance(seed, Sequence):
        return f"({','.join(map(_spell, seed))})"
    return str(operator.index(seed))        # the same for 3 of any integer type


def corruption_rate(*, seed: Seed, chance: float = 0.5, highest: float = 1.0) -> float:
    """The rate of one modality of one sample: U(0, highest) with probability `chance`, else 0. Defaults are the paper's."""
    hit, rate = generator(seed).random(2)
    return float(highest * rate) if hit < chance else 0.0


def dropped(shape: Sequence[int], rate: float | Tensor, *, seed: Seed) -> Tensor:
    """Positions that corruption removes: each by itself with probability `rate`, where its uniform draw is below it.

    For one seed, a higher rate removes what a lower one does and more. The released code draws with one fixed seed at every
    call and redraws rates only now and then, so that most of its masks never change. Give the epoch and the sample in the seed.

    Args:
        shape: of the mask.
        rate: in [0, 1]; a number, or a tensor whose axes are the first ones of the mask, such as (rows,).
        seed: see `generator`.

    Returns:
        Bool tensor.

    Raises:
        ValueError: a rate outside [0, 1].
    """
    rate = torch.as_tensor(rate, dtype=torch.float64).cpu()
    if not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError(f"a corruption rate must lie between 0 and 1, not {rate.tolist()}")
    draws = torch.from_numpy(generator(seed).random(tuple(shape)))
    return draws < rate.reshape(*rate.shape, *[1] * (draws.ndim - rate.ndim))


def replace(tokens: Tensor, dropped: Tensor, *, keep: Tensor | None, missing: float | Tensor) -> Tensor:
    """Tokens with `missing` where they are dropped and not kept.

    Args:
        tokens: (...) ids, or (..., width) features.
        dropped: bool; its axes are the first ones of `tokens`.
        keep: bool, the shape of `dropped`: positions that are never touched, such as system, options, answer; None: none.
        missing: an id, a number, or a (learned) vector (width,).

    Raises:
        ValueError: masks that do not fit.
    """
    if keep is not None and keep.shape != dropped.shape or tokens.shape[:dropped.ndim] != dropped.shape:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}, dropped {tuple(dropped.shape)}, keep "
                         f"{None if keep is None else tuple(keep.shape)}: masks must have the first axes of the tokens")
    gone = dropped.to(tokens.device)
    if keep is not None:
        gone = gone & ~keep.to(tokens.device, torch.bool)
    gone = gone.reshape(*gone.shape, *[1] * (tokens.ndim - gone.ndim))
    return torch.where(gone, torch.as_tensor(missing, dtype=tokens.dtype, device=tokens.device), tokens)


def corrupt(tokens: Tensor, rate: float | Tensor, *, seed: Seed, keep: Tensor | None, missing: float | Tensor) -> Tensor:
    """Tokens of which each, unless kept, is replaced by `missing` with probability `rate`: `dropped`, then `replace`.

    The mask has the shape of `keep`, or of `tokens` without it, and depends on the seed and that shape alone. For masks that
    do not depend on the batch, corrupt each row with a seed of its own.
    """
    return replace(tokens, dropped(tokens.shape if keep is None else keep.shape, rate, seed=seed), keep=keep, missing=missing)


def dropped_cells(grid: Sequence[int], rate: float, *, seed: Seed, merge: int = 2) -> Tensor:
    """Merged cells of one picture that corruption removes: what the language tower sees as one token goes as a whole.

    Args:
        grid: (frames, height, width) in patches, a row of `image_grid_thw`.
        merge: patches per side of a cell.

    Returns:
        (cells,) bool in the order of the picture's tokens.

    Raises:
        ValueError: a grid that cells do not tile.
    """
    frames, height, width = (int(side) for side in grid)
    if height % merge or width % merge:
        raise ValueError(f"a grid of {height} x {width} patches is not tiled by cells of {merge} x {merge}")
    return dropped((frames, height // merge, width // merge), rate, seed=seed).flatten()


def patches_of(cells: Tensor, merge: int = 2) -> Tensor:
    """(patches,) bool, the patches of cells, in the order of `pixel_values`: the patches of a cell follow each other."""
    return cells.repeat_interleave(merge * merge)


def corrupt_row(row: Encoded, *, text: float, image: float, seed: Seed, missing: int, image_id: int, merge: int = 2) -> Encoded:
    """A conversation with missing words and missing parts of its pictures; everything else stays as it is.

    Tokens of facts and questions (`row.open`) become `missing`, each with probability `text`. Of every picture whole merged
    cells, one image token each, become zero rows of `pixel_values`, which is the mean colour, with probability `image`. For one
    seed a higher rate removes what a lower one does and more. Text is counted from its end, where the question stands, so that
    a question loses the same words whatever stands before it.

    Args:
        text, image: rates in [0, 1].
        seed: of this row; text draws by (seed, "text"), the n-th picture, counted from 0, by (seed, "image", n).
        missing: token id that stands for a missing word.
        image_id: token id of image tokens.
        merge: patches per side of a cell.

    Raises:
        ValueError: a rate outside [0, 1], a row that does not know its facts and question, or image tokens that are not the
            cells of its pictures.
    """
    changed: dict[str, np.ndarray] = {}
    if row.open is None:
        raise ValueError("a row that does not know which of its tokens are facts or question cannot be corrupted")
    places = np.flatnonzero(row.open)[::-1].copy()
    ids = row.ids.copy()
    ids[places[dropped(places.shape, text, seed=(seed, "text")).numpy()]] = missing
    if row.grid is not None:
        cells = [dropped_cells(grid, image, seed=(seed, "image", n), merge=merge) for n, grid in enumerate(row.grid.tolist())]
        if (found := sum(map(len, cells))) != (expected := int((row.ids == image_id).sum())):
            raise ValueError(f"{expected} image tokens for pictures of {found} cells of {merge} x {merge} patches")
        gone = patches_of(torch.cat(cells), merge).numpy()
        changed["pixel_values"] = np.where(gone[:, None], row.pixel_values.dtype.type(0), row.pixel_values)
    return dataclasses.replace(row, ids=ids, **changed)
