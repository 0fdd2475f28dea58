"""Pictures of every kind come in as upright 8-bit RGB, and what cannot is a ProblemError that says why."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import images
from data_prep.images import ProblemError, draw_below, load, noise, picture_path, upright_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pixels(path):
    picture = load(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def corners(size=(8, 6)):
    """Red at the top left, green at the top right, blue at the bottom left, white at the bottom right."""
    array = np.zeros((size[1], size[0], 3), np.uint8)
    top, left = size[1] // 2, size[0] // 2
    array[:top, :left], array[:top, left:], array[top:, :left], array[top:, left:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(array)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif", "a.ppm"])
def test_rgb_comes_back_exactly(tmp_path, name):
    corners().save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    np.testing.assert_array_equal(pixels(tmp_path / name), np.asarray(corners()))


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - RED).max() <= 3


def test_palette_with_a_transparent_colour(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *BLUE])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "opaque.png")
    picture.save(tmp_path / "clear.png", transparency=1)
    assert pixels(tmp_path / "opaque.png").tolist() == [[list(RED), list(BLUE)]]
    assert pixels(tmp_path / "clear.png").tolist() == [[list(RED), list(WHITE)]]


@pytest.mark.parametrize(
    "mode, value, seen",
    [
        ("RGBA", (0, 0, 255, 255), BLUE),
        ("RGBA", (0, 0, 255, 0), WHITE),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 0), WHITE),
        ("L", 77, (77, 77, 77)),
        ("1", 1, WHITE),
    ],
)
def test_transparency_lies_over_white(tmp_path, mode, value, seen):
    Image.new(mode, (3, 2), value).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == seen).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    levels = np.array([[0, 255, 256, 257, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / name)
    assert pixels(tmp_path / name)[0, :, 0].tolist() == [0, 1, 1, 1, 128, 255]


def test_levels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ProblemError, match="gray levels are not 8 or 16 bits"):
        load(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = corners()
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.asarray(upright))
    assert upright_size(tmp_path / "a.png") == upright.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored(tmp_path):
    corners().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*broken")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.asarray(corners()))


def _png(width, height, bits=8, rows=b""):
    """A PNG of RGB pixels written by hand, for what Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_is_scaled(tmp_path):
    (tmp_path / "a.png").write_bytes(_png(1, 1, 16, b"\0" + struct.pack(">3H", 65535, 32768, 256)))
    assert pixels(tmp_path / "a.png").tolist() == [[[255, 128, 1]]]


@pytest.mark.parametrize("side", [7_072, 11_000, 60_000])  # over our limit, over Pillow's warning, over Pillow's error
def test_a_picture_over_the_limit_is_refused_without_decoding(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(_png(side, side))
    for function in (load, upright_size, images.header_size):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ProblemError, match=r"'bomb\.png' .*over the limit of 50000000 pixels"):
                function(tmp_path / "bomb.png")


def test_the_limit_can_be_set(tmp_path):
    corners((10, 10)).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png", max_pixels=100).size == (10, 10)
    with pytest.raises(ProblemError, match="10x10 pixels, over the limit of 99"):
        load(tmp_path / "a.png", max_pixels=99)


def test_a_picture_too_narrow_for_the_model_is_refused(tmp_path):
    Image.new("RGB", (400, 2)).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png").size == (400, 2)
    Image.new("RGB", (402, 2)).save(tmp_path / "b.png")
    with pytest.raises(ProblemError, match=r"'b\.png' has 402x2 pixels; one side may be at most 200 times the other"):
        images.header_size(tmp_path / "b.png")


def _animation(kind):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused(tmp_path, kind):
    (tmp_path / "a").write_bytes(_animation(kind))
    with pytest.raises(ProblemError, match="'a' is animated"):
        load(tmp_path / "a")


def test_a_multi_picture_jpeg_of_a_camera_is_its_first_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(_animation("MPO"))
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - RED).max() <= 3


def _noise_png():
    buffer = io.BytesIO()
    noise((64, 64), "x").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, said",
    [
        (b"hello", "is not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "is not a picture that can be read"),
        (_noise_png()[:5000], "cannot be decoded"),
        (_noise_png()[:20], "is not a picture that can be read"),
    ],
    ids=["text", "eps", "truncated", "cut in the header"],
)
def test_broken_files(tmp_path, data, said):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ProblemError, match=f"'a.png' {said}"):
        load(tmp_path / "a.png")


@pytest.mark.parametrize(
    "name, said",
    [
        ("gone.png", "does not exist"),
        ("folder", "is not a file"),
        ("empty.png", "is empty"),
        ("/etc/hostname", "absolute path"),
        ("C:/a.png", "absolute path"),
        ("../a.png", "leaves the data folder with '..'"),
        ("folder/../../a.png", "leaves the data folder with '..'"),
        ("link/a.png", "leaves the data folder through a link"),
        ("folder\\a.png", "backslash"),
        ("a\0.png", "zero byte"),
        ("a" * 5000, "cannot be reached"),
        ("loop", "cannot be reached|does not exist"),
    ],
)
def test_unsafe_and_missing_paths(tmp_path, name, said):
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    (root / "empty.png").touch()
    (root / "link").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    corners().save(tmp_path / "a.png")
    with pytest.raises(ProblemError, match=said):
        picture_path(root, name)


def test_a_link_inside_the_folder_is_fine(tmp_path):
    corners().save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert picture_path(tmp_path, "b.png") == tmp_path / "b.png"


def test_noise_is_uniform_and_the_same_everywhere():
    picture = np.asarray(noise((200, 100), "item"))
    assert picture.shape == (100, 200, 3)
    assert picture[0, :2].tolist() == [[9, 74, 203], [20, 177, 6]]  # pinned: another machine must draw the same
    assert abs(picture.mean() - 127.5) < 1
    assert np.bincount(picture.ravel(), minlength=256).min() > 150
    assert (picture == np.asarray(noise((200, 100), "item"))).all()
    assert (picture != np.asarray(noise((200, 100), "other"))).mean() > 0.99


def test_text_is_drawn_below_and_the_picture_stays():
    picture = corners((300, 40))
    drawn = draw_below(picture, "How many of the red circles lie left of the blue square?\nA. one\nB. two")
    assert drawn.width == 300 and drawn.height > 40
    np.testing.assert_array_equal(np.asarray(drawn)[:40], np.asarray(picture))
    band = np.asarray(drawn)[40:]
    assert (band == 255).mean() > 0.7 and (band < 64).any()
    assert (band[:, :6] == 255).all() and (band[:, -6:] == 255).all(), "nothing is cut off at the sides"
    assert (band[-6:] == 255).all(), "nothing is cut off below"


def test_wrapping_keeps_every_word_and_breaks_long_ones():
    font = images._font(None, 12)
    text = "a few short words and " + "x" * 60
    lines = images._wrap(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert images._wrap("one\ntwo", font, 100) == ["one", "two"]


def test_a_narrow_picture_still_takes_text():
    assert draw_below(Image.new("RGB", (1, 1)), "word").width == 1


def test_a_character_that_the_font_lacks_is_refused():
    with pytest.raises(ProblemError, match="the font has no '色'"):
        draw_below(corners(), "What 色?")
    draw_below(corners((200, 20)), "Größe: ½ × 3° – “naïve” α ≤ β <|im_start|>")
