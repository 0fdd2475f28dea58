"""From numbers of draws to tensors, for preference pairs: one row per side, every distinct picture once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep import negatives
from data_prep.encode import Encoded, Encoder
from data_prep.pair import Pair
from data_prep.problem import ProblemError
from training.collate import IGNORED
from training.config import Recipe, RecipeError
from training.order import Draw
from training.preference import ANSWERS, OWN, Side, answer_of, has, needed, watched


class Rows:
    """Rows of a batch as they come together: equal ones are one, and so are equal pictures."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.encoded: list[Encoded] = []
        self.places: dict[tuple, int] = {}              # of a row, by what it shows and says
        self.patches: list[np.ndarray] = []             # of each distinct picture
        self.grids: list[np.ndarray] = []
        self.pictures: dict[tuple, int] = {}            # places in them
        self.shown: list[int] = []                      # for each slot of all rows

    def add(self, key: tuple, messages: list[dict], images: Sequence[tuple[tuple, Image.Image]]) -> int:
        """Place of the row with this key. images: (key, picture) of each."""
        if key not in self.places:
            for name, image in images:
                if name not in self.pictures:
                    patches, grids = self.encoder.pixels((image,))
                    self.pictures[name] = len(self.patches)
                    self.patches += patches
                    self.grids += grids
            slots = [self.pictures[name] for name, _ in images]
            known = [self.patches[i] for i in slots], [self.grids[i] for i in slots]
            self.encoded.append(self.encoder.encode(messages, tuple(image for _, image in images), pixels=known))
            self.shown += slots
            self.places[key] = len(self.places)
        return self.places[key]

    def batch(self) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, mm_token_type_ids, labels: (rows, tokens); pictures: (slots,) as model.add_shared_pictures
        takes it; pixel_values and image_grid_thw of the distinct pictures, where there are any."""
        bare = [Encoded(row.ids, row.trained, None, None) for row in self.encoded]
        batch = self.encoder.batch(bare)
        trained = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        for i, row in enumerate(self.encoded):
            # The last turn is the answer; earlier ones of the assistant belong to the prompt.
            ends = np.flatnonzero(row.trained & ~np.concatenate([[False], row.trained[:-1]]))
            trained[i, ends[-1]: len(row)] = torch.from_numpy(row.trained[ends[-1]:])
        batch["labels"] = batch["input_ids"].masked_fill(~trained, IGNORED)
        batch["pictures"] = torch.tensor(self.shown, dtype=torch.long)
        if self.patches:
            batch["pixel_values"] = torch.from_numpy(np.concatenate(self.patches))
            batch["image_grid_thw"] = torch.from_numpy(np.stack(self.grids))
        return batch


class PairCollator:
    """Draws to a batch:

        draws        their numbers
        learn        rows of the sides that the terms need, see Rows.batch
        watch        rows of the sides that are only logged; empty but in steps that are
        places       by set and side, (pairs,): the row of each pair's side, -1 where it has none
        reference    by side, (pairs,): log-probabilities under the reference, where they were computed ahead
        hardness     (pairs,): how far the rejected picture is from the pair's own, see data_prep.negatives; NaN where there is none

    Pictures are opened and negatives drawn here, once per (seed, pair, epoch): policy and reference see the same pixels.

    Args:
        plan: gives a draw by its number, and its stage's mixture of pairs.
    """

    def __init__(self, plan: Any, encoder: Encoder, recipe: Recipe) -> None:
        """Raises RecipeError when preference.negative is no spec."""
        self.plan, self.encoder, self.recipe = plan, encoder, recipe
        self.preference = recipe.preference
        self.negative = None
        if self.preference.negative != OWN:
            try:
                self.negative = negatives.parse(self.preference.negative)
            except ValueError as error:
                raise RecipeError(f"preference.negative: {error}") from error
        self.needed, self.watched = needed(self.preference), watched(self.preference)
        self.reference: dict[Side, torch.Tensor] | None = None      # (draws,) each

    def logged(self, number: int) -> bool:
        """Whether the optimizer step of a draw is one that is logged."""
        step = number // self.recipe.batch + 1
        return step == 1 or step % self.recipe.log_every == 0

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        numbers = [row["draw"] for row in rows]
        sets = {"learn": self.needed, "watch": self.watched if any(map(self.logged, numbers)) else ()}
        return self.build(numbers, sets)

    def build(self, numbers: Sequence[int], sets: dict[str, tuple[Side, ...]]) -> dict[str, Any]:
        """The batch of some draws, with the given sides in each set."""
        draws = [self.plan.draw(number) for number in numbers]
        opened = [Opened(self, draw) for draw in draws]
        batch: dict[str, Any] = {"draws": list(numbers), "places": {}}
        for name, sides in sets.items():
            rows = Rows(self.encoder)
            batch["places"][name] = {side: torch.tensor([one.place(rows, number, side) for number, one in enumerate(opened)])
                                     for side in sides}
            batch[name] = rows.batch() if rows.encoded else {}
        batch["hardness"] = torch.tensor([one.hardness for one in opened])
        if self.reference is not None:
            batch["reference"] = {side: values[list(numbers)] for side, values in self.reference.items()}
        return batch


class Opened:
    """A drawn pair with its pictures, opened when they are needed."""

    def __init__(self, collator: PairCollator, draw: Draw) -> None:
        self.collator, self.draw = collator, draw
        self.mixture = collator.plan.stages[draw.stage].mixture
        self.pair: Pair = self.mixture.pair(draw)
        self._pictures: dict[str, tuple[Image.Image, ...]] = {"none": ()}
        self.hardness = float("nan")

    def place(self, rows: Rows, number: int, side: Side) -> int:
        """The row of a side, or -1. number: of the pair in its batch."""
        if not has(self.pair, side, self.collator.preference.negative):
            return -1
        answer = answer_of(self.pair, side)
        messages = self.pair.messages(answer)
        if side.picture == "none":
            messages = [{**message, "content": [part for part in message["content"] if part["type"] != "image"]}
                        if not isinstance(message["content"], str) else message for message in messages]
        row = rows.add((number, side.picture, answer), messages, list(zip(self._names(number, side.picture),
                                                                          self.pictures(side.picture))))
        if (length := len(rows.encoded[row])) > (longest := rows.encoder.longest):
            raise ProblemError(f"{self.pair.id}: {ANSWERS[side.answer]}: {length} tokens together, and the model has positions for "
                               f"{longest}: lower model.max_pixels, or leave the pair out")
        return row

    def _names(self, number: int, picture: str) -> list[tuple]:
        """What tells pictures apart: files are the same in whatever pair they occur."""
        if picture == "other" and self.collator.negative is not None:
            return [(number, i) for i in range(len(self.pair.images))]
        names = {"own": self.pair.images, "other": self.pair.rejected_images, "none": ()}[picture]
        return [(str(self.pair.root), name) for name in names]

    def pictures(self, which: str) -> tuple[Image.Image, ...]:
        if which not in self._pictures:
            self._pictures[which] = self.pair.load() if which == "own" else self._rejected()
            if which == "other":
                pairs = list(zip(self.pictures("own"), self._pictures["other"]))
                self.hardness = sum(negatives.hardness(own, other) for own, other in pairs if own.size == other.size) / len(pairs)
        return self._pictures[which]

    def _rejected(self) -> tuple[Image.Image, ...]:
        negative, pair = self.collator.negative, self.pair
        if negative is None:
            return pair.load("rejected_images")
        other = None
        if negative.needs_other:
            partner = self.mixture.other(self.draw)
            if partner is None:
                raise ProblemError(f"{pair.id}: preference.negative: no other pair has pictures to borrow")
            other = partner.load()
        key = f"{self.collator.recipe.seed} {pair.id} {self.draw.stage} {self.draw.epoch}"
        return negative.make(self.pictures("own"), key=key, other=other)
