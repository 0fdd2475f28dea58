"""LNLN on one model: corrupted conversations, and from level 1 on the modules that judge and mend them (modeling.mender)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data_prep.corrupt import corrupt_row, corruption_rate
from data_prep.encode import MISSING_TOKEN, Encoded, Encoder
from training.balance.hook import Method, Showing, World
from training.balance import lnln
from training.balance.settings import SIDES, Lnln
from training.balance.views import Seen


class Corrupting(Showing):
    """Conversations with words and cells of the picture missing: fresh masks from (seed, epoch, view, ids).

    ValueError: the tokenizer has no token that stands for a missing one.
    """

    def __init__(self, settings: Lnln, seed: int, encoder: Encoder) -> None:
        self.settings, self.seed = settings, seed
        self.image_id, self.merge = encoder.image_id, encoder.image_processor.merge_size
        self.missing = encoder.missing_id
        if self.missing is None:
            raise ValueError(f"the tokenizer has no {MISSING_TOKEN} to stand for a missing token")
        self.complete = settings.level > 0

    def row(self, row: Encoded, key: tuple) -> tuple[Encoded, dict[str, float]]:
        seed = (self.seed, "lnln", *key)
        rates = {}
        for side in SIDES:
            corruption = getattr(self.settings, side)
            rates[side] = corruption_rate(seed=(*seed, "rate", side), chance=corruption.chance,
                                          highest=corruption.highest * self.settings.strength)
        return corrupt_row(row, **rates, seed=seed, missing=self.missing, image_id=self.image_id, merge=self.merge), rates


class LnlnMethod(Method):
    """Level 0 is all in Corrupting. From level 1 on the model has a mender, whose losses are added."""

    settings: Lnln

    def __init__(self, settings: Lnln, world: World) -> None:
        super().__init__(settings, world)
        self.mender = getattr(world.model, "mender", None)
        self._rates: Tensor | None = None

    def begin(self, extras: Mapping[str, Any]) -> None:
        if self.mender is not None:
            self._rates = extras["text"]
            self.mender.complete = (extras["complete"]["input_ids"], extras["complete"].get("pixel_values"))

    def loss(self, views: Mapping[str, Seen], answers: Tensor | float) -> Tensor | None:
        if self.mender is None:
            return None
        seen, self.mender.seen, self.mender.complete = self.mender.seen, None, None
        found = lnln.losses(seen, self._rates)
        weights = self.settings.weights
        terms = {"cc": weights.completeness, "rec": weights.reconstruction}
        if self.settings.level == 2:
            terms["adv"] = weights.adversary
        self.shown |= {f"loss_{name}": float(one.detach()) for name, one in found.items()}
        total = lnln.total_loss({name: found[name] for name in terms}, terms)
        # What has no weight gets a gradient of 0 and not none, so that ranks wait for the same parameters.
        rest = sum(0 * term for term in found.values())
        return self.strength * self.world.share * (total + rest)
