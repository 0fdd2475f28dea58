"""A deterministic order of draws over parts with rates: the number of a draw is enough to resume.

Within a part, units are drawn in shuffled epochs: each once before any comes again. A part that is used up leaves its rate to the
others, in proportion.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from data_prep.problem import View
from data_prep.provenance import file_sha256
from training.strict import RecipeError, find_beside

Rate = Annotated[float, Field(gt=0, le=1)]


class Draw(NamedTuple):
    """What is drawn next: up to `turns` problems that share a picture and facts, in one view; or one pair."""
    source: str
    view: View | None                           # None: a pair, which says itself what is shown
    problems: tuple[int, ...]                   # places in the source's problems, or the place of its pair
    stage: int = 0
    epoch: int = 0                              # how often its source has been gone through in this view
    question: bool = True                       # False: options and instruction are shown without it


@dataclass
class Part:
    """One source in one view."""
    source: str
    view: View | None
    rate: float
    turns: int
    limit: float                                # draws after which it is used up
    order: int                                  # parts with the same number go through their conversations in the same order
    units: list[tuple[int, ...]] = field(repr=False)    # conversations to draw from: places of problems in the source


class Order:
    """A pure function of (mixture file, data, seed, number of the draw). Subclasses read the file and fill `parts`."""

    def __init__(self, path: str | Path, seed: int | Sequence[int]) -> None:
        self.path = Path(path)
        self.seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self.hashes: dict[str, str] = {str(self.path): file_sha256(self.path)}      # of everything the order depends on
        self.parts: list[Part] = []
        self._cached: dict[int, tuple[int, np.ndarray]] = {}

    def file(self, key: str, name: str) -> Path:
        """A data file that the mixture names; its hash is kept."""
        file = find_beside(name, self.path.resolve().parent)
        if file is None:
            raise RecipeError(f"{self.path}: {key}: no such file: {name}")
        self.hashes[name] = file_sha256(file)
        return file

    def check_rates(self, rates: Iterable[float]) -> None:
        """RecipeError unless they sum to 1."""
        if abs((total := sum(rates)) - 1) > 1e-6:
            raise RecipeError(f"{self.path}: the rates sum to {total:.6g}; they must sum to 1")

    def begin(self, draws: int) -> None:
        """Decide, for each of `draws` draws, the part it comes from, and the how-manieth draw of that part it is.

        Raises RecipeError when all parts are used up before.
        """
        chances = np.random.default_rng(list(self.seed)).random(draws)
        rates, limits = (np.array([getattr(part, key) for part in self.parts], dtype=float) for key in ("rate", "limit"))
        entries, begin = np.zeros(draws, dtype=np.int64), 0
        while begin < draws:
            left = limits - np.bincount(entries[:begin], minlength=len(rates))
            edges = np.cumsum(np.where(left > 0, rates, 0.0))
            if edges[-1] == 0:
                raise RecipeError(f"{self.path}: all sources are used up after {begin} of {draws} conversations; raise "
                                  "max_epochs or train for fewer steps")
            entries[begin:] = np.searchsorted(edges / edges[-1], chances[begin:], side="right")
            # As far as the first draw that some part can no longer serve; from there on without that part.
            limited = np.flatnonzero(np.isfinite(left))
            used = [begin + np.flatnonzero(entries[begin:] == i)[int(left[i]):][:1] for i in limited]
            begin = min((int(place[0]) for place in used if place.size), default=draws)
        turns = np.zeros(draws, dtype=np.int64)
        for i in range(len(self.parts)):
            mine = entries == i
            turns[mine] = np.arange(mine.sum())
        self._entries, self._turns = entries, turns

    def __len__(self) -> int:
        return len(self._entries)

    def draw(self, number: int) -> Draw:
        """The conversation with this number, counted from 0 over all ranks. No picture is opened."""
        i = int(self._entries[number])
        part, turn = self.parts[i], int(self._turns[number])
        epoch, place = divmod(turn, len(part.units))
        unit = part.units[self._order(i, epoch)[place]]
        if len(unit) > 1:
            unit = tuple(np.random.default_rng([*self.seed, part.order, epoch, place]).permutation(unit)[:part.turns].tolist())
        return Draw(part.source, part.view, unit, epoch=epoch)

    def _order(self, i: int, epoch: int) -> np.ndarray:
        if self._cached.get(i, (None,))[0] != epoch:
            order = np.random.default_rng([*self.seed, self.parts[i].order, epoch]).permutation(len(self.parts[i].units))
            self._cached[i] = (epoch, order)
        return self._cached[i][1]

    def drawn(self, number: int) -> list[int]:
        """How many of the first `number` draws came from each part."""
        return np.bincount(self._entries[:number], minlength=len(self.parts)).tolist()
