"""Four families of small worlds, each exact in words (`facts`) and in pixels (`draw`).

A world is a row of things. In `shapes`, `tables` and `paths` a thing sits in one of nine lettered cells

    A B C
    D E F          cell i is column i % 3, row i // 3
    G H I

and in `charts` a thing is a bar, named by its colour, left to right. Everything lies on a grid of 28 pixels, the size
that one visual token of Qwen2.5-VL covers, and on the processor's mean colour: on white, a small vision tower has to
spend its normalisation on the background and learns shapes long before colours.
"""

import hashlib
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 28                                   # pixels; one merged visual token
BACKGROUND = (123, 117, 104)                # the image processor's mean colour
PLACES = tuple("ABCDEFGHI")
COLOURS = {"red": (230, 30, 40), "blue": (30, 70, 235), "green": (30, 170, 60),
           "yellow": (245, 220, 30), "black": (0, 0, 0), "white": (255, 255, 255)}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HEIGHTS = NUMBERS[1:7]                      # a bar is one to six half-cells tall
DIGITS = NUMBERS[1:]                        # what a table's cell may hold
WAYS = {"up": (0, -1), "right": (1, 0), "down": (0, 1), "left": (-1, 0)}
FAMILIES = ("shapes", "charts", "tables", "paths")
LEVELS = (1, 2, 3, 4)                       # a world of level n holds n + 1 things
SPLITS = ("train", "val", "test", "test_new")


@dataclass(frozen=True)
class Thing:
    """One thing. `place`: letter of its cell, or the bar's colour in charts. `values`: what is there, in words."""
    place: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.place, *self.values))


@dataclass(frozen=True)
class World:
    family: str
    things: tuple[Thing, ...]               # in reading order

    @property
    def level(self) -> int:
        return len(self.things) - 1

    @property
    def facts(self) -> str:
        return " ".join(f"{thing}." for thing in self.things)

    @property
    def key(self) -> str:
        """Content hash: equal worlds have equal keys, whatever seed drew them."""
        return hashlib.sha256(f"{self.family}: {self.facts}".encode()).hexdigest()

    @property
    def new(self) -> bool:
        """True when some thing is a combination that training never shows."""
        return any(is_new(self.family, thing) for thing in self.things)

    @property
    def split(self) -> str:
        """The one split this world may appear in, a function of its content: no world is in two splits."""
        if self.new:
            return "test_new"
        return {0: "test", 1: "val"}.get(int(self.key[:8], 16) % 10, "train")


def is_new(family: str, thing: Thing) -> bool:
    """Whether the thing is one of the combinations kept for `test_new`; place and value are each known from other ones."""
    if family == "shapes":                  # a colour with a shape
        colour, shape = thing.values
        return list(COLOURS).index(colour) == SHAPES.index(shape)
    if family == "charts":                  # a colour with a height
        return list(COLOURS).index(thing.place) == HEIGHTS.index(thing.values[0])
    if family == "tables":                  # a cell with a digit
        return (2 * PLACES.index(thing.place)) % 9 == DIGITS.index(thing.values[0])
    return PLACES.index(thing.place) % 4 == list(WAYS).index(thing.values[0])      # a cell with a direction


def possible_values(family: str, place: str) -> list[tuple[str, ...]]:
    """All values a thing at `place` can have, new combinations included."""
    if family == "shapes":
        return [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [(value,) for value in {"charts": HEIGHTS, "tables": DIGITS, "paths": tuple(WAYS)}[family]]


def sample_world(rng: random.Random, family: str, level: int, split: str) -> World:
    """One world of `family` with level + 1 things that belongs to `split` (drawn until it does)."""
    while True:
        n = level + 1
        if family == "charts":
            places = rng.sample(list(COLOURS), n)
        else:
            places = sorted(rng.sample(PLACES, n))
        # Often fewer values than things: repeats are what makes counting and comparing worth asking.
        firsts = sorted({values[0] for values in possible_values(family, "A")})
        palette = rng.sample(firsts, rng.randint(1, min(n, len(firsts))))
        firsts = palette + rng.choices(palette, k=n - len(palette))
        rng.shuffle(firsts)
        things: list[Thing] = []
        for place, first in zip(places, firsts):
            free = [values for values in possible_values(family, place) if values[0] == first
                    and (split == "test_new" or not is_new(family, Thing(place, values)))
                    and not (family == "shapes" and any(values == thing.values for thing in things))]    # one red circle at most
            if not free:
                break
            things.append(Thing(place, rng.choice(free)))
        world = World(family, tuple(things))
        if len(things) == n and world.split == split:
            return world


def draw(world: World) -> Image.Image:
    """The world as an RGB picture: 84 x 84 pixels, charts 28 pixels wide per bar (at least 56) and 84 high."""
    if world.family == "charts":
        return _draw_bars(world)
    picture = Image.new("RGB", (3 * CELL, 3 * CELL), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for i, letter in enumerate(PLACES):
        x, y = i % 3 * CELL, i // 3 * CELL
        if world.family == "tables":
            pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline=(90, 86, 76))
        pen.text((x + 2, y + 1), letter, fill=(190, 186, 176), font=_font(8))
    for thing in world.things:
        i = PLACES.index(thing.place)
        x, y = i % 3 * CELL + CELL // 2 + 1, i // 3 * CELL + CELL // 2 + 1
        if world.family == "shapes":
            _draw_shape(pen, x, y, *thing.values)
        elif world.family == "tables":
            pen.text((x, y), str(NUMBERS.index(thing.values[0])), fill=(0, 0, 0), font=_font(20), anchor="mm")
        else:
            _draw_arrow(pen, x, y, *WAYS[thing.values[0]])
    return picture


def _draw_shape(pen: ImageDraw.ImageDraw, x: int, y: int, colour: str, shape: str) -> None:
    fill, r = COLOURS[colour], 9
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    else:
        pen.rectangle((x - r, y - 3, x + r, y + 3), fill=fill)
        pen.rectangle((x - 3, y - r, x + 3, y + r), fill=fill)


def _draw_arrow(pen: ImageDraw.ImageDraw, x: int, y: int, dx: int, dy: int) -> None:
    tip, tail, wing = 10, 9, 7
    pen.line((x - dx * tail, y - dy * tail, x + dx * 2, y + dy * 2), fill=(0, 0, 0), width=4)
    pen.polygon([(x + dx * tip, y + dy * tip), (x + dy * wing, y + dx * wing), (x - dy * wing, y - dx * wing)],
                fill=(0, 0, 0))


def _draw_bars(world: World) -> Image.Image:
    picture = Image.new("RGB", (CELL * max(2, len(world.things)), 3 * CELL), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for i, bar in enumerate(world.things):
        height = (HEIGHTS.index(bar.values[0]) + 1) * CELL // 2
        pen.rectangle((i * CELL + 5, 3 * CELL - height, i * CELL + 22, 3 * CELL - 1), fill=COLOURS[bar.place])
    return picture


_FONTS: dict[int, ImageFont.FreeTypeFont] = {}


def _font(size: int) -> ImageFont.FreeTypeFont:
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    return _FONTS[size]
