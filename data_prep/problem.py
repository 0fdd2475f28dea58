"""A problem and how it is shown: the one place where a problem becomes a prompt.

    python -m data_prep.problem check FILE [--skip-bad]

Files and their checks are in data_prep.read, pixels in data_prep.images; their names are importable from here.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from PIL import Image
from rich.table import Table

from data_prep import images
from data_prep.images import MAX_PIXELS, ProblemError
from data_prep.libraries import console
from data_prep.read import LETTERS, Problem, read_problems, write_problems

__all__ = [
    "LETTERS", "MAX_PIXELS", "Problem", "ProblemError", "Prompt", "View", "load_image", "partners", "possible_views",
    "read_problems", "render", "shown_options", "write_problems",
]  # fmt: skip


class View(str, Enum):
    """How a problem is shown. The question and its options are the same in every view."""

    both = "both"  # picture and facts
    vision = "vision"  # picture
    text = "text"  # facts
    blind = "blind"  # neither
    white = "white"  # the picture replaced, same size: every channel 255
    black = "black"  # 0
    gray = "gray"  # 128
    noise = "noise"  # uniform random pixels
    shuffled = "shuffled"  # another problem's picture, brought to this one's size
    conflict = "conflict"  # own picture, another problem's facts
    rendered = "rendered"  # the question drawn below the picture, not in the text


LEVELS = {View.white: 255, View.black: 0, View.gray: 128}
SHOWS_FACTS = {View.both, View.text, View.conflict}
NO_PICTURE = {View.text, View.blind}
TAIL = {"text": "Answer with one of the options.", "letter": "Answer with the option's letter."}
OPEN_TAIL = "Answer briefly."
RENDERED_TEXT = "Answer the question in the picture."


@dataclass(frozen=True)
class Prompt:
    """What a model is shown, and what a right answer says."""

    messages: list[dict]  # one user turn; its {"type": "image"} part, if any, stands before the text
    images: tuple[Image.Image, ...]  # RGB, in the order of the image parts
    answer: str  # the option's letter, the option's text, or the open answer
    choices: tuple[str, ...] | None  # what may be said, in the order shown; None: open
    options: tuple[str, ...] | None  # option texts in the order shown


def load_image(problem: Problem) -> Image.Image:
    """The problem's picture as upright 8-bit RGB; see images.load. ProblemError names the problem."""
    return _of_picture(problem, images.load)


def _of_picture(problem: Problem, function):
    if problem.image is None:
        raise ProblemError(f"{problem.id}: image: the problem has no picture")
    try:
        return function(images.picture_path(problem.root, problem.image), problem.max_pixels)
    except ProblemError as error:
        raise ProblemError(f"{problem.id}: image: {error}") from error


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def shown_options(problem: Problem) -> tuple[str, ...] | None:
    """The options in the order in which every view shows them: permuted by a hash of the problem's id."""
    if problem.options is None:
        return None
    order = sorted(range(len(problem.options)), key=lambda number: _hash("option", problem.id, number))
    return tuple(problem.options[number] for number in order)


def _impossible(problem: Problem, view: View, other: Problem | None) -> str | None:
    """Why the problem cannot have the view; None when it can."""
    if view not in NO_PICTURE and problem.image is None:
        return "the problem has no picture"
    if view in (View.both, View.text) and problem.facts is None:
        return "the problem has no facts"
    if view in (View.shuffled, View.conflict) and other is None:
        return "no other problem was given"
    if view is View.shuffled:
        if other.image is None:
            return f"the other problem ({other.id}) has no picture"
        if (other.root, other.image) == (problem.root, problem.image):
            return f"the other problem ({other.id}) has the same picture"
    if view is View.conflict:
        if other.facts is None:
            return f"the other problem ({other.id}) has no facts"
        if other.facts == problem.facts:
            return f"the other problem ({other.id}) has the same facts"
    return None


def possible_views(problem: Problem, other: Problem | None = None) -> tuple[View, ...]:
    """The views that `render(problem, view, other)` can make, as far as is known without opening a picture."""
    return tuple(view for view in View if _impossible(problem, view, other) is None)


def render(problem: Problem, view: View | str, other: Problem | None = None) -> Prompt:
    """The problem as a chat prompt of one user turn.

    other: the problem whose picture (`shuffled`) or facts (`conflict`) are borrowed; see `partners`.
    Raises ProblemError, naming id and view, when the problem cannot have the view.
    """
    try:
        view = View(view)
    except ValueError as error:
        raise ProblemError(f"{problem.id}: no such view {view!r}; views: {', '.join(v.value for v in View)}") from error
    if reason := _impossible(problem, view, other):
        raise ProblemError(f"{problem.id}: view {view.value}: {reason}")
    options = shown_options(problem)
    style = problem.meta.get("answer_with", "letter")
    question = [problem.question]
    choices, answer, tail = None, problem.answer, OPEN_TAIL
    if options is not None:
        tail = TAIL[style]
        if style == "letter":
            choices = tuple(LETTERS[: len(options)])
            answer = choices[options.index(problem.answer)]
            question.append("\n".join(f"{letter}. {option}" for letter, option in zip(choices, options)))
        else:
            choices = options
            question.append("Options: " + ", ".join(options))
    question.append(tail)
    text = "\n".join(question).strip()
    try:
        pictures = _pictures(problem, view, other, text)
    except ProblemError as error:
        raise ProblemError(f"{problem.id}: view {view.value}: {error}") from error
    if view is View.rendered:
        text = RENDERED_TEXT
    elif view in SHOWS_FACTS:
        facts = other.facts if view is View.conflict else problem.facts
        text = f"Facts: {facts}\n{text}".strip()
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    return Prompt([{"role": "user", "content": content}], pictures, answer, choices, options)


def _pictures(problem: Problem, view: View, other: Problem | None, question: str) -> tuple[Image.Image, ...]:
    if view in NO_PICTURE:
        return ()
    if view in (View.both, View.vision, View.conflict):
        return (load_image(problem),)
    if view is View.rendered:
        return (images.draw_below(load_image(problem), question),)
    size = _of_picture(problem, images.upright_size)
    if view is View.shuffled:
        borrowed = load_image(other)
        return (borrowed if borrowed.size == size else borrowed.resize(size, Image.Resampling.BICUBIC),)
    if view is View.noise:
        return (images.noise(size, problem.id),)
    return (Image.new("RGB", size, (LEVELS[view],) * 3),)


def partners(problems: Sequence[Problem]) -> list[Problem | None]:
    """For each problem another one of the same source with another picture, for `shuffled` and `conflict`.

    Deterministic: problems of a source stand in a ring ordered by a hash of their ids, and each takes the next one that
    has another picture, and other facts where one of the next 50 has them. None for a problem without picture, and
    where the whole source shows one picture. Problems with facts and without are partnered among themselves. Linear
    time.
    """
    rings: dict[tuple, list[int]] = {}
    for index, problem in enumerate(problems):
        if problem.image is not None:
            rings.setdefault((problem.source, problem.facts is None), []).append(index)
    found: list[Problem | None] = [None] * len(problems)
    for ring in rings.values():
        ring.sort(key=lambda index: _hash("partner", problems[index].id))
        members = [problems[index] for index in ring]
        pictures = [(str(member.root), member.image) for member in members]
        count = len(ring)
        step = [0] * count  # how many places on the next other picture stands; 0: there is none
        if len(set(pictures)) > 1:
            for place in range(2 * count - 1, -1, -1):  # two rounds, because the last ones look past the ring's start
                here, following = place % count, (place + 1) % count
                step[here] = 1 if pictures[here] != pictures[following] else step[following] + 1
            for place, index in enumerate(ring):
                found[index] = _partner(members, pictures, place, step[place])
    return found


def _partner(members: list[Problem], pictures: list[tuple], place: int, first: int) -> Problem:
    count, facts = len(members), members[place].facts
    for offset in range(first, min(first + 50, count)):
        there = (place + offset) % count
        if pictures[there] != pictures[place] and (facts is None or members[there].facts != facts):
            return members[there]
    return members[(place + first) % count]


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
            "pictures": str(len({problem.image for problem in part} - {None})),
            "views": ", ".join(
                v.value if views[v] == len(part) else f"{v.value} ({views[v]})" for v in View if views[v]
            ),
            **_balance(part),
        }
    table = Table("", *columns)
    for name in next(iter(columns.values()), {}):
        table.add_row(name, *(column[name] for column in columns.values()))
    return table


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
