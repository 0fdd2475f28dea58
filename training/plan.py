"""The plan of a run: its stages one after the other, each with its own mixture and its share of the optimizer steps.

Which conversation is drawn n-th is a pure function of the recipe, the data and n: the same for every number of ranks and workers.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from data_prep.problem import Prompt, View
from data_prep.provenance import write_json
from training.balance.settings import Balance, Probe
from training.changes import ALLOW
from training.config import Loss, Preference, Recipe, RecipeError
from training.mixture import Mixture
from training.objective import Objective, needs
from training.order import Draw
from training.pair_mixture import PairMixture

# Seeds of later stages, so far from the numbers of parts and epochs that no two orders are drawn alike. The first stage's order
# is that of the seed alone.
STAGE_SEED = 2**20
PROBE_SEED = 0
PLAN_FILE = "plan.json"


def _four_views(drawn: View) -> tuple[View, ...]:
    """The views that a gap needs of each problem. RecipeError where the mixture draws another than `both`."""
    if drawn is not View.both:
        raise RecipeError(f"probe: the mixture draws the view {drawn.value}; it must draw both, which is shown in the other views too")
    return (View.both, View.vision, View.text, View.blind)


def _json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        what = "the order of the data" if path.name == PLAN_FILE else "this checkpoint"
        raise RecipeError(f"{path}: cannot be read, so {what} cannot be continued: {error}; with the checkpoint's folder removed, "
                          "--resume continues from the one before") from error
    return values


class PlannedStage(NamedTuple):
    number: int
    mixture: Mixture | PairMixture
    loss: Loss
    start: int                  # optimizer steps
    end: int
    batch: int
    preference: Preference | None = None
    balance: Balance | None = None

    @property
    def first(self) -> int:
        """Number of its first draw."""
        return self.start * self.batch

    @property
    def objective(self) -> Objective:
        return Objective(self.loss, {part.view for part in self.mixture.parts})

    def table(self, encoder=None) -> Table:
        title = f"stage {self.number + 1}, steps {self.start} to {self.end}: {self.mixture.path}: {len(self.mixture)} draws"
        return self.mixture.table(encoder, title=title)


class Plan:
    """What is drawn, over all stages of a recipe.

    Attributes:
        stages: in their order.
        branch_probe, gap_probe: conversations that a balance method, or the recipe's probe, asks now and then; None: there is none.
        hashes: SHA-256 of every file that the order or a probe depends on.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Raises RecipeError and ProblemError as Mixture does; RecipeError also for a loss that its mixture's views do not allow."""
        self.batch, self.seed = recipe.batch, recipe.seed
        starts, cache = recipe.stage_starts, {}
        self.stages: list[PlannedStage] = []
        self.hashes: dict[str, str] = {}
        for number, (start, end) in enumerate(zip(starts, starts[1:])):
            loss = recipe.stage_loss(number)
            common = {"seed": (recipe.seed, STAGE_SEED + number) if number else recipe.seed,
                      "draws": (end - start) * recipe.batch, "skip_bad": recipe.data.skip_bad, "cache": cache}
            if recipe.preference is None:
                mixture = Mixture(recipe.stage_mixture(number), needs=partial(needs, loss, balance=recipe.active_balance), **common)
            else:
                mixture = PairMixture(recipe.stage_mixture(number), preference=recipe.preference, **common)
            self.stages.append(PlannedStage(number, mixture, loss, start, end, recipe.batch, recipe.preference, recipe.active_balance))
            self.hashes |= mixture.hashes
        balance = recipe.active_balance
        asked = getattr(balance, "probe", None)
        self.branch_probe = asked and self._probe(asked, partial(needs, Loss(), balance=balance), recipe, cache)
        self.gap_probe = recipe.probe and self._probe(recipe.probe, _four_views, recipe, cache)

    def _probe(self, settings: Probe, needs: Callable[[View], Sequence[View]], recipe: Recipe, cache: dict) -> Mixture:
        """Conversations that are asked now and then, the same whatever the seed of training."""
        try:
            mixture = Mixture(settings.mixture, seed=PROBE_SEED, draws=settings.items, needs=needs, skip_bad=recipe.data.skip_bad,
                              cache=cache)
        except RecipeError as error:
            raise RecipeError(f"the probe's mixture: {error}") from error
        self.hashes |= mixture.hashes
        return mixture

    def __len__(self) -> int:
        return self.stages[-1].end * self.batch

    def stage_at(self, step: int) -> PlannedStage:
        """The stage that an optimizer step belongs to, counted from 0."""
        return next(stage for stage in self.stages if step < stage.end)

    def draw(self, number: int) -> Draw:
        """The conversation with this number, counted from 0 over all ranks. No picture is opened."""
        stage = self.stage_at(number // self.batch)
        return stage.mixture.draw(number - stage.first)._replace(stage=stage.number)

    def conversation(self, draw: Draw) -> tuple[list[dict], tuple, list[Prompt]]:
        """See Mixture.conversation."""
        return self.stages[draw.stage].mixture.conversation(draw)

    def ids(self, draw: Draw) -> tuple[str, ...]:
        """Of the problems, or the pair, that are drawn."""
        return self.stages[draw.stage].mixture.ids(draw)

    def state(self, step: int) -> dict[str, Any]:
        """Where the plan stands after `step` optimizer steps, as plain JSON values."""
        done = []
        for stage in self.stages:
            counts = stage.mixture.drawn(max(0, min(step, stage.end) - stage.start) * self.batch)
            done += [{"stage": stage.number, "source": part.source, "view": part.view and part.view.value, "drawn": count,
                      "epochs": round(count / len(part.units), 4)} for part, count in zip(stage.mixture.parts, counts)]
        last = self.draw(step * self.batch - 1) if step else None
        return {"seed": self.seed, "step": step, "draws": step * self.batch, "parts": done, "data": self.hashes,
                "last": last and [last.source, last.view and last.view.value, list(last.problems), last.stage]}

    def save(self, folder: Path, step: int) -> None:
        write_json(folder / PLAN_FILE, self.state(step))

    def check(self, folder: Path, step: int, *, changed: bool = False) -> None:
        """Raises RecipeError when a JSON file of the checkpoint in `folder` is damaged, or it was made under another plan, unless this
        one may be `changed`."""
        path = folder / PLAN_FILE
        saved = {one: _json(one) for one in (path, *folder.glob("*.json"))}[path]
        if changed:
            return
        now = self.state(step)
        if differing := [key for key in now if saved.get(key) != now[key]]:
            raise RecipeError(f"{path}: the order of the data is not the one the run began with; it differs in "
                              f"{', '.join(differing)}; {ALLOW}")
