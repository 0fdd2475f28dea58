"""Conversations to problems, for the adapters of LLaVA, ShareGPT and OpenAI files."""

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_prep.images import ProblemError, picture_path
from data_prep.read import Problem
from data_prep.sources.common import Draft, Row, hashed, take

IMAGE_TOKEN = "<image>"
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "developer": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    role: str  # user, assistant or system
    text: str
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
    texts, pictures = [], []
    for number, part in enumerate(parts):
        where = f"{place}.{text_key}" + (f"[{number}]" if parts is content else "")
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), where))
        elif kind in ("image_url", "image"):
            pictures.append(_address(part, kind, where))
        else:
            raise ProblemError(f"{where}: unknown part {kind!r}; known: text, image_url, image")
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
    """Makes problems of conversations: each question and its answer becomes one, all of a picture in one group."""

    def __init__(self, source: str, license: str | None, images: Path):
        """license: for rows that name none themselves; images: the folder that relative picture paths start from."""
        self.source, self.license, self.images = source, license, images
        self.seen: Counter[str] = Counter()

    def drafts(self, record: dict, turns: Sequence[Turn], beside: Sequence[str], row: Row) -> list[Draft]:
        """record: the row's JSON object; beside: pictures it names outside its turns."""
        pairs, system = _pairs(turns)
        tokens = sum(text.count(IMAGE_TOKEN) for text, _ in pairs)
        pictures = list(dict.fromkeys([*beside, *(name for turn in turns for name in turn.pictures)]))
        if len(pictures) != 1:
            raise ProblemError(f"image: a problem has one picture, this row has {len(pictures) or 'none'}")
        if tokens > 1:
            raise ProblemError(f"image: {IMAGE_TOKEN} stands {tokens} times, the row has 1 picture")
        # A later picture would be shown with questions asked before it.
        if any(turn.pictures for turn in turns[next(i for i, t in enumerate(turns) if t.role == "user") + 1 :]):
            raise ProblemError("image: must stand in the first question")
        name, picture = picture_of(pictures[0], self.images)
        license = record.get("license") or self.license
        if not license:
            raise ProblemError("license: the row names none; give --license")
        ident = self._id(record, row)
        meta = {"turns": len(pairs)} | ({"system": "\n".join(system)} if system else {})
        return [
            Draft(
                Problem(
                    id=f"{ident}-{number}",
                    group=name,
                    source=self.source,
                    image=name,
                    facts=None,
                    question=_without_token(question),
                    options=None,
                    answer=answer.strip(),
                    license=license,
                    meta={**meta, "turn": number},
                ),
                picture,
            )
            for number, (question, answer) in enumerate(pairs)
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


def _without_token(text: str) -> str:
    """The question without LLaVA's placeholder and the line break that comes with it."""
    return re.sub(rf"\n?{re.escape(IMAGE_TOKEN)}\n?", "\n", text).strip() if IMAGE_TOKEN in text else text.strip()


def add_arguments(parser) -> None:
    parser.add_argument("--from", dest="source_file", type=Path, required=True, help="the JSON or JSONL file")
    parser.add_argument("--images", type=Path, help="folder that picture paths start from (default: the file's folder)")
    parser.add_argument("--source", help="the source's name (default: the file's name)")
    parser.add_argument("--license", help="licence of rows that name none themselves")


def conversations(args) -> Conversations:
    return Conversations(args.source or args.source_file.stem, args.license, args.images or args.source_file.parent)
