"""Pictures: opened safely, brought to upright 8-bit RGB, replaced, and drawn upon.

Every picture of a problem comes through `load` (or `upright_size`, when only its size matters), so that a picture that
is missing, cut off, animated or too large is one clear `ProblemError`, whatever Pillow would have said.
"""

import hashlib
import io
import re
import warnings
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_PIXELS = 50_000_000
MAX_RATIO = 200  # of the sides; Qwen2-VL's image processor refuses more
# No EPS, PDF or other format that runs a program or a script to draw itself.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def one_line(message: str, longest: int = 500) -> str:
    """A message that data may have a say in, as one line that a terminal shows as it is; of a longer one the beginning and the end."""
    line = "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in message)
    half = (longest - 5) // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


class ProblemError(ValueError):
    """Something is wrong with a problem: "<file>:<line>: <field>: <what is wrong>" when it comes from a file. One line."""

    def __init__(self, message: str = "") -> None:
        # A data loader raises what a worker raised anew, with the worker's whole traceback as the message; what was said ends it.
        said = re.sub(r"(?s)\ACaught ProblemError in .*\n[\w.]*ProblemError: ", "", message)
        super().__init__(one_line(said))


def picture_path(root: Path, image: str) -> Path:
    """The file of a picture named relative to `root`; ProblemError when the name leaves `root` or names no file."""
    windows = PureWindowsPath(image)
    if "\0" in image:
        raise ProblemError("the path holds a zero byte")
    if PurePosixPath(image).is_absolute() or windows.is_absolute() or windows.drive:
        raise ProblemError(f"{image!r} is an absolute path; it must be relative to the data folder")
    if "\\" in image:
        raise ProblemError(f"{image!r} has a backslash; separate folders with '/'")
    if ".." in PurePosixPath(image).parts:
        raise ProblemError(f"{image!r} leaves the data folder with '..'")
    path = root / image
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ProblemError(f"{image!r} leaves the data folder through a link")
        if not path.is_file():
            raise ProblemError(f"{image!r} is not a file" if path.exists() else f"{image!r} does not exist")
        if path.stat().st_size == 0:
            raise ProblemError(f"{image!r} is empty (0 bytes)")
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, a folder that may not be read
        raise ProblemError(f"{image!r} cannot be reached ({getattr(error, 'strerror', None) or error})") from error
    return path


def _name(source: Path | io.BytesIO) -> str:
    return repr(source.name) if isinstance(source, Path) else f"a picture of {len(source.getvalue())} bytes"


def _open(source: Path | io.BytesIO, max_pixels: int) -> Image.Image:
    """Open a picture without decoding it."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a decompression bomb up to twice its own limit; here `max_pixels` decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ProblemError(f"{_name(source)} is over the limit of {max_pixels} pixels ({error})") from error
    except Exception as error:  # Pillow's readers raise many kinds of errors on a broken header
        raise ProblemError(f"{_name(source)} is not a picture that can be read ({_reason(error)})") from error
    width, height = image.size
    message = None
    if width * height > max_pixels:
        message = f"{_name(source)} has {width}x{height} pixels, over the limit of {max_pixels} pixels"
    elif max(width, height) > MAX_RATIO * min(width, height):
        message = f"{_name(source)} has {width}x{height} pixels; one side may be at most {MAX_RATIO} times the other"
    # A camera's multi-picture JPEG (MPO) holds previews, not an animation: its first picture is the picture.
    elif image.format != "MPO" and getattr(image, "is_animated", False):
        message = f"{_name(source)} is animated or has several pages; keep one"
    if message:
        image.close()
        raise ProblemError(message)
    return image


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def header_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) as stored, read from the header alone."""
    with _open(path, max_pixels) as image:
        return image.size


def upright_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `load` would return, without converting the picture."""
    with _open(path, max_pixels) as image:
        width, height = image.size
        return (height, width) if _orientation(image, path) >= 5 else (width, height)


def load(source: Path | io.BytesIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as upright 8-bit RGB: EXIF rotation applied, transparency laid over white, 16 bits scaled to 8.

    Raises ProblemError when the file is cut off, not a picture, animated, or over `max_pixels`.
    """
    with _open(source, max_pixels) as image:
        orientation = _orientation(image, source)
        try:
            image.load()
            rgb = to_rgb(image)
        except ProblemError:
            raise
        except Exception as error:  # as above: a broken file can fail anywhere in a decoder
            raise ProblemError(f"{_name(source)} cannot be decoded ({_reason(error)})") from error
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _orientation(image: Image.Image, source: Path | io.BytesIO) -> int:
    """EXIF orientation 1..8; 1 when there is none. Decodes a PNG, whose EXIF may stand after the pixels."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except OSError as error:
        raise ProblemError(f"{_name(source)} cannot be decoded ({_reason(error)})") from error
    except Exception:  # broken EXIF does not make a picture unreadable; viewers ignore it too
        return 1
    return value if value in UPRIGHT else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode as 8-bit RGB; the same object when it is RGB already."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Gray levels 0..65535 scaled to 0..255. Pillow's own convert() would clip them at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ProblemError(f"its gray levels are not 8 or 16 bits (mode {image.mode}); save it as an 8-bit picture")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def noise(size: tuple[int, int], key: str) -> Image.Image:
    """Uniform random RGB pixels, the same bytes for the same key on every machine.

    The raw PCG64 stream is used because numpy promises that it never changes; it does not promise that for `integers`.
    """
    width, height = size
    count = width * height * 3
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
    raw = np.random.PCG64(seed).random_raw((count + 7) // 8).astype("<u8").view(np.uint8)[:count]
    return Image.fromarray(raw.reshape(height, width, 3))


def draw_below(picture: Image.Image, text: str) -> Image.Image:
    """The picture with `text` word-wrapped on a white band below it; as wide as before.

    Raises ProblemError when the font has no glyph for a character: a box in its place would ask another question.
    """
    size = max(12, min(40, picture.width // 24))
    font, margin = _font(_face(text), size), size // 2
    lines = _wrap(text, font, max(picture.width - 2 * margin, size))
    step = round(size * 1.25)
    canvas = Image.new("RGB", (picture.width, picture.height + 2 * margin + step * len(lines)), "white")
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((margin, picture.height + margin + number * step), line, fill="black", font=font)
    return canvas


def _face(text: str) -> Path | None:
    """The first font that has every character: Pillow's own (None, mostly ASCII), then matplotlib's DejaVu Sans."""
    characters = {char for char in text if not char.isspace()}
    if all(_has_glyph(None, char) for char in characters):
        return None
    wide = _wide_font()
    missing = sorted(char for char in characters if not _has_glyph(wide, char))
    if missing:
        raise ProblemError(f"cannot be drawn: the font has no {', '.join(map(repr, missing[:5]))}")
    return wide


@cache
def _wide_font() -> Path | None:
    package = find_spec("matplotlib")  # found without importing it, which takes half a second
    return Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if package and package.origin else None


@cache
def _font(face: Path | None, size: int) -> ImageFont.FreeTypeFont:
    if face is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(face, size, layout_engine=ImageFont.Layout.BASIC)  # not raqm, which a machine may lack


@lru_cache(maxsize=4096)
def _has_glyph(face: Path | None, char: str) -> bool:
    """Whether a character is drawn as itself and not as the box that stands for a missing one."""
    font = _font(face, 24)
    drawn, missing = font.getmask(char), font.getmask("\uffff")
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider alone is broken between characters."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width and len(line) > 1:
                cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines
