"""What a problem is, and the check of a row that should be one."""

import difflib
import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from data_prep.images import MAX_PIXELS, ProblemError

T = TypeVar("T")
LETTERS = string.ascii_uppercase
ANSWER_WITH = ("letter", "text")
PUBLISHED_VIEWS = ("both", "vision", "rendered")  # names of problem.View that a data set may publish a form of its own for
MARKER = re.compile("<image ([0-9]{1,4})>")  # where in a text the picture with this number, counted from 1, stands


@dataclass(frozen=True)
class Problem:
    """One question about a picture, or several, whose facts may also be known in words.

    Question, options and facts may say with `<image 1>`, `<image 2>`, ... where each picture stands in them.

    meta is free but for these keys, all optional:
        answer_with: "letter" (default) or "text": what a model says when there are options.
        keep_order: true: the options are shown in this order, because a picture shows their letters.
        rationale: a short worked way to the answer.
        published: what a data set itself publishes for a view, in place of what `problem.render` would make:
            {"both" | "vision" | "rendered": {"image": path or list of paths, "question": text or null}}, either key or
            both. A missing key means the problem's own; question null: the pictures show question and options.
    """

    id: str
    group: str  # problems that are not independent (one picture, one sentence) share a group
    source: str
    image: str | tuple[str, ...] | None  # path relative to `root`, "/"-separated, or several; None: no picture
    facts: str | None  # what the picture shows, in words; None: cannot be posed as text
    question: str
    options: tuple[str, ...] | None  # None: open answer
    answer: str  # one of the options when there are options
    license: str
    meta: dict = field(hash=False)
    root: Path = field(default=Path("."), compare=False, repr=False)  # folder of the JSONL file; not written
    max_pixels: int = field(default=MAX_PIXELS, compare=False, repr=False)  # largest picture to load; not written

    @property
    def pictures(self) -> tuple[str, ...]:
        """Paths of the problem's own pictures, in order; empty: none."""
        return as_tuple(self.image)


def as_tuple(image: str | Sequence[str] | None) -> tuple[str, ...]:
    """The paths of an `image` field."""
    return () if image is None else (image,) if isinstance(image, str) else tuple(image)


def one_or_several(paths: Iterable[str]) -> str | tuple[str, ...] | None:
    """Paths as an `image` field holds them: null, a path, or a tuple of two or more."""
    paths = tuple(paths)
    return paths if len(paths) > 1 else paths[0] if paths else None


def named(field: str, image: str | Sequence[T] | None) -> list[tuple[str, T]]:
    """(place, path) of each picture of a field, for messages: "image" where there is one, else "image[0]", ..."""
    paths = as_tuple(image)
    return [(field if len(paths) == 1 else f"{field}[{number}]", path) for number, path in enumerate(paths)]


FIELDS = tuple(f.name for f in fields(Problem) if f.compare)
NULLABLE = ("image", "facts")


def check_row(row: Any) -> dict:
    """The row, if it has exactly the fields of a Problem with right types and values; else ProblemError "<field>: ...".

    `image` and `options` may be lists or tuples. Pictures are not looked at.
    """
    if not isinstance(row, dict):
        raise ProblemError(f"row: must be an object, not {kind_of(row)}")
    for name in row:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise ProblemError(f"{name}: unknown field" + (f"; did you mean {near[0]!r}?" if near else ""))
    for name in FIELDS:
        if name not in row:
            raise ProblemError(f"{name}: missing field")
    for name in FIELDS:
        if name not in ("image", "options", "meta") and not (row[name] is None and name in NULLABLE):
            check_text(name, row[name], " or null" if name in NULLABLE else "")
    if row["image"] is not None:
        _check_paths("image", row["image"], "text, a list or null")
    if row["image"] is None and row["facts"] is None:
        raise ProblemError("facts: a problem needs a picture or facts, this one has neither")
    _check_meta(row["meta"])
    if row["options"] is not None:
        _check_options(row)
    _check_markers(row)
    return row


def _check_paths(field: str, image: Any, wanted: str) -> None:
    if not isinstance(image, str | list | tuple):
        raise ProblemError(f"{field}: must be {wanted}, not {kind_of(image)}")
    if not image and not isinstance(image, str):
        raise ProblemError(f"{field}: is an empty list; no picture is null")
    for place, path in named(field, image):
        check_text(place, path)


def check_text(name: str, value: Any, otherwise: str = "", *, blank: bool = False) -> None:
    """ProblemError unless the value is text that can be written as UTF-8. blank: spaces alone are text too."""
    if not isinstance(value, str):
        raise ProblemError(f"{name}: must be text{otherwise}, not {kind_of(value)}")
    if not (value if blank else value.strip()):
        raise ProblemError(f"{name}: is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProblemError(f"{name}: holds half of a surrogate pair at character {error.start}") from error


def check_object(name: str, value: Any) -> None:
    """ProblemError unless the value is an object that can be written as JSON."""
    if not isinstance(value, dict):
        raise ProblemError(f"{name}: must be an object, not {kind_of(value)}")
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ProblemError(f"{name}: cannot be written as JSON ({error})") from error


def _check_meta(meta: Any) -> None:
    check_object("meta", meta)
    if meta.get("answer_with", "letter") not in ANSWER_WITH:
        raise ProblemError(f"meta: answer_with must be 'letter' or 'text', not {meta['answer_with']!r}")
    if not isinstance(meta.get("keep_order", False), bool):
        raise ProblemError(f"meta.keep_order: must be true or false, not {kind_of(meta['keep_order'])}")
    if "rationale" in meta:
        check_text("meta.rationale", meta["rationale"])
    _check_published(meta.get("published", {}))


def _check_published(published: Any) -> None:
    if not isinstance(published, dict):
        raise ProblemError(f"meta.published: must be an object, not {kind_of(published)}")
    for view, entry in published.items():
        field = f"meta.published.{view}"
        if view not in PUBLISHED_VIEWS:
            raise ProblemError(f"{field}: no such view can be published; views: {', '.join(PUBLISHED_VIEWS)}")
        if not isinstance(entry, dict):
            raise ProblemError(f"{field}: must be an object, not {kind_of(entry)}")
        if not entry or set(entry) - {"image", "question"}:
            raise ProblemError(f"{field}: must hold image, question or both, holds {', '.join(entry) or 'nothing'}")
        if "image" in entry:
            _check_paths(f"{field}.image", entry["image"], "text or a list")
        if entry.get("question") is not None:
            check_text(f"{field}.question", entry["question"])


def _check_markers(row: dict) -> None:
    """Every marker in what a view shows must name one of the pictures that it shows."""
    question, facts = [("question", row["question"])], [("facts", row["facts"] or "")]
    options = [(f"options[{number}]", option) for number, option in enumerate(row["options"] or ())]
    _find_pictures([*question, *facts, *options], row["image"])
    for view, entry in row["meta"].get("published", {}).items():
        texts = [*question, *(facts if view == "both" else ()), *options]
        if "question" in entry:
            said = entry["question"]
            texts = [] if said is None else [(f"meta.published.{view}.question", said), *options]
        _find_pictures(texts, entry.get("image", row["image"]), f"meta.published.{view}")


def _find_pictures(texts: Iterable[tuple[str, str]], image: str | Sequence[str] | None, whose: str = "the problem") -> None:
    count = len(as_tuple(image))
    for place, text in texts:
        for marker in MARKER.finditer(text):
            if not 1 <= int(marker[1]) <= count:
                raise ProblemError(f"{place}: {marker[0]} names no picture; {whose} has {count}")


def _check_options(row: dict) -> None:
    options = row["options"]
    if not isinstance(options, list | tuple):
        raise ProblemError(f"options: must be a list or null, not {kind_of(options)}")
    for number, option in enumerate(options):
        check_text(f"options[{number}]", option)
        if option != option.strip():
            raise ProblemError(f"options[{number}]: {option!r} has spaces at its edge")
    if len(options) < 2:
        raise ProblemError(f"options: needs at least 2, has {len(options)}")
    if len(set(options)) < len(options):
        twice = next(option for option in options if options.count(option) > 1)
        raise ProblemError(f"options: {twice!r} stands there twice")
    if len(options) > len(LETTERS) and row["meta"].get("answer_with", "letter") == "letter":
        raise ProblemError(f"options: {len(options)} options, but {len(LETTERS)} letters; set meta.answer_with to text")
    if row["meta"].get("answer_with", "letter") == "letter" and not row["meta"].get("keep_order"):
        for view, entry in row["meta"].get("published", {}).items():
            if "question" in entry and entry["question"] is None:
                raise ProblemError(f"meta.keep_order: must be true, the pictures of meta.published.{view} show letters")
    if row["answer"] not in options:
        raise ProblemError(f"answer: {row['answer']!r} is not among the options ({', '.join(options)})")


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
