"""Preference pairs on disk: one JSON object a line (utf-8), pictures beside the file. Rows are checked on both ways.

A row has the columns that TRL's DPOTrainer takes, `images`, `prompt`, `chosen` and `rejected`, the last three as chat messages,
and beside them what the losses about pictures need. A field that a row does not need is absent, never null or empty. Only
`images` is always there, an empty list where there is no picture:

    {"id": "...", "group": "...", "source": "...", "license": "CC0-1.0", "images": ["images/a.png"],
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which shape is at A?"}]}],
     "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "cross"}]}],
     "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "circle"}]}],
     "rejected_prior": "circle", "rejected_images": ["images/b.png"], "rejected_images_answer": "circle", "meta": {}}

`python -m data_prep.pairs` makes such files from problems, checks them, and writes what stock trainers take.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep import images
from data_prep.images import MAX_PIXELS, ProblemError
from data_prep.read import VERIFY, BadRows, dump, json_lines, parse_json, picture_check, replacing, side_file
from data_prep.rows import check_object, check_text

ROLES = ("system", "user", "assistant")
REQUIRED = ("id", "group", "source", "license", "images", "prompt", "chosen", "meta")
OPTIONAL = ("rejected", "rejected_prior", "rejected_images", "rejected_images_answer")


@dataclass(frozen=True)
class Pair:
    """Two sides, (pictures, prompt, answer) each: they differ in their answer, in their pictures, or in both.

    One of `rejected`, `rejected_prior` and `rejected_images` is there at least.
    """

    id: str
    group: str  # pairs that are not independent (one picture) share a group
    source: str
    license: str
    # Chat messages before the answer; the content of each is a list of image and text parts.
    prompt: tuple[dict, ...] = field(hash=False)
    chosen: str  # the better answer
    rejected: str | None = None  # a worse answer to the same prompt and pictures
    rejected_prior: str | None = None  # a worse answer that was given without looking: a language prior
    images: tuple[str, ...] = ()  # paths relative to `root`, in the order of the prompt's image parts
    rejected_images: tuple[str, ...] = ()  # as many pictures, for which `chosen` is wrong
    rejected_images_answer: str | None = None  # the right answer for those: such a pair is symmetric
    meta: dict = field(default_factory=dict, hash=False)
    root: Path = field(default=Path("."), compare=False, repr=False)  # folder of the JSONL file; not written
    max_pixels: int = field(default=MAX_PIXELS, compare=False, repr=False)  # largest picture to load; not written

    def load(self, which: str = "images") -> tuple[Image.Image, ...]:
        """The pictures of `images` or `rejected_images` as upright 8-bit RGB. ProblemError names the pair and the picture."""
        found = []
        for number, name in enumerate(getattr(self, which)):
            try:
                found.append(images.load(images.picture_path(self.root, name), self.max_pixels))
            except ProblemError as error:
                raise ProblemError(f"{self.id}: {which}[{number}]: {error}") from error
        return tuple(found)

    def messages(self, answer: str) -> list[dict]:
        """The prompt and an answer to it, as data_prep.encode takes them."""
        return [*self.prompt, {"role": "assistant", "content": answer}]


def to_row(pair: Pair) -> dict[str, Any]:
    """The pair as it stands on disk, checked and in one form, whichever form the prompt has.

    Raises ProblemError "<field>: ..." when it would not be read back.
    """
    row = {name: getattr(pair, name) for name in ("id", "group", "source", "license", "meta")}
    row |= {"images": list(pair.images), "prompt": list(pair.prompt), "chosen": _said(pair.chosen)}
    if pair.rejected is not None:
        row["rejected"] = _said(pair.rejected)
    if pair.rejected_images:
        row["rejected_images"] = list(pair.rejected_images)
    row |= {name: said for name in ("rejected_prior", "rejected_images_answer") if (said := getattr(pair, name)) is not None}
    row["prompt"] = list(from_row(row).prompt)
    return row


def _said(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def from_row(row: Any, *, root: Path = Path("."), max_pixels: int = MAX_PIXELS) -> Pair:
    """A pair from its row. Pictures are not looked at.

    Contents may be text or lists of parts, and an image part may have a null text, as it has after a way through Arrow.

    Raises:
        ProblemError: "<field>: ..." for an unknown, missing or null field, a wrong type, an empty answer, another number of
            pictures than the prompt has image parts, two sides that are the same, or a pair without a rejected side.
    """
    if not isinstance(row, dict):
        raise ProblemError(f"row: must be an object, not {row!r:.60}")
    for name in row:
        if name not in REQUIRED + OPTIONAL:
            near = difflib.get_close_matches(name, REQUIRED + OPTIONAL, 1)
            raise ProblemError(f"{name}: unknown field" + (f"; did you mean {near[0]!r}?" if near else ""))
        if row[name] is None:
            raise ProblemError(f"{name}: is null; a field that is not needed is left out")
    for name in REQUIRED:
        if name not in row:
            raise ProblemError(f"{name}: missing field")
    for name in ("id", "group", "source", "license", "rejected_prior", "rejected_images_answer"):
        if name in row:
            check_text(name, row[name])
    check_object("meta", row["meta"])
    pictures = {name: _paths(name, row.get(name, [])) for name in ("images", "rejected_images")}
    prompt = _prompt(row["prompt"])
    shown = sum(part["type"] == "image" for message in prompt for part in message["content"])
    if "rejected_images" in row and not row["rejected_images"]:
        raise ProblemError("rejected_images: is an empty list; a field that is not needed is left out")
    for name, found in pictures.items():
        if name in row and len(found) != shown:
            raise ProblemError(f"{name}: {len(found)} pictures, but the prompt has {shown} image parts")
    pair = Pair(prompt=prompt, chosen=_answer("chosen", row["chosen"]),
                rejected=_answer("rejected", row["rejected"]) if "rejected" in row else None, **pictures,
                **{name: row[name] for name in ("id", "group", "source", "license", "meta")},
                **{name: row.get(name) for name in ("rejected_prior", "rejected_images_answer")},
                root=root, max_pixels=max_pixels)
    _check_sides(pair)
    return pair


def _check_sides(pair: Pair) -> None:
    if pair.rejected is None and pair.rejected_prior is None and not pair.rejected_images:
        raise ProblemError("rejected: missing, and neither rejected_prior nor rejected_images is there")
    for name in ("rejected", "rejected_prior"):
        if (getattr(pair, name) or "").strip() == pair.chosen.strip():
            raise ProblemError(f"{name}: is the same as chosen; the two sides must differ")
    if pair.rejected_images and pair.rejected_images == pair.images:
        raise ProblemError("rejected_images: are the same as images; the two sides must differ")
    if pair.rejected_images_answer is not None:
        if not pair.rejected_images:
            raise ProblemError("rejected_images: missing, but rejected_images_answer is there")
        if pair.rejected_images_answer.strip() == pair.chosen.strip():
            raise ProblemError("rejected_images_answer: is the same as chosen; the two sides must differ")


def _paths(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ProblemError(f"{name}: must be a list of paths, not {value!r:.60}")
    for number, path in enumerate(value):
        check_text(f"{name}[{number}]", path)
    return tuple(value)


def _prompt(messages: Any) -> tuple[dict, ...]:
    """Chat messages with their contents as lists of parts."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ProblemError(f"prompt: must be a list of chat messages, not {messages!r:.60}")
    found = []
    for number, message in enumerate(messages):
        place = f"prompt[{number}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise ProblemError(f"{place}: must have a role ({', '.join(ROLES)}) and a content, and nothing else")
        found.append({"role": message["role"], "content": _parts(f"{place}.content", message["content"])})
    if found[-1]["role"] != "user":
        raise ProblemError(f"prompt[{len(found) - 1}]: the last message must be the user's")
    return tuple(found)


def _parts(place: str, content: Any) -> list[dict]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple) or not content:
        raise ProblemError(f"{place}: must be text or a list of parts, not {content!r:.60}")
    found = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image" and part.get("text") is None and set(part) <= {"type", "text"}:
            found.append({"type": "image"})
        elif kind == "text" and set(part) == {"type", "text"}:
            check_text(f"{place}[{number}].text", part["text"], blank=True)  # a space between two pictures is one
            found.append({"type": "text", "text": part["text"]})
        else:
            raise ProblemError(f"{place}[{number}]: must be an image part or a text part with its text, not {part!r:.60}")
    return found


def _answer(name: str, messages: Any) -> str:
    """The text of a side: one assistant's message with one text."""
    if not isinstance(messages, list | tuple) or len(messages) != 1:
        raise ProblemError(f"{name}: must be a list of one assistant's message, not {messages!r:.60}")
    message = messages[0]
    if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] != "assistant":
        raise ProblemError(f"{name}: must be a list of one assistant's message, not {messages!r:.60}")
    content = message["content"]
    if not isinstance(content, str):
        parts = content if isinstance(content, list | tuple) else []
        if len(parts) != 1 or not isinstance(parts[0], dict) or parts[0].get("type") != "text" or "text" not in parts[0]:
            raise ProblemError(f"{name}: the answer must be one text, not {content!r:.60}")
        content = parts[0]["text"]
    check_text(name, content)
    return content


def read_pairs(path: str | Path, *, verify: str = "full", skip_bad: bool = False, max_pixels: int = MAX_PIXELS) -> list[Pair]:
    """The pairs of a JSONL file, in its order, every row checked; the arguments are those of read_problems.

    Raises ProblemError "<file>:<line>: <field>: <what is wrong>", also when no row is good.
    """
    path = Path(path)
    if verify not in VERIFY:
        raise ProblemError(f"verify must be one of {', '.join(VERIFY)}, not {verify!r}")
    bad, pairs, seen = BadRows(path, skip_bad, side_file(path)), [], {}
    check_picture: Callable[[str, str], None] = picture_check(path.parent, VERIFY[verify], max_pixels)
    try:
        for number, line in json_lines(path):
            try:
                if not line:
                    raise ProblemError("row: is blank; only the end of the file may be")
                pair = from_row(parse_json(line), root=path.parent, max_pixels=max_pixels)
                if pair.id in seen:
                    raise ProblemError(f"id: {pair.id!r} stands on line {seen[pair.id]} already")
                for name in ("images", "rejected_images"):
                    for place, picture in enumerate(getattr(pair, name)):
                        check_picture(f"{name}[{place}]", picture)
            except ProblemError as error:
                bad.keep(path, number, error, line)
                continue
            seen[pair.id] = number
            pairs.append(pair)
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read ({error.strerror})") from error
    bad.close(len(pairs))
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> int:
    """Write pairs as JSONL: utf-8, keys sorted, all or nothing; returns their number. Their pictures must lie beside it.

    Raises ProblemError "<file>:<line>: <field>: ..." when a pair would not be read back, and OSError.
    """
    path, seen = Path(path), {}
    with replacing(path) as file:
        for number, pair in enumerate(pairs, start=1):
            try:
                row = to_row(pair)
                if pair.id in seen:
                    raise ProblemError(f"id: {pair.id!r} stands on line {seen[pair.id]} already")
            except ProblemError as error:
                raise ProblemError(f"{path}:{number}: {error}") from error
            seen[pair.id] = number
            file.write(dump(row))
    return len(seen)
