"""The same question about a world in which one fact is another one, and so the answer: exact counterfactual pictures.

A counterfactual world differs from a problem's in one fact: one of a thing's values is another, or the thing stands at another
free place (in charts the place is the bar's colour). The number of things, the picture's size, question and options stay;
exactly one option is right there, and it is not the problem's answer. Nothing but what is seen tells the two apart, so no model
can tell by words alone which picture, or which answer to each, is the right one.

Not every problem has one: two bars that change places are two changes, and a colour that is there twice does not vanish by one.
In the split `train` four problems of five do: nearly all of `lookup` and `count`, not quite half of `existence`. In `val` and
`test`, which hold a tenth of all worlds each, it is one of five.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from data_prep.images import ProblemError
from data_prep.rows import Problem
from data_prep.twins.questions import KINDS
from data_prep.twins.worlds import (COLOURS, DIGITS, FAMILIES, HEIGHTS, NUMBERS, PLACES, WAYS, Thing, World, draw,
                                    possible_values)


@dataclass(frozen=True)
class Counterfactual:
    picture: Image.Image    # RGB, of the size of the problem's picture
    name: str               # file name: a world that is drawn elsewhere too has the same name and the same pixels there
    facts: str
    answer: str             # the one option that is right there
    changed: str            # "H white cross -> H black cross"


def right_options(world: World, kind: str, question: str, options: Sequence[str]) -> list[str]:
    """The options, in their order, that are right answers in this world.

    Empty when the question does not apply there: nothing is at H, "red" names two things, two bars are equally tall. Several
    when it asks for one of many: "Which of these colours is there?".

    Raises ProblemError when it is no question of this kind about this family.
    """
    for pattern, right in _FORMS.get((world.family, kind), {}).items():
        if found := re.fullmatch(pattern, question):
            answers = set(right(world, *found.groups()))
            return [option for option in options if option in answers]
    asked = f"{question!r} is no question of kind {kind!r} about {world.family}"
    raise ProblemError(f"question: {asked}; kinds: {', '.join(KINDS)}")


def world_of(problem: Problem) -> World:
    """The world that a problem is about, from its source and facts. ProblemError when no world has such facts."""
    if problem.source not in FAMILIES:
        raise ProblemError(f"{problem.id}: source: {problem.source!r} is no family of twins; families: {', '.join(FAMILIES)}")
    things = []
    for sentence in (problem.facts or "").removesuffix(".").split(". "):
        place, *values = sentence.split(" ")
        if place not in _places(problem.source) or tuple(values) not in possible_values(problem.source, place):
            raise ProblemError(f"{problem.id}: facts: {sentence!r} is nothing that a world of {problem.source} holds")
        things.append(Thing(place, tuple(values)))
    world = World(problem.source, tuple(things))
    if world.facts != problem.facts:
        raise ProblemError(f"{problem.id}: facts: {problem.facts!r:.60} do not end with a full stop")
    if not _is_world(world):
        reason = "two things at one place or alike, or not in reading order"
        raise ProblemError(f"{problem.id}: facts: {reason}: {problem.facts!r:.60}")
    return world


def counterfactual(problem: Problem, *, seed: int) -> Counterfactual | None:
    """One counterfactual of a problem, drawn by (seed, problem.id); None when no single change has another option right.

    Its world belongs to the split of the problem's own: no test world and no unseen combination comes into training. First the
    answer is drawn, each possible one alike, then the change, among those of the things that decide (meta.rationale) where such
    a change leads to that answer, else among all. The other way round, counts would nearly always fall, because a count's
    rationale names only what is counted.

    Raises ProblemError when the problem is not one of the twins: facts, kind or answer are none of theirs.
    """
    world, kind = world_of(problem), problem.meta.get("kind")
    if problem.options is None:
        raise ProblemError(f"{problem.id}: options: missing; a counterfactual is one in which another option is right")
    try:
        right = right_options(world, kind, problem.question, problem.options)
    except ProblemError as error:
        raise ProblemError(f"{problem.id}: {error}") from error
    if right != [problem.answer]:
        by_facts = " and ".join(right) or "none"
        raise ProblemError(f"{problem.id}: answer: {problem.answer!r}, but by the facts right is {by_facts}")
    split, of_answer = world.split, defaultdict(list)
    for old, new, changed in _changes(world):
        right = right_options(changed, kind, problem.question, problem.options)
        if len(right) == 1 and right[0] != problem.answer and changed.split == split:
            of_answer[right[0]].append((old, new, changed))
    if not of_answer:
        return None
    rng = random.Random(f"counterfactual\0{seed}\0{problem.id}")
    answer = rng.choice([option for option in problem.options if option in of_answer])
    deciding = {sentence.split(" ")[0] for sentence in problem.meta.get("rationale", "").removesuffix(".").split(". ")}
    found = of_answer[answer]
    old, new, changed = rng.choice([one for one in found if one[0].place in deciding] or found)
    return Counterfactual(draw(changed), f"{changed.family}-{changed.key[:16]}.png", changed.facts, answer, f"{old} -> {new}")


def _places(family: str) -> tuple[str, ...]:
    return tuple(COLOURS) if family == "charts" else PLACES


def _is_world(world: World) -> bool:
    """Each place is taken once, lettered cells stand in reading order, and there is one red circle at most."""
    places = [thing.place for thing in world.things]
    alike = world.family == "shapes" and len({thing.values for thing in world.things}) < len(places)
    return len(set(places)) == len(places) and (world.family == "charts" or places == sorted(places)) and not alike


def _changes(world: World) -> Iterator[tuple[Thing, Thing, World]]:
    """(thing, what it becomes, world) for every world that differs in one fact, in a fixed order."""
    taken = {thing.place for thing in world.things}
    for number, old in enumerate(world.things):
        other_values = [Thing(old.place, values) for values in possible_values(world.family, old.place)
                        if sum(a != b for a, b in zip(values, old.values)) == 1]
        other_places = [Thing(place, old.values) for place in _places(world.family) if place not in taken]
        for new in (*other_values, *other_places):
            things = (*world.things[:number], new, *world.things[number + 1:])
            if world.family != "charts":        # bars keep their order, cells are listed in reading order
                things = tuple(sorted(things, key=lambda thing: thing.place))
            if _is_world(changed := World(world.family, things)):
                yield old, new, changed


# What is right, from a world and the words that the question leaves open. An answer that is no option is left out afterwards.

def _value(which: int) -> Callable[[World, str], list[str]]:
    return lambda world, place: [thing.values[which] for thing in world.things if thing.place == place]


def _how_many(world: World, value: str) -> list[str]:
    return [NUMBERS[sum(thing.values[0] == value for thing in world.things)]]


def _how_many_taller(world: World, height: str) -> list[str]:
    return [NUMBERS[sum(NUMBERS.index(bar.values[0]) > NUMBERS.index(height) for bar in world.things)]]


def _there(world: World) -> list[str]:
    return [thing.values[0] for thing in world.things]


def _same(world: World, place: str) -> list[str]:
    value = _value(0)(world, place)
    return [thing.place for thing in world.things if thing.place != place and [thing.values[0]] == value]


def _smaller(one: list[int], two: list[int], names: Sequence[str]) -> list[str]:
    """The name whose measure is the smaller one; none when they are equal, or when either name has no measure or several."""
    return [names[one > two]] if len(one) == len(two) == 1 and one != two else []


def _larger(scale: Sequence[str]) -> Callable[..., list[str]]:
    return lambda world, *places: _smaller(*([-scale.index(value) for value in _value(0)(world, place)]
                                             for place in places), places)


def _right_of(world: World, colour: str) -> list[str]:
    return [right.place for bar, right in zip(world.things, world.things[1:]) if bar.place == colour]


def _sooner(axis: int) -> Callable[..., list[str]]:
    """By column (0) or row (1) of what each value names."""
    return lambda world, *values: _smaller(*([_where(thing.place)[axis] for thing in world.things if thing.values[0] == value]
                                             for value in values), values)


def _leads_to(world: World, place: str) -> list[str]:
    ends = [(x + dx, y + dy) for (x, y), (dx, dy) in ((_where(place), WAYS[way]) for way in _value(0)(world, place))]
    return [PLACES[x + 3 * y] for x, y in ends if 0 <= x < 3 and 0 <= y < 3]


def _where(place: str) -> tuple[int, int]:
    return PLACES.index(place) % 3, PLACES.index(place) // 3


_CELL, _WORD = f"([{''.join(PLACES)}])", "([a-z]+)"
_FORMS: dict[tuple[str, str], dict[str, Callable[..., list[str]]]] = {
    ("shapes", "lookup"): {rf"What colour is the shape at {_CELL}\?": _value(0), rf"Which shape is at {_CELL}\?": _value(1)},
    ("charts", "lookup"): {rf"How tall is the {_WORD} bar\?": _value(0)},
    ("tables", "lookup"): {rf"Which number is at {_CELL}\?": _value(0)},
    ("paths", "lookup"): {rf"Which way does the arrow at {_CELL} point\?": _value(0)},
    ("shapes", "count"): {rf"How many shapes are {_WORD}\?": _how_many},
    ("charts", "count"): {rf"How many bars are taller than ({'|'.join(HEIGHTS)})\?": _how_many_taller},
    ("tables", "count"): {rf"How many cells hold {_WORD}\?": _how_many},
    ("paths", "count"): {rf"How many arrows point {_WORD}\?": _how_many},
    ("shapes", "existence"): {r"Which of these colours is there\?": _there},
    ("charts", "existence"): {r"Which of these heights has a bar\?": _there},
    ("tables", "existence"): {r"Which of these numbers is there\?": _there},
    ("paths", "existence"): {r"Which of these ways does an arrow point\?": _there},
    ("shapes", "compare"): {rf"Which cell has the same colour as {_CELL}\?": _same},
    ("charts", "compare"): {rf"Which bar is taller, {_WORD} or {_WORD}\?": _larger(HEIGHTS)},
    ("tables", "compare"): {rf"Which holds the larger number, {_CELL} or {_CELL}\?": _larger(DIGITS)},
    ("paths", "compare"): {rf"Which arrow points the same way as {_CELL}\?": _same},
    ("charts", "relation"): {rf"Which bar is just right of the {_WORD} bar\?": _right_of},
    ("paths", "relation"): {rf"To which cell does the arrow at {_CELL} lead\?": _leads_to},
    **{(family, "relation"): {rf"Which is further left, {_WORD} or {_WORD}\?": _sooner(0),
                              rf"Which is higher up, {_WORD} or {_WORD}\?": _sooner(1)} for family in ("shapes", "tables")},
}
