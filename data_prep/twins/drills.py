"""Exercises that only the embedded model's pre-training asks: long answers, so that every forward pass says much.

Reading off one thing at a time is what the five kinds of question are made of. Learned first, it shortens the plateau on which a
model knows what is there but not where: repeating the facts in another order cannot be done without going from a place to what
stands there.
"""

import random
from collections.abc import Iterator

from data_prep.twins.worlds import World, possible_values

DESCRIBE = {"facts": "Repeat the facts in any order.", "picture": "Describe the picture."}
_LIST = {"shapes": "Which cells are {}?", "charts": "Which bars are as tall as {}?", "tables": "Which cells hold {}?",
         "paths": "Which arrows point {}?"}
_PAIR = {"shapes": "Which colours are at {} and {}?", "charts": "How tall are the {} bar and the {} bar?",
         "tables": "Which numbers are at {} and {}?", "paths": "Which ways do the arrows at {} and {} point?"}


def in_any_order(world: World, rng: random.Random) -> str:
    """The facts, shuffled."""
    return " ".join(f"{thing}." for thing in rng.sample(world.things, len(world.things)))


def drills(world: World, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Question and open answer: a list, a pair, and in shapes a place."""
    have = sorted({thing.values[0] for thing in world.things})
    every = sorted({values[0] for values in possible_values(world.family, "A")})
    value = rng.choice(have if rng.random() < 0.7 else every)
    yield _LIST[world.family].format(value), ", ".join(t.place for t in world.things if t.values[0] == value) or "none"
    one, two = rng.sample(world.things, 2)
    yield _PAIR[world.family].format(one.place, two.place), f"{one.place} {one.values[0]}, {two.place} {two.values[0]}"
    if world.family == "shapes":
        thing = rng.choice(world.things)
        yield f"Where is the {' '.join(thing.values)}?", thing.place
