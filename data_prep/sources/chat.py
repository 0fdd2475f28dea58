"""Conversations to problems, for the adapters of LLaVA, ShareGPT and OpenAI files.

A problem shows the pictures of its question and of those before it. Where it shows several, markers `<image N>` in the
question take the places of the `<image>` tokens or of the image parts; a single one stands before the text, as in LLaVA.
"""

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_prep.images import ProblemError, picture_path
from data_prep.read import Problem, one_or_several
from data_prep.sources.common import Draft, Row, hashed, take

IMAGE_TOKEN = "<image>"
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "developer": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    role: str  # user, assistant or system
    text: str  # with an <image> token for each of `pictures`, where it stands
    pictures: tuple[str, ...] = ()  # paths, file: or data: addresses, in order


def turn_of(index: int, turn: Any, field: str) -> Turn:
    """A turn in either spelling: {from, value} or {role, content}, where content is text or a list of parts."""
    place = f"{field}[{index}]"
    if not isinstance(turn, dict):
        raise ProblemError(f"{place}: must be an object")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if role not in ROLES:
        raise ProblemError(f"{place}.{role_key}: unknown role {role!r}; known: {', '.join(ROLES)}")
    content = turn.get(text_key)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts, pictures = [], []  # of texts None: a picture
    for number, part in enumerate(parts):
        where = f"{place}.{text_key}" + (f"[{number}]" if parts is content else "")
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), where))
        elif kind in ("image_url", "image"):
            pictures.append(_address(part, kind, where))
            texts.append(None)
        else:
            raise ProblemError(f"{where}: unknown part {kind!r}; known: text, image_url, image")
    written = any(IMAGE_TOKEN in text for text in texts if text is not None)  # the text says itself where they stand
    texts = [IMAGE_TOKEN if text is None else text for text in texts if text is not None or not written]
    return Turn(ROLES[role], "\n".join(texts), tuple(pictures))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ProblemError(f"{where}: must be text, not {value!r:.60}")
    return value


def _address(part: dict, kind: str, where: str) -> str:
    value = part.get(kind, part.get("url", part.get("path")))
    return _text(value.get("url") if isinstance(value, dict) else value, where)


def row_pictures(row: dict, names: Sequence[str] = ("images", "image")) -> list[str]:
    """The pictures that a row names beside its conversation: one path, or a list of them."""
    for name in names:
        if row.get(name):
            value = row[name] if isinstance(row[name], list) else [row[name]]
            return [_text(item.get("path") if isinstance(item, dict) else item, name) for item in value]
    return []


def picture_of(address: str, root: Path) -> tuple[str, Callable[[], Path | bytes]]:
    """(name, function that gives the file or the bytes) of a path below `root`, or of a file: or data: address."""
    if address.startswith("data:"):
        return hashed(address), lambda: _decode(address)
    if re.match(r"https?://", address):
        raise ProblemError(f"image: {address!r:.80} is on the web; download it and name the file")
    path = Path(unquote(urlsplit(address).path) if address.startswith("file:") else address)
    if path.is_absolute():
        try:
            path = path.resolve().relative_to(root.resolve())
        except ValueError as error:
            raise ProblemError(f"image: {address!r} lies outside the picture folder {root}") from error
    name = path.as_posix()

    def picture() -> Path:
        try:
            return picture_path(root, name)
        except ProblemError as error:
            raise ProblemError(f"image: {error}") from error

    return name, picture


def _decode(address: str) -> bytes:
    header, _, data = address.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("only base64 is read")
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProblemError(f"image: a data: address that cannot be read ({error})") from error


class Conversations:
    """Makes problems of conversations: each question and its answer becomes one. See common.joined for groups."""

    def __init__(self, source: str, license: str | None, images: Path):
        """license: for rows that name none themselves; images: the folder that relative picture paths start from."""
        self.source, self.license, self.images = source, license, images
        self.seen: Counter[str] = Counter()

    def drafts(self, record: dict, turns: Sequence[Turn], beside: Sequence[str], row: Row) -> list[Draft]:
        """record: the row's JSON object; beside: pictures it names outside its turns."""
        pairs, system = _pairs(turns)
        names, shown = _shown(turns, [question for question, _ in pairs], beside)
        found = [picture_of(address, self.images) for address in names]
        license = record.get("license") or self.license
        if not license:
            raise ProblemError("license: the row names none; give --license")
        ident = self._id(record, row)
        meta = {"turns": len(pairs)} | ({"system": "\n".join(system)} if system else {})
        numbers = count(1)  # of the pictures, in the order of their tokens
        return [
            Draft(
                Problem(
                    id=f"{ident}-{number}",
                    group=found[0][0],
                    source=self.source,
                    image=one_or_several(name for name, _ in found[:several]),
                    facts=None,
                    question=_with_markers(question, numbers, several > 1),
                    options=None,
                    answer=answer.strip(),
                    license=license,
                    meta={**meta, "turn": number},
                ),
                tuple(picture for _, picture in found[:several]),
            )
            for number, ((question, answer), several) in enumerate(zip(pairs, shown))
        ]

    def _id(self, record: dict, row: Row) -> str:
        """The row's id; the k-th row with the same id (LLaVA's own mixture has such) gets "~k" behind it."""
        if record.get("id") in (None, ""):
            return f"{self.source}-{str(row.where).replace(' ', '-')}"
        ident = str(take(record, "id", str, int))
        self.seen[ident] += 1
        return ident if self.seen[ident] == 1 else f"{ident}~{self.seen[ident]}"


def _pairs(turns: Sequence[Turn]) -> tuple[list[tuple[str, str]], list[str]]:
    """((question, answer) pairs, system texts); ProblemError when the turns do not alternate."""
    system = [turn.text for turn in turns if turn.role == "system"]
    talk = [turn for turn in turns if turn.role != "system"]
    if not talk:
        raise ProblemError("conversation: has no turns")
    for number, turn in enumerate(talk):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise ProblemError(f"conversation: turn {number + 1} is the {turn.role}'s, expected the {expected}'s")
    if len(talk) % 2:
        raise ProblemError("conversation: the last question has no answer")
    return [(ask.text, say.text) for ask, say in zip(talk[::2], talk[1::2])], system


def _shown(turns: Sequence[Turn], questions: Sequence[str], beside: Sequence[str]) -> tuple[list[str], list[int]]:
    """(the conversation's pictures in order, how many of them each question shows)."""
    inside = [name for turn in turns for name in turn.pictures]
    if beside and inside and set(beside) != set(inside):
        raise ProblemError("image: the pictures beside the conversation are not those in it")
    if any(turn.pictures for turn in turns if turn.role != "user"):
        raise ProblemError("image: must stand in a question")
    names = inside or list(beside)
    if not names:
        raise ProblemError("image: the row has no picture")
    tokens = [question.count(IMAGE_TOKEN) for question in questions]
    if sum(tokens) not in (0, len(names)):
        times, pictures = (f"{n} {word}{'s' * (n > 1)}" for n, word in ((sum(tokens), "time"), (len(names), "picture")))
        raise ProblemError(f"image: {IMAGE_TOKEN} stands {times}, the row has {pictures}")
    if not any(tokens) or (len(names) == 1 and not inside):
        return names, [len(names)] * len(questions)
    if not tokens[0]:  # a later picture is not shown with questions asked before it
        raise ProblemError("image: must stand in the first question")
    return names, list(accumulate(tokens))


def _with_markers(text: str, numbers: Iterator[int], several: bool) -> str:
    """The question with its tokens as markers, or, when it shows one picture, without token and its line break."""
    if several:
        return re.sub(IMAGE_TOKEN, lambda _: f"<image {next(numbers)}>", text).strip()
    without, found = re.subn(rf"\n?{IMAGE_TOKEN}\n?", "\n", text)
    for _ in range(found):
        next(numbers)
    return without.strip()


def add_arguments(parser) -> None:
    parser.add_argument("--from", dest="source_file", type=Path, required=True, help="the JSON or JSONL file")
    parser.add_argument("--images", type=Path, help="folder that picture paths start from (default: the file's folder)")
    parser.add_argument("--source", help="the source's name (default: the file's name)")
    parser.add_argument("--license", help="licence of rows that name none themselves")


def conversations(args) -> Conversations:
    return Conversations(args.source or args.source_file.stem, args.license, args.images or args.source_file.parent)
