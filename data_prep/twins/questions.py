"""Five kinds of question about a world, with answers balanced so that the words of a question say nothing about its answer.

Kinds: `lookup`, `count`, `existence`, `compare`, `relation`. Every kind proposes candidates (question, answer, options) of one
world; a `Balance` then takes the answer that was used least so far for questions of the same wording.

Every question carries its rationale, the facts that decide it and no others: "A red. C red." for how many shapes are red. Only
where everything decides (which of two bars is taller) is it all that the facts say.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations

from data_prep.twins.worlds import (COLOURS, DIGITS, HEIGHTS, NUMBERS, PLACES, WAYS, Thing, World, is_new,
                                    possible_values)

KINDS = ("lookup", "count", "existence", "compare", "relation")


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    options: tuple[str, ...]
    wording: str            # what a reader without the facts could condition on; answers are balanced within it
    rationale: str          # the things that decide the answer, in the words of the facts: see `_because`


class Balance:
    """Chooses among candidates so that, within a wording, no answer is used more than `slack` times oftener than another."""

    def __init__(self, slack: int = 3) -> None:
        self.slack = slack
        self.used: dict[str, Counter] = defaultdict(Counter)

    def choose(self, rng: random.Random, candidates: list[Question]) -> Question | None:
        """One candidate, or None when taking any would tip the balance."""
        def excess(question: Question) -> int:
            used = self.used[question.wording]
            return used[question.answer] - min(used[option] for option in question.options)

        if not candidates:
            return None
        rng.shuffle(candidates)
        best = min(candidates, key=excess)
        if excess(best) >= self.slack:
            return None
        self.used[best.wording][best.answer] += 1
        return best


def ask(world: World, rng: random.Random, balance: Balance, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """At most one question of each kind about `world`, in the order of `kinds`."""
    chosen = (balance.choose(rng, list(_CANDIDATES[kind](world, rng))) for kind in kinds)
    return [question for question in chosen if question is not None]


def _because(things: Iterable[Thing], values: int = 1) -> str:
    """A rationale: the things that decide, each up to the last value that does, worded as in the facts; "none." without any."""
    return " ".join(f"{Thing(thing.place, thing.values[:values])}." for thing in things) or "none."


def _options(rng: random.Random, answer: str, others: list[str], first: Iterable[str] = (), n: int = 4) -> tuple[str, ...]:
    """The answer among up to n - 1 others, those of `first` before the rest, sorted: the order in which they are shown is decided
    where they are shown."""
    first = sorted(set(first) & set(others) - {answer})
    rest = sorted(set(others) - set(first) - {answer})
    wrong = rng.sample(first, len(first)) + rng.sample(rest, len(rest))
    return tuple(sorted([answer, *wrong[:n - 1]]))


def _lookup(world: World, rng: random.Random) -> Iterator[Question]:
    for thing in world.things:
        for which in range(len(thing.values)):
            def allowed(value: str) -> bool:
                """Wrong options must be able to be right somewhere in training, or they would betray themselves."""
                changed = thing.values[:which] + (value,) + thing.values[which + 1:]
                return not is_new(world.family, Thing(thing.place, changed))

            text = {"shapes": (f"What colour is the shape at {thing.place}?", f"Which shape is at {thing.place}?"),
                    "charts": (f"How tall is the {thing.place} bar?",),
                    "tables": (f"Which number is at {thing.place}?",),
                    "paths": (f"Which way does the arrow at {thing.place} point?",)}[world.family][which]
            values = sorted({v[which] for v in possible_values(world.family, thing.place)})
            if world.family != "shapes":
                values = [v for v in values if allowed(v)]
            # What stands elsewhere comes first among the wrong options, or "which of these is there" would be answer enough.
            elsewhere = [other.values[which] for other in world.things]
            yield Question("lookup", text, thing.values[which], _options(rng, thing.values[which], values, elsewhere), text,
                           _because([thing], which + 1))


def _count(world: World, rng: random.Random) -> Iterator[Question]:
    options = NUMBERS[:min(3, len(world.things)) + 1]
    if world.family == "charts":
        counted = {f"How many bars are taller than {NUMBERS[t]}?": [bar for bar in world.things if bar.values[0] in HEIGHTS[t:]]
                   for t in (2, 3, 4)}
    else:
        pattern = {"shapes": "How many shapes are {}?", "tables": "How many cells hold {}?",
                   "paths": "How many arrows point {}?"}[world.family]
        counted = {pattern.format(v): [thing for thing in world.things if thing.values[0] == v]
                   for v in sorted({v[0] for v in possible_values(world.family, "A")})}
    for text, things in counted.items():
        if len(things) < len(options):
            yield Question("count", text, NUMBERS[len(things)], options, f"{text} {len(options)}", _because(things))


def _existence(world: World, rng: random.Random) -> Iterator[Question]:
    have = {thing.values[0]: thing for thing in reversed(world.things)}      # the first thing of each value
    text = {"shapes": "Which of these colours is there?", "charts": "Which of these heights has a bar?",
            "tables": "Which of these numbers is there?", "paths": "Which of these ways does an arrow point?"}[world.family]
    absent = sorted({values[0] for values in possible_values(world.family, "A")} - set(have))
    if absent:
        for value in sorted(have):
            options = _options(rng, value, absent)
            yield Question("existence", text, value, options, f"{text} {len(options)}", _because([have[value]]))


def _compare(world: World, rng: random.Random) -> Iterator[Question]:
    if world.family in ("charts", "tables"):
        scale = HEIGHTS if world.family == "charts" else DIGITS
        for one, two in permutations(world.things, 2):
            difference = scale.index(one.values[0]) - scale.index(two.values[0])
            if difference:
                text = (f"Which bar is taller, {one.place} or {two.place}?" if world.family == "charts"
                        else f"Which holds the larger number, {one.place} or {two.place}?")
                pair = tuple(sorted((one.place, two.place)))
                yield Question("compare", text, (one if difference > 0 else two).place, pair, text,
                               _because([one, two]))
        return
    for one in world.things:
        same = [thing for thing in world.things if thing is not one and thing.values[0] == one.values[0]]
        other = [thing.place for thing in world.things if thing.values[0] != one.values[0]]
        if same and other:
            text = (f"Which cell has the same colour as {one.place}?" if world.family == "shapes"
                    else f"Which arrow points the same way as {one.place}?")
            match = rng.choice(same)
            yield Question("compare", text, match.place, _options(rng, match.place, other), text, _because([one, match]))


def _relation(world: World, rng: random.Random) -> Iterator[Question]:
    if world.family == "charts":
        for bar, right in zip(world.things, world.things[1:]):
            text = f"Which bar is just right of the {bar.place} bar?"
            others = [colour for colour in COLOURS if colour != bar.place]
            options = _options(rng, right.place, others, (other.place for other in world.things))
            yield Question("relation", text, right.place, options, text, _because([bar, right]))
    elif world.family == "paths":
        yield from _leads_to(world)
    else:
        have = Counter(thing.values[0] for thing in world.things)
        for one, two in permutations(world.things, 2):
            a, b = one.values[0], two.values[0]
            if have[a] > 1 or have[b] > 1:
                continue                    # "red" must name one thing
            (x1, y1), (x2, y2) = _where(one.place), _where(two.place)
            for word, first, second in (("further left", x1, x2), ("higher up", y1, y2)):
                if first != second:
                    text = f"Which is {word}, {a} or {b}?"
                    yield Question("relation", text, a if first < second else b, tuple(sorted((a, b))), text,
                                   _because([one, two]))


def _leads_to(world: World) -> Iterator[Question]:
    """To which neighbour does an arrow lead? Only neighbours that it could lead to in training are options, or the others would
    betray themselves."""
    for thing in world.things:
        x, y = _where(thing.place)
        ends = {way: PLACES[x + dx + 3 * (y + dy)] for way, (dx, dy) in WAYS.items()
                if 0 <= x + dx < 3 and 0 <= y + dy < 3
                and (thing.values == (way,) or not is_new("paths", Thing(thing.place, (way,))))}
        if thing.values[0] in ends and len(ends) > 1:
            text = f"To which cell does the arrow at {thing.place} lead?"
            yield Question("relation", text, ends[thing.values[0]], tuple(sorted(ends.values())), text, _because([thing]))


def _where(place: str) -> tuple[int, int]:
    return PLACES.index(place) % 3, PLACES.index(place) // 3


_CANDIDATES = {"lookup": _lookup, "count": _count, "existence": _existence, "compare": _compare, "relation": _relation}
