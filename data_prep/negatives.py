"""Picture negatives: a prompt's pictures spoilt or replaced so that an answer about them should become less likely.

A negative has the size of its picture, so the image grid and the token ids of a prompt stay and only pixels differ. It is a
function of its spec, the pictures and a key alone: whoever keys it by "seed id epoch" shows policy and reference the same one,
and a resumed run the same as the first. (mDPO's released code draws its crop anew in each forward pass.)

    crop:0.01-0.2      a random part of that share of the area, brought back to the picture's size (mDPO, arXiv:2406.11839)
    patchmask:0.6      that share of the cells of 28 x 28 pixels painted in the processor's mean colour
    diffusion:800      noised up to that step of 1000 (VCD, arXiv:2311.16922)
    gray white black   one level, as in the views of these names
    noise              uniform random pixels
    shuffled           another pair's pictures

A negative may equal its picture: a crop of a blank page, or gray of gray. From such a pair nothing is learnt, and little from
one that is told apart at a glance. Log `hardness`. Nor does any of them know what an answer rests on: a mask may spare it, and
large plain shapes are still seen at step 800. Of twins, data_prep.twins.counterfactual knows.

"Step 500" names two corruptions in released codes. VCD and most after it noise the pixels that the image processor has
normalised: at step 500 a picture is still well seen. Others noise pixels in [0, 1], whose spread is about a quarter of that,
and turn them to bytes without clamping, so that 1.2 wraps round to 50 of 255 and -0.2 to 205: far stronger. Here it is always
the first. It is clamped before it becomes bytes, which is what keeps it from wrapping.
"""

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from data_prep import images
from data_prep.problem import LEVELS, View

MEAN = (0.48145466, 0.4578275, 0.40821073)      # of Qwen2-VL's image processor, which took them from CLIP; RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
# A masked cell is (nearly) 0 after normalisation, so it says neither light nor dark, where black and white are things that a
# picture can show. On twins, whose background it is, a masked cell is an empty one.
MASK = tuple(round(255 * mean) for mean in MEAN)
CELL = 28               # pixels; one merged visual token of a picture that the processor does not resize
RATIOS = (3 / 4, 4 / 3)         # width to height of a crop, in pixels
STEPS = 1000
PLAIN = ("gray", "white", "black", "noise", "shuffled")
THERE_IS = ("crop:LOW-HIGH with 0 < LOW <= HIGH <= 1, patchmask:P with 0 < P <= 1, diffusion:T with T a whole number from 0 to "
            f"{STEPS - 1}, {', '.join(PLAIN[:-1])} and {PLAIN[-1]}")


@dataclass(frozen=True)
class Negative:
    """A way to spoil pictures; `parse` makes them."""
    spec: str
    kind: str                           # the word before the colon
    numbers: tuple[float, ...] = ()     # those after it

    @property
    def needs_other(self) -> bool:
        """Whether `make` needs another pair's pictures."""
        return self.kind == "shuffled"

    def make(self, pictures: Sequence[Image.Image], *, key: str, other: Sequence[Image.Image] | None = None,
             ) -> tuple[Image.Image, ...]:
        """As many new RGB pictures of the same sizes; `pictures` are RGB and stay as they are.

        The same key gives the same pixels, another key others, but for gray, white, black and shuffled, in which nothing is
        drawn. Each of several pictures has its own draw, whatever the others are.

        other: another pair's pictures, taken in turn, for `shuffled`; which pair's, the caller draws. Else it is not looked at.
        Raises ValueError when it is needed and there is none.
        """
        if self.needs_other and not other:
            raise ValueError(f"{self.spec}: no other pictures were given")
        borrowed = [other[number % len(other)] if self.needs_other else None for number in range(len(pictures))]
        return tuple(self._one(picture, f"{self.kind}\0{key}\0{number}", another)
                     for number, (picture, another) in enumerate(zip(pictures, borrowed)))

    def _one(self, picture: Image.Image, key: str, other: Image.Image | None) -> Image.Image:
        if self.kind == "crop":
            box = crop_box(picture.size, *self.numbers, random.Random(key))
            return picture.resize(picture.size, Image.Resampling.BICUBIC, box=box)
        if self.kind == "patchmask":
            return _masked(picture, self.numbers[0], random.Random(key))
        if self.kind == "diffusion":
            return _diffused(picture, int(self.numbers[0]), key)
        if self.kind == "noise":
            return images.noise(picture.size, key)
        if self.kind == "shuffled":
            return other.copy() if other.size == picture.size else other.resize(picture.size, Image.Resampling.BICUBIC)
        return Image.new("RGB", picture.size, (LEVELS[View(self.kind)],) * 3)


def parse(spec: str) -> Negative:
    """The negative that a spec names. ValueError with a list of what there is."""
    number = r"([0-9]*\.?[0-9]+)"
    pattern = rf"crop:{number}-{number}|patchmask:{number}|diffusion:([0-9]+)"
    if isinstance(spec, str) and (found := re.fullmatch(pattern, spec)):
        kind, numbers = spec.partition(":")[0], tuple(float(text) for text in found.groups() if text is not None)
        if kind == "diffusion" and numbers[0] < STEPS or kind != "diffusion" and 0 < numbers[0] <= numbers[-1] <= 1:
            return Negative(spec, kind, numbers)
    elif spec in PLAIN:
        return Negative(spec, spec)
    raise ValueError(f"{spec!r} is no picture negative; there is {THERE_IS}")


def hardness(picture: Image.Image, negative: Image.Image) -> float:
    """Mean absolute difference of the pixels, in [0, 1]. 0: they are the same; the smaller, the harder to tell apart.

    Raises ValueError when their sizes differ.
    """
    if picture.size != negative.size:
        raise ValueError(f"a picture of {picture.size} pixels and a negative of {negative.size} cannot be compared")
    difference = np.asarray(picture.convert("RGB"), np.int16) - np.asarray(negative.convert("RGB"), np.int16)
    return float(np.abs(difference).mean()) / 255


def crop_box(size: tuple[int, int], low: float, high: float, rng: random.Random) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random part of a picture, in pixels and fractions of them.

    Its share of the area is uniform in [low, high] and exact, also of a small picture, because pixels are interpolated anyway.
    The logarithm of its ratio is uniform over what RATIOS allow and the picture has room for. Where it has none, the share is
    kept and the part spans the shorter side. (torchvision's RandomResizedCrop gives the share up then, and rounds to pixels.)
    """
    width, height = size
    share = rng.uniform(low, high)
    room = share * width / height, width / (share * height)        # the ratios of parts as tall, and as wide, as the picture
    least, most = (min(max(ratio, room[0]), room[1]) for ratio in RATIOS)
    ratio = math.exp(rng.uniform(math.log(least), math.log(most)))
    w, h = (min(math.sqrt(share * width * height * ratio), width), min(math.sqrt(share * width * height / ratio), height))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, min(left + w, width), min(top + h, height)


def _masked(picture: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """Cells at the right and lower edge may be cut off; each counts as one. At least one is painted."""
    columns, rows = -(-picture.width // CELL), -(-picture.height // CELL)
    masked = picture.copy()
    for cell in rng.sample(range(columns * rows), max(1, round(share * columns * rows))):
        x, y = cell % columns * CELL, cell // columns * CELL
        masked.paste(MASK, (x, y, min(x + CELL, picture.width), min(y + CELL, picture.height)))
    return masked


@cache
def schedule() -> tuple[np.ndarray, np.ndarray]:
    """(signal, noise), each (1000,): x_t = signal[t] x + noise[t] e with e standard normal.

    beta_t = sigmoid(linspace(-6, 6, 1000)) (0.005 - 1e-5) + 1e-5; signal^2 is the cumulative product of 1 - beta, and
    noise^2 = 1 - signal^2.
    """
    beta = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS))) * (0.005 - 1e-5) + 1e-5
    kept = np.cumprod(1 - beta)
    return np.sqrt(kept), np.sqrt(1 - kept)


def _diffused(picture: Image.Image, step: int, key: str) -> Image.Image:
    """The forward process on normalised pixels, taken back to bytes."""
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    pixels = (np.asarray(picture, np.float32) / 255 - mean) / std
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little"))
    signal, noise = (float(values[step]) for values in schedule())
    pixels = signal * pixels + noise * rng.standard_normal(pixels.shape, np.float32)
    # Clamped before it becomes bytes: astype alone would take 260 to 4, and the lightest noise to the darkest pixels.
    return Image.fromarray(np.rint(np.clip((pixels * std + mean) * 255, 0, 255)).astype(np.uint8))
