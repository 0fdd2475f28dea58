"""Sources of preference pairs with rates, in the same deterministic order as mixtures of problems.

    sources:
      twins:
        pairs: data/twins/train.pairs.jsonl
        rate: 1.0
        max_epochs: 3                       # then the source is used up (default: it never is)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as checked
from rich.markup import escape
from rich.table import Table

from data_prep.pair import Pair, read_pairs
from training.config import Preference
from training.order import Draw, Order, Part, Rate
from training.preference import Side, answer_of, applicable
from training.strict import STRICT, RecipeError, build, read_yaml


@checked(config=STRICT, frozen=True)
class PairSource:
    pairs: str                                  # JSONL, relative to the working folder or beside the mixture
    rate: Rate
    max_epochs: Annotated[float, Field(gt=0)] | None = None


@checked(config=STRICT, frozen=True)
class PairMixtureFile:
    sources: dict[str, PairSource]


class PairMixture(Order):
    """The order of pairs of one mixture file, a pure function of (mixture, data, seed, number of the draw).

    Attributes:
        pairs: by source, in the file's order.
        counts: by term of the preference, to how many of all pairs it applies.
    """

    def __init__(self, path: str | Path, *, seed: int | Sequence[int], draws: int, preference: Preference, skip_bad: bool = False,
                 cache: dict[Path, list[Pair]] | None = None) -> None:
        """The arguments are those of Mixture.

        Raises:
            RecipeError: the file is wrong, a file of pairs is missing or used up, or a term of the preference has no pair.
            ProblemError: a file of pairs has a bad row.
        """
        super().__init__(path, seed)
        values = read_yaml(self.path)
        if any(isinstance(source, dict) and "problems" in source for source in (values.get("sources") or {}).values()):
            raise RecipeError(f"{self.path}: sources: a recipe with a preference needs pairs, not problems; "
                              "python -m data_prep.pairs makes pairs from problems")
        spec: PairMixtureFile = build(PairMixtureFile, values, self.path)
        self.check_rates(source.rate for source in spec.sources.values())
        self.pairs: dict[str, list[Pair]] = {}
        cache = {} if cache is None else cache
        for name, source in spec.sources.items():
            file = self.file(f"sources.{name}.pairs", source.pairs)
            if file.resolve() not in cache:
                cache[file.resolve()] = read_pairs(file, verify="header", skip_bad=skip_bad)
            self.pairs[name] = cache[file.resolve()]
            units = [(i,) for i in range(len(self.pairs[name]))]
            limit = float("inf") if source.max_epochs is None else round(source.max_epochs * len(units))
            self.parts.append(Part(name, None, source.rate, 1, limit, len(self.parts), units))
        self.counts = applicable(preference, [pair for pairs in self.pairs.values() for pair in pairs])
        self.begin(draws)

    def pair(self, draw: Draw) -> Pair:
        return self.pairs[draw.source][draw.problems[0]]

    def ids(self, draw: Draw) -> tuple[str, ...]:
        """Of the pair that is drawn."""
        return (self.pair(draw).id,)

    def other(self, draw: Draw) -> Pair | None:
        """The next pair of the same source with as many pictures, none of them shared: what `shuffled` borrows from."""
        pairs, own = self.pairs[draw.source], self.pair(draw)
        for step in range(1, min(len(pairs), 200)):
            other = pairs[(draw.problems[0] + step) % len(pairs)]
            if len(other.images) == len(own.images) and not set(other.images) & set(own.images):
                return other
        return None

    def table(self, encoder=None, sample: int = 100, title: str | None = None) -> Table:
        """Pairs, epochs and tokens per source, and to how many pairs each term applies. Tokens are means over up to `sample`."""
        drawn = self.drawn(len(self))
        notes = "; ".join(f"{name}: {count}" for name, count in self.counts.items())
        table = Table("source", "rate", "pairs", "drawn", "epochs", "tokens", "image tokens", "chosen tokens", "rejected tokens",
                      title=escape(f"{title or f'{self.path}: {len(self)} draws'}; pairs of each term: {notes}"), title_justify="left")
        for part, count in zip(self.parts, drawn):
            tokens = [f"{mean:.0f}" for mean in self.mean_tokens(part, encoder, sample)] if encoder else ["-"] * 4
            table.add_row(escape(part.source), f"{part.rate:g}", str(len(part.units)), str(count), f"{count / len(part.units):.2f}",
                          *tokens)
        return table

    def _sample(self, part: Part, count: int) -> list[Pair]:
        picks = np.linspace(0, len(part.units) - 1, min(count, len(part.units))).astype(int)
        return [self.pairs[part.source][part.units[pick][0]] for pick in picks]

    def mean_tokens(self, part: Part, encoder, sample: int = 100) -> tuple[float, float, float, float]:
        """Tokens of prompt and chosen answer, image tokens among them, and trained tokens of the chosen and the rejected answer."""
        rows = []
        for pair in self._sample(part, sample):
            row = encoder.encode(pair.messages(pair.chosen), pair.load())
            rejected = pair.rejected or pair.rejected_prior
            rows.append((len(row), (row.ids == encoder.image_id).sum(), row.trained.sum(),
                         len(encoder.text_ids(rejected)) + 1 if rejected else 0))
        return tuple(np.mean(rows, axis=0).tolist())

    def side_tokens(self, part: Part, encoder, sides: Sequence[Side], sample: int = 100) -> tuple[float, float, float]:
        """Tokens, image tokens among them and answer tokens of all `sides` of a pair together, over up to `sample` of them."""
        rows = []
        for pair in self._sample(part, sample):
            shown = encoder.encode(pair.messages("-"), pair.load())
            image = int((shown.ids == encoder.image_id).sum())
            words = len(shown) - image - int(shown.trained.sum())
            total = np.zeros(3)
            for side in sides:
                if (answer := answer_of(pair, side)) is not None:
                    said = len(encoder.text_ids(answer)) + 1
                    seen = image if side.picture != "none" else 0
                    total += (words + said + seen, seen, said)
            rows.append(total)
        return tuple(np.mean(rows, axis=0).tolist())

    def pictures(self) -> Iterator[tuple[Path, str, int]]:
        """(folder, path, largest size) of every pair's pictures."""
        for pairs in self.pairs.values():
            yield from ((pair.root, picture, pair.max_pixels) for pair in pairs for picture in (*pair.images, *pair.rejected_images))
