"""Short baselines: OGM-GE (arXiv 2203.15332), modality dropout, and coefficients drawn from another method's at random."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_prep.encode import Encoder
from data_prep.problem import View
from training.balance.hook import Groups, Method, Modulation, Showing, World, scale
from training.balance.lnln import Seed, generator
from training.balance.settings import SIDES, ModalityDropout, OgmGe, RandomFactors
from training.order import Draw
from training.strict import RecipeError


def coefficients(image: float, text: float, *, alpha: float) -> dict[str, float]:
    """k_m = 1 - tanh(alpha rho_m) where rho_m > 1, else 1 (eq. 10), rho being the ratio of a modality's score to the other's.

    It jumps at rho = 1: the slightest lead costs 1 - tanh(alpha). At rho = 1 itself the released code
    (GeWu-Lab/OGM-GE_CVPR2022) slows one of the two; here neither.

    Args:
        image, text: sum over the batch of the probability of the right answer, of each modality alone; >= 0.
        alpha: >= 0; 0 is no modulation.

    Returns:
        {"image": k, "text": k} in [0, 1], at most one below 1.

    Raises:
        ValueError: a score or alpha that is negative or not finite.
    """
    if not all(0 <= one < math.inf for one in (image, text, alpha)):
        raise ValueError(f"scores and alpha must be finite and not negative: image {image}, text {text}, alpha {alpha}")
    k = {"image": 1.0, "text": 1.0}
    if image != text:
        name, more, less = ("image", image, text) if image > text else ("text", text, image)
        # Against nothing at all the ratio is infinite; alpha = 0 is no modulation then, too.
        k[name] = 1 - math.tanh(alpha * (more / less if less else math.inf)) if alpha else 1.0
    return k


def with_noise(gradient: Tensor, coefficient: float, *, random: torch.Generator | None = None) -> Tensor:
    """The GE of OGM-GE: coefficient * gradient + N(0, sigma^2) with sigma the standard deviation of the gradient's elements.

    The noise is that of the gradient before it is scaled, and is added to both modalities (released code).

    Args:
        gradient: any shape; with less than two elements there is no spread and no noise.
        random: generator on the gradient's device.
    """
    sigma = gradient.std() if gradient.numel() > 1 else 0.0
    noise = torch.randn(gradient.shape, generator=random, dtype=gradient.dtype, device=gradient.device)
    return coefficient * gradient + sigma * noise


def modality_dropout(seeds: Sequence[Seed], *, image: float, text: float) -> Tensor:
    """Which modalities each row shows: the picture is missing with probability `image`, the text with `text`, never both.

    Args:
        seeds: one per row; a row's mask depends on its own alone (see `lnln.generator`).
        image, text: in [0, 1], together at most 1.

    Returns:
        (rows, 2) bool: picture shown, text shown.

    Raises:
        ValueError: chances out of range.
    """
    if not (image >= 0 and text >= 0 and image + text <= 1):
        raise ValueError(f"the chances to miss the picture ({image}) and the text ({text}) must not be negative, and together "
                         "at most 1")
    draws = torch.tensor([generator(seed).random() for seed in seeds], dtype=torch.float64)
    without_image = draws < image
    return torch.stack([~without_image, without_image | (draws < 1 - text)], -1)


def shuffled(table: Tensor, *, seed: Seed) -> Tensor:
    """Coefficients with the distribution of given ones and no relation to the step: the control of every modulation.

    Args:
        table: (steps, ...) coefficients that a method used; those of one step stay together.
        seed: see `lnln.generator`.

    Returns:
        The same rows in another order.
    """
    return table[torch.from_numpy(generator(seed).permutation(len(table))).to(table.device)]


class OgmGeMethod(Modulation):
    """OGM-GE: the coefficients are factors on the learning rate; the noise is added to the gradients, which are scaled with it."""

    settings: OgmGe
    changes_gradients = True

    def measured(self, values: dict[str, float]) -> None:
        self.set(coefficients(*(max(values[side], 0.0) for side in SIDES), alpha=self.settings.alpha))

    def on_gradients(self, groups: Groups, again: Callable[[str | None], None]) -> None:
        if not self.settings.noise:
            return
        for number, group in enumerate(groups):
            if group["modality"] not in SIDES:
                continue
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    seed = generator((self.world.seed, "ogm_ge", self.world.step(), number, place)).integers(2**62)
                    random = torch.Generator(parameter.device).manual_seed(int(seed))
                    noise = with_noise(parameter.grad, 0.0, random=random)
                    parameter.grad.add_(noise, alpha=self.strength)


class ModalityDropoutMethod(Method):
    """All of it is in how problems are shown."""


class Dropping(Showing):
    """A conversation without its picture, or without its facts and the questions' stems."""

    def __init__(self, settings: ModalityDropout, seed: int, encoder: Encoder) -> None:
        self.settings, self.seed = settings, seed

    def draw(self, draw: Draw, key: tuple) -> Draw:
        chances = {side: self.settings.strength * getattr(self.settings, side) for side in SIDES}
        image, text = modality_dropout([(self.seed, "modality_dropout", *key)], **chances)[0].tolist()
        if not image:
            return draw._replace(view={View.both: View.text, View.vision: View.blind}[draw.view])
        return draw if text else draw._replace(view=View.vision, question=False)


class RandomFactorsMethod(Method):
    """Factors of a finished run, shuffled; each holds for `every` steps."""

    settings: RandomFactors

    def __init__(self, settings: RandomFactors, world: World) -> None:
        super().__init__(settings, world)
        table = torch.tensor(factors_of(settings.of, world.seed), dtype=torch.float64)
        self.table = shuffled(table, seed=(world.seed, "random_factors")).tolist()

    def before_step(self, groups: Groups) -> None:
        row = self.table[self.world.step() // self.settings.every % len(self.table)]
        factors = {side: 1 + self.strength * (factor - 1) for side, factor in zip(SIDES, row)}
        scale(groups, factors)
        self.shown |= {f"factor_{side}": factor for side, factor in factors.items()}


def factors_of(folder: str, seed: int) -> list[list[float]]:
    """The factors (image, text) that a run logged, in their order.

    Raises:
        RecipeError: there are none.
    """
    path = Path(folder.replace("{seed}", str(seed))) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [[row[f"balance/factor_{side}"] for side in SIDES] for row in rows if f"balance/factor_{SIDES[0]}" in row]
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"balance.of: {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not found:
        raise RecipeError(f"balance.of: {path}: no factors are logged there; it is not the log of a method that has some")
    return found
