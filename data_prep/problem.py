"""A problem and how it is shown: the one place where a problem becomes a prompt.

    python -m data_prep.problem check FILE [--skip-bad]

What a problem is stands in data_prep.rows, files are in data_prep.read, pixels in data_prep.images, what a prompt is in
data_prep.prompt; their names are importable from here.
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TypeVar

from PIL import Image
from rich.table import Table

from data_prep import images
from data_prep.images import MAX_PIXELS, ProblemError
from data_prep.libraries import console
from data_prep.prompt import Corruption, Prompt, Words, cut, stripped, with_facts
from data_prep.read import LETTERS, MARKER, Problem, as_tuple, named, read_problems, write_problems

__all__ = [
    "Corruption", "LETTERS", "MAX_PIXELS", "Problem", "ProblemError", "Prompt", "View", "Words", "every_picture", "load_images",
    "partners", "possible_views", "read_problems", "render", "shown_options", "shown_pictures", "write_problems",
]  # fmt: skip


class View(str, Enum):
    """How a problem is shown. The question and its options are the same in every view, unless meta.published says else."""

    both = "both"  # pictures and facts
    vision = "vision"  # pictures
    text = "text"  # facts
    blind = "blind"  # neither
    white = "white"  # every picture replaced, same size: every channel 255
    black = "black"  # 0
    gray = "gray"  # 128
    noise = "noise"  # uniform random pixels
    shuffled = "shuffled"  # another problem's pictures, brought to the sizes of this one's
    conflict = "conflict"  # own pictures, another problem's facts
    other_facts = "other_facts"  # no picture, another problem's facts: what the words of `conflict` alone say
    rendered = "rendered"  # the question drawn below the last picture, not in the text


LEVELS = {View.white: 255, View.black: 0, View.gray: 128}
SHOWS_FACTS = {View.both, View.text, View.conflict, View.other_facts}
OTHERS_FACTS = {View.conflict, View.other_facts}
NO_PICTURE = {View.text, View.blind, View.other_facts}
TAIL = {"text": "Answer with one of the options.", "letter": "Answer with the option's letter."}
OPEN_TAIL = "Answer briefly."
RATIONALE_TAIL = "Say first what leads to it, then the answer after 'Answer:'."
RENDERED_TEXT = "Answer the question in the picture."
T = TypeVar("T")


def load_images(problem: Problem) -> tuple[Image.Image, ...]:
    """The problem's own pictures as upright 8-bit RGB; see images.load. ProblemError names the problem and the picture."""
    return _each(problem, problem.pictures, images.load)


def _each(
    problem: Problem, names: Sequence[str], look: Callable[[Path, int], T], field: str = "image"
) -> tuple[T, ...]:
    """What `look` finds in each of some pictures of the problem."""
    if not names:
        raise ProblemError(f"{problem.id}: {field}: the problem has no picture")
    found = []
    for place, name in named(field, names):
        try:
            found.append(look(images.picture_path(problem.root, name), problem.max_pixels))
        except ProblemError as error:
            raise ProblemError(f"{problem.id}: {place}: {error}") from error
    return tuple(found)


def _published(problem: Problem, view: View) -> dict:
    return problem.meta.get("published", {}).get(view.value, {})


def shown_pictures(problem: Problem, view: View) -> tuple[str, ...]:
    """Paths of the pictures that a view is made of: those published for it, else the problem's own."""
    return as_tuple(_published(problem, view).get("image")) or problem.pictures


def every_picture(problem: Problem) -> tuple[str, ...]:
    """Paths of the problem's own pictures and of those published for its views, each once."""
    published = problem.meta.get("published", {}).values()
    return tuple(dict.fromkeys((*problem.pictures, *(name for entry in published for name in as_tuple(entry.get("image"))))))


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def shown_options(problem: Problem) -> tuple[str, ...] | None:
    """The options in the order in which every view shows them: permuted by a hash of the problem's id.

    With meta.keep_order they keep the file's order.
    """
    if problem.options is None or problem.meta.get("keep_order"):
        return problem.options
    order = sorted(range(len(problem.options)), key=lambda number: _hash("option", problem.id, number))
    return tuple(problem.options[number] for number in order)


def _impossible(problem: Problem, view: View, other: Problem | None) -> str | None:
    """Why the problem cannot have the view; None when it can."""
    if view not in NO_PICTURE and not shown_pictures(problem, view):
        return "the problem has no picture"
    if view in (View.both, View.text) and problem.facts is None and not _published(problem, view):
        return "the problem has no facts"
    if (view is View.shuffled or view in OTHERS_FACTS) and other is None:
        return "no other problem was given"
    if view is View.shuffled:
        if not other.pictures:
            return f"the other problem ({other.id}) has no picture"
        if not _paths(other).isdisjoint(_paths(problem)):
            return f"the other problem ({other.id}) has the same picture"
    if view in OTHERS_FACTS:
        if other.facts is None:
            return f"the other problem ({other.id}) has no facts"
        if other.facts == problem.facts:
            return f"the other problem ({other.id}) has the same facts"
    return None


def _paths(problem: Problem) -> set[tuple[str, str]]:
    return {(str(problem.root), name) for name in problem.pictures}


def possible_views(problem: Problem, other: Problem | None = None) -> tuple[View, ...]:
    """The views that `render(problem, view, other)` can make, as far as is known without opening a picture."""
    return tuple(view for view in View if _impossible(problem, view, other) is None)


def render(
    problem: Problem,
    view: View | str,
    other: Problem | None = None,
    *,
    rationale: bool = False,
    question: bool = True,
) -> Prompt:
    """The problem as a chat prompt of one user turn.

    A picture stands where its marker `<image N>` first occurs in the text, instead of it; pictures without a marker stand
    before the text, in order. Markers of pictures that the view does not show stay as text. The text parts are `Words`, which
    know where facts and question stand.

    other: the problem whose pictures (`shuffled`) or facts (`conflict`, `other_facts`) are borrowed; see `partners`.
    rationale: ask for the way to the answer too, and put it into the target.
    question: False leaves the question out (and with a published one whatever facts it holds). Options and instruction stay,
        for they say what may be answered; of an open question the instruction alone. A picture whose marker stood in the
        question then stands before the text, as those without a marker do.
    Raises ProblemError, naming id and view, when the problem cannot have the view, has no rationale, or shows in its picture
    the question that is to be left out.
    """
    try:
        view = View(view)
    except ValueError as error:
        raise ProblemError(f"{problem.id}: no such view {view!r}; views: {', '.join(v.value for v in View)}") from error
    reason = _impossible(problem, view, other)
    if reason is None and rationale and "rationale" not in problem.meta:
        reason = "the problem has no rationale (meta.rationale)"
    if reason:
        raise ProblemError(f"{problem.id}: view {view.value}: {reason}")
    published = _published(problem, view)
    stem = published.get("question", problem.question)  # None: the pictures show it, and the options
    if not question and (stem is None or view is View.rendered):
        raise ProblemError(f"{problem.id}: view {view.value}: the picture shows the question, which cannot be left out")
    options = shown_options(problem)
    style = problem.meta.get("answer_with", "letter")
    lines = [RENDERED_TEXT if stem is None else stem] if question else []
    choices, answer, tail = None, problem.answer, OPEN_TAIL
    if options is not None:
        tail = TAIL[style]
        if style == "letter":
            choices = tuple(LETTERS[: len(options)])
            answer = choices[options.index(problem.answer)]
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(choices, options))
        else:
            choices = options
            listed = "Options: " + ", ".join(options)
        if stem is not None:
            lines.append(listed)
    lines.append(f"{tail} {RATIONALE_TAIL}" if rationale else tail)
    text = stripped("\n".join(lines), [(0, len(stem))] if question and stem is not None else [])
    drawn = str(text) if view is View.rendered and stem is not None else None
    try:
        pictures = _pictures(problem, view, other, drawn)
    except ProblemError as error:
        raise ProblemError(f"{problem.id}: view {view.value}: {error}") from error
    if drawn is not None:
        text = Words(RENDERED_TEXT)
    elif view in SHOWS_FACTS and "question" not in published:
        facts = other.facts if view in OTHERS_FACTS else problem.facts
        text = text if facts is None else with_facts(facts, text)
    content, order = _content(text, len(pictures))
    target = f"{problem.meta['rationale']} Answer: {answer}" if rationale else answer
    messages = [{"role": "user", "content": content}]
    return Prompt(messages, tuple(pictures[number - 1] for number in order), answer, choices, options, target)


def _content(text: Words, count: int) -> tuple[list[dict], list[int]]:
    """(parts of a turn that shows `count` pictures with the text, numbers of the pictures in the order of their parts)."""
    places: dict[int, re.Match] = {}
    for marker in MARKER.finditer(text):
        if 1 <= int(marker[1]) <= count:
            places.setdefault(int(marker[1]), marker)
    order = [number for number in range(1, count + 1) if number not in places]
    parts, end = [{"type": "image"} for _ in order], 0
    for marker in places.values():
        if before := cut(text, end, marker.start()):
            parts.append({"type": "text", "text": before})
        parts.append({"type": "image"})
        end = marker.end()
    return [*parts, {"type": "text", "text": cut(text, end, len(text))}], [*order, *places]


def _pictures(problem: Problem, view: View, other: Problem | None, drawn: str | None) -> tuple[Image.Image, ...]:
    """drawn: text to put below the last picture."""
    if view in NO_PICTURE:
        return ()
    if view in (View.both, View.vision, View.conflict, View.rendered):
        if "image" in _published(problem, view):
            shown = _each(problem, shown_pictures(problem, view), images.load, f"meta.published.{view.value}.image")
        else:
            shown = load_images(problem)
        return shown if drawn is None else (*shown[:-1], images.draw_below(shown[-1], drawn))
    sizes = _each(problem, problem.pictures, images.upright_size)
    if view is View.shuffled:
        borrowed = _each(other, other.pictures[: len(sizes)], images.load)
        turns = [borrowed[number % len(borrowed)] for number in range(len(sizes))]
        return tuple(
            picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
            for picture, size in zip(turns, sizes)
        )
    if view is View.noise:
        keys = [problem.id, *(f"{problem.id}\0{number}" for number in range(2, len(sizes) + 1))]
        return tuple(images.noise(size, key) for size, key in zip(sizes, keys))
    return tuple(Image.new("RGB", size, (LEVELS[view],) * 3) for size in sizes)


def partners(problems: Sequence[Problem]) -> list[Problem | None]:
    """For each problem another one of the same source with other pictures, for `shuffled`, `conflict` and `other_facts`.

    Deterministic: problems of a source stand in a ring ordered by a hash of their ids, and each takes the next one that
    has other pictures: of the next 50 the first that shares no picture, has other facts and is of another group, or that
    lacks as little of this as there is. None for a problem without picture, and where the whole source shows the same.
    Problems with facts and without are partnered among themselves. Linear time.
    """
    rings: dict[tuple, list[int]] = {}
    for index, problem in enumerate(problems):
        if problem.pictures:
            rings.setdefault((problem.source, problem.facts is None), []).append(index)
    found: list[Problem | None] = [None] * len(problems)
    for ring in rings.values():
        ring.sort(key=lambda index: _hash("partner", problems[index].id))
        members = [problems[index] for index in ring]
        pictures = [frozenset(_paths(member)) for member in members]
        count = len(ring)
        step = [0] * count  # how many places on the next other pictures stand; 0: there are none
        if len(set(pictures)) > 1:
            for place in range(2 * count - 1, -1, -1):  # two rounds, because the last ones look past the ring's start
                here, following = place % count, (place + 1) % count
                step[here] = 1 if pictures[here] != pictures[following] else step[following] + 1
            for place, index in enumerate(ring):
                found[index] = _partner(members, pictures, place, step[place])
    return found


def _partner(members: list[Problem], pictures: list[frozenset], place: int, first: int) -> Problem:
    count, own = len(members), members[place]
    best, most = members[(place + first) % count], -1
    for offset in range(first, min(first + 50, count)):
        there = (place + offset) % count
        if pictures[there].isdisjoint(pictures[place]):
            other = members[there]
            # A group may hold one drawing in several pictures (MathVerse); to borrow that would change next to nothing.
            fit = 2 * (own.facts is None or other.facts != own.facts) + (other.group != own.group)
            if fit == 3:
                return other
            if fit > most:
                best, most = other, fit
    return best


def summary(problems: Sequence[Problem]) -> Table:
    """Per source: counts, possible views, and how the answers are spread (what a constant guess scores)."""
    others = dict(zip((problem.id for problem in problems), partners(problems)))
    columns = {}
    for source in sorted({problem.source for problem in problems}):
        part = [problem for problem in problems if problem.source == source]
        views = Counter(view for problem in part for view in possible_views(problem, others[problem.id]))
        columns[source] = {
            "problems": str(len(part)),
            "groups": str(len({problem.group for problem in part})),
            "pictures": str(len({name for problem in part for name in every_picture(problem)})),
            "pictures a problem": _span([len(problem.pictures) for problem in part]),
            "views": ", ".join(
                v.value if views[v] == len(part) else f"{v.value} ({views[v]})" for v in View if views[v]
            ),
            **_balance(part),
        }
    table = Table("", *columns)
    for name in next(iter(columns.values()), {}):
        table.add_row(name, *(column[name] for column in columns.values()))
    return table


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}, mean {sum(counts) / len(counts):.1f}"


def _balance(part: Sequence[Problem]) -> dict[str, str]:
    closed = [problem for problem in part if problem.options is not None]
    answer, times = Counter(problem.answer for problem in part).most_common(1)[0]
    found = {
        "open answers": str(len(part) - len(closed)),
        "commonest answer": f"{answer[:40]!r} {times / len(part):.1%}",
    }
    for name, order in (("file", lambda problem: problem.options), ("prompt", shown_options)):
        places = Counter(order(problem).index(problem.answer) for problem in closed).most_common(1)
        said = f"option {places[0][0] + 1}, {places[0][1] / len(closed):.1%}" if closed else "-"
        found[f"commonest place in the {name}"] = said
    chance = sum(1 / len(problem.options) for problem in closed) / len(closed) if closed else None
    return {"chance": "-" if chance is None else f"{chance:.1%}", **found}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.problem", description="Check a file of problems.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="read a JSONL file, decode its pictures and print what it holds")
    check.add_argument("file")
    check.add_argument("--skip-bad", action="store_true", help="leave bad rows out, write them to <name>.bad.jsonl")
    check.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="largest picture (default: %(default)s pixels)"
    )
    args = parser.parse_args(argv)
    try:
        problems = read_problems(args.file, skip_bad=args.skip_bad, max_pixels=args.max_pixels)
    except ProblemError as error:
        raise SystemExit(str(error)) from error
    console().print(summary(problems))


if __name__ == "__main__":
    main()
