"""Picture negatives: of their picture's size, drawn by spec and key alone, and spoilt by just as much as they say."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import negatives
from data_prep.negatives import CELL, MASK, MEAN, STD, crop_box, hardness, parse, schedule
from data_prep.problem import View
from data_prep.twins.worlds import BACKGROUND, Thing, World, draw

SPECS = ("crop:0.01-0.2", "patchmask:0.6", "diffusion:800", "gray", "white", "black", "noise", "shuffled")
DRAWN = ("crop:0.01-0.2", "patchmask:0.6", "diffusion:800", "noise")
TWIN = draw(World("shapes", (Thing("A", ("red", "circle")), Thing("E", ("blue", "cross")), Thing("I", ("white", "square")))))


def gradient(width: int = 240, height: int = 180) -> Image.Image:
    """Red says the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def plain(level: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


def made(spec: str, *pictures: Image.Image, key: str = "0 item 0", other=(TWIN,)) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in parse(spec).make(pictures, key=key, other=other)]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


# -- what all of them keep -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_sizes_are_kept_and_pixels_are_not(spec):
    pictures = (gradient(84, 84), gradient(30, 200), gradient(5, 3), gradient(57, 1))
    before = [picture.tobytes() for picture in pictures]
    for number, size in enumerate(((84, 84), (30, 200), (5, 3), (57, 1))):
        negative = parse(spec).make(pictures, key="k", other=(TWIN,))[number]
        assert negative.size == size and negative.mode == "RGB"
        assert negative is not pictures[number] and hardness(pictures[number], negative) > 0
    assert [picture.tobytes() for picture in pictures] == before
    assert parse(spec).make((), key="k", other=(TWIN,)) == ()


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_key_makes_the_same_pixels(spec):
    random.seed(1), np.random.seed(1)
    first = made(spec, gradient(), TWIN)
    random.seed(2), np.random.seed(2)
    made(spec, TWIN, key="another item")
    assert same(made(spec, gradient(), TWIN), first)
    assert same(made(spec, gradient(), TWIN, key="0 item 1"), first) == (spec not in DRAWN)


@pytest.mark.parametrize("spec", SPECS)
def test_each_picture_has_its_own_draw_whatever_the_others_are(spec):
    one, two = made(spec, gradient(), gradient())
    assert np.array_equal(one, two) == (spec not in DRAWN)
    assert same(made(spec, gradient()), [one]) and same(made(spec, TWIN, gradient()), [*made(spec, TWIN), two])


def test_two_specs_of_a_kind_that_are_spelt_differently_draw_the_same():
    assert same(made("crop:0.01-0.2", gradient()), made("crop:.010-.20", gradient()))
    assert same(made("patchmask:0.50", gradient()), made("patchmask:.5", gradient()))


def test_another_machine_draws_the_same():
    """Pinned, so that runs on two machines have the same negatives."""
    box = crop_box((240, 180), 0.01, 0.2, random.Random("crop\x000 item 0\x000"))
    assert [round(edge, 3) for edge in box] == [173.353, 130.875, 201.631, 155.605]
    masked = (made("patchmask:0.6", plain(9, (84, 84)))[0] == MASK).all(-1)[::CELL, ::CELL]
    assert masked.astype(int).tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
    assert made("diffusion:800", plain(128, (2, 1)))[0].tolist() == [[[211, 175, 164], [146, 33, 141]]]


# -- crop ------------------------------------------------------------------------------------------


def test_what_a_crop_shows_of_a_gradient():
    """Bicubic interpolation keeps a ramp, so first and last column tell where the part began and how wide it was."""
    width, height = 240, 180
    shares, lefts, tops = [], [], []
    for number in range(80):
        pixels = made("crop:0.01-0.2", gradient(width, height), key=f"0 {number} 0")[0].astype(int)
        (x0, y0), (x1, y1) = pixels[0, 0, :2], pixels[-1, -1, :2]
        w, h = (x1 - x0) * width / (width - 1), (y1 - y0) * height / (height - 1)
        assert (pixels[..., 0] == pixels[:1, :, 0]).all() and (np.diff(pixels[0, :, 0]) >= 0).all(), "columns stay columns"
        assert (w + 1) * (h + 1) >= 0.01 * width * height and (w - 1) * (h - 1) <= 0.2 * width * height
        assert (w + 1) / (h - 1) >= 3 / 4 and (w - 1) / (h + 1) <= 4 / 3
        shares.append(w * h / (width * height))
        lefts.append(x0 / (width - w))
        tops.append(y0 / (height - h))
    assert min(shares) < 0.03 and max(shares) > 0.18 and abs(np.mean(shares) - 0.105) < 0.02
    for places in (lefts, tops):
        assert min(places) < 0.1 and max(places) > 0.9 and abs(np.mean(places) - 0.5) < 0.1


@pytest.mark.parametrize("size", ((84, 84), (1000, 700), (28, 28), (3, 2), (1000, 10), (10, 2000), (1, 1)))
@pytest.mark.parametrize("low, high", ((0.01, 0.2), (0.3, 0.3), (0.9, 1.0)))
def test_crop_boxes_have_their_share_of_any_picture(size, low, high):
    (width, height), ratios = size, []
    for number in range(200):
        left, top, right, bottom = crop_box(size, low, high, random.Random(number))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        share = (right - left) * (bottom - top) / (width * height)
        assert low - 1e-9 <= share <= high + 1e-9
        ratio = (right - left) / (bottom - top)
        # Out of bounds only where the picture has no room for such a part: then it is as tall, or as wide, as the picture.
        assert (
            3 / 4 - 1e-9 <= ratio <= 4 / 3 + 1e-9
            or math.isclose(bottom - top, height) and ratio > 4 / 3
            or math.isclose(right - left, width) and ratio < 3 / 4
        )
        ratios.append(ratio)
    if (size, high) == ((84, 84), 0.2):
        assert min(ratios) < 0.78 and max(ratios) > 1.3 and abs(np.log(ratios).mean()) < 0.04


def test_a_crop_of_all_is_the_picture():
    assert same(made("crop:1-1", gradient(180, 180)), [np.asarray(gradient(180, 180))])


# -- patchmask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "share, size, masked, cells",
    (
        ("0.6", (84, 84), 5, 9),  # 5.4
        ("0.5", (112, 84), 6, 12),
        ("0.01", (84, 84), 1, 9),  # 0.09: at least one
        ("1", (84, 84), 9, 9),
        ("0.3", (100, 60), 4, 12),  # 3.6 of 4 x 3 cells, of which six are cut off
        ("0.25", (10, 12), 1, 1),
    ),
)
def test_the_share_of_cells_is_exact_and_the_rest_is_untouched(share, size, masked, cells):
    pixels = made(f"patchmask:{share}", plain(7, size))[0]
    looks = [
        pixels[y : y + CELL, x : x + CELL].reshape(-1, 3)
        for y in range(0, size[1], CELL)
        for x in range(0, size[0], CELL)
    ]
    assert len(looks) == cells
    assert sum((look == MASK).all() for look in looks) == masked
    assert sum((look == 7).all() for look in looks) == cells - masked


def test_every_cell_is_masked_some_time():
    often = sum((made("patchmask:0.3", plain(7, (84, 84)), key=str(n))[0] == MASK).all(-1)[::CELL, ::CELL] for n in range(200))
    assert often.sum() == 200 * 3 and 40 < often.min() and often.max() < 95


def test_masks_have_the_colour_that_the_processor_makes_nothing_of():
    config = json.loads((Path(__file__).parent.parent / "assets/tiny/preprocessor_config.json").read_text(encoding="utf-8"))
    assert (tuple(config["image_mean"]), tuple(config["image_std"])) == (MEAN, STD)
    assert np.abs((np.array(MASK) / 255 - MEAN) / STD).max() < 0.01
    assert MASK == BACKGROUND, "a masked cell of a twin is an empty one"


# -- diffusion -------------------------------------------------------------------------------------


def test_the_schedule():
    signal, noise = schedule()
    steps = [200, 400, 500, 600, 800, 999]
    assert signal[steps].round(3).tolist() == [0.994, 0.945, 0.863, 0.734, 0.467, 0.285]
    assert noise[steps].round(3).tolist() == [0.110, 0.327, 0.505, 0.679, 0.884, 0.959]
    assert len(signal) == 1000 and (np.diff(signal) < 0).all() and (signal**2 + noise**2 == pytest.approx(1))


@pytest.mark.parametrize("step, signal", ((0, 1.0), (200, 0.994), (400, 0.945), (500, 0.863), (600, 0.734), (800, 0.467)))
def test_so_much_of_the_picture_is_left(step, signal):
    """Two pictures under one key have the same noise: unless clamped, what is left of their difference is the signal."""
    (dark,), (light,) = (made(f"diffusion:{step}", plain(level)) for level in (90, 150))
    inside = (dark > 0) & (light < 255)
    left = light[inside].astype(int) - dark[inside]
    assert inside.mean() > 0.5 and np.abs(left - 60 * signal).max() < 1.1


@pytest.mark.parametrize("step, std", ((200, 0.110), (400, 0.327), (500, 0.505)))
def test_so_much_noise_is_laid_over_it(step, std):
    """On the mean colour nothing is clamped up to here; in units of normalised pixels, per channel."""
    picture = Image.new("RGB", (300, 200), MASK)
    pixels = (np.asarray(made(f"diffusion:{step}", picture)[0]) / 255 - MEAN) / STD
    assert np.abs(pixels.mean((0, 1))).max() < 0.02
    assert pixels.std((0, 1)) == pytest.approx([std] * 3, rel=0.02)


def dark_share(pixels: np.ndarray) -> float:
    return float((pixels < 20).mean())


def test_light_noise_does_not_wrap_to_dark():
    """A white picture at step 800 has pixels of about 185 with a spread of 60 in the first channel: an eighth of them would
    pass 255. Clamped they are white; wrapped, a twentieth would be nearly black, which noise makes of hardly any."""
    pixels = made("diffusion:800", plain(255))[0][..., 0]
    unclamped = np.random.default_rng(0).normal(184.5, 60.5, pixels.shape)
    assert dark_share(np.rint(unclamped).astype(np.int64).astype(np.uint8)) > 0.03, "this check would see wrapping"
    assert dark_share(pixels) < 0.007
    assert (pixels == 255).mean() == pytest.approx((unclamped >= 254.5).mean(), abs=0.01)


@pytest.mark.parametrize("step", (400, 800, 999))
def test_a_lighter_picture_is_nowhere_darker(step):
    """Under the same noise; wrapping would break it."""
    levels = [made(f"diffusion:{step}", plain(level))[0].astype(int) for level in (0, 100, 200, 255)]
    assert all((lighter >= darker).all() for darker, lighter in zip(levels, levels[1:]))
    assert levels[0].min() == 0 and levels[-1].max() == 255


# -- the others ------------------------------------------------------------------------------------


def test_levels_are_those_of_the_views():
    for spec, level in (("gray", 128), ("white", 255), ("black", 0)):
        assert View(spec) and (made(spec, TWIN)[0] == level).all()


def test_noise_is_uniform():
    pixels = made("noise", plain(0))[0]
    counts = np.bincount(pixels.ravel(), minlength=256)
    assert abs(pixels.mean() - 127.5) < 1 and counts.min() > 500 and counts.max() < 900


def test_shuffled_takes_another_pairs_pictures_in_turn():
    needs = [spec for spec in SPECS if parse(spec).needs_other]
    assert needs == ["shuffled"]
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (84, 84), "blue")
    found = parse("shuffled").make((TWIN, gradient(), TWIN), key="k", other=(red, blue))
    assert [picture.size for picture in found] == [(84, 84), (240, 180), (84, 84)]
    assert [picture.getpixel((5, 5)) for picture in found] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    for other in (None, ()):
        with pytest.raises(ValueError, match="shuffled: no other pictures were given"):
            parse("shuffled").make((TWIN,), key="k", other=other)
    assert parse("noise").make((TWIN,), key="k")[0].size == TWIN.size


# -- hardness --------------------------------------------------------------------------------------


def test_hardness_by_hand():
    assert hardness(plain(0), plain(255)) == 1.0 and hardness(plain(51), plain(102)) == pytest.approx(0.2)
    assert hardness(plain(102), plain(51)) == pytest.approx(0.2)
    half = plain(0, (10, 10))
    half.paste((255, 255, 255), (0, 0, 5, 10))
    assert hardness(half, plain(0, (10, 10))) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"\(10, 10\) pixels and a negative of \(300, 200\)"):
        hardness(half, plain(0))


def test_a_negative_that_is_its_picture_is_told_by_hardness():
    for spec, picture in (("crop:0.01-0.2", plain(200)), ("gray", plain(128)), ("shuffled", TWIN)):
        assert hardness(picture, parse(spec).make((picture,), key="k", other=(TWIN,))[0]) == 0


def test_more_of_a_corruption_is_easier_to_tell():
    for kind, numbers in (("diffusion", (200, 500, 800)), ("patchmask", (0.2, 0.6, 1))):
        means = [
            np.mean([hardness(TWIN, parse(f"{kind}:{n}").make((TWIN,), key=str(k))[0]) for k in range(10)]) for n in numbers
        ]
        assert 0 < means[0] < means[1] < means[2] < 1


# -- specs -----------------------------------------------------------------------------------------


def test_specs_come_apart():
    assert [parse(spec).spec for spec in SPECS] == list(SPECS)
    assert (parse("crop:0.01-0.2").kind, parse("crop:0.01-0.2").numbers) == ("crop", (0.01, 0.2))
    assert parse("patchmask:.6").numbers == (0.6,) and parse("diffusion:0").numbers == (0,) and parse("gray").numbers == ()
    assert parse("noise") == parse("noise") and hash(parse("noise")) is not None


@pytest.mark.parametrize(
    "spec",
    (
        "", "blur", "shuffle", "Gray", " gray", "gray:3", "crop", "crop:", "crop:0.2", "crop:0.2-0.01", "crop:0-0.2",
        "crop:0.1-1.5", "crop:0.01-0.2-0.3", "crop:1e-2-0.2", "crop:1.2.3-4", "crop:nan-nan", "crop:-0.1-0.2",
        "patchmask", "patchmask:0", "patchmask:1.01", "patchmask:x", "patchmask:0.5 ", "diffusion", "diffusion:1000",
        "diffusion:-1", "diffusion:500.5", "diffusion:٥", None, 0.6, ("gray",),
    ),
    ids=repr,
)  # fmt: skip
def test_other_specs_are_refused_with_a_list(spec):
    with pytest.raises(ValueError) as caught:
        parse(spec)
    assert str(caught.value) == f"{spec!r} is no picture negative; there is {negatives.THERE_IS}"
    for name in ("crop:LOW-HIGH", "patchmask:P", "diffusion:T", "gray, white, black, noise and shuffled"):
        assert name in str(caught.value)
