"""Problems on disk: one JSON object a line (utf-8), pictures beside the file. Rows are checked on both ways."""

import difflib
import json
import math
import os
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.images import MAX_PIXELS, ProblemError, header_size, load, picture_path

LETTERS = string.ascii_uppercase
ANSWER_WITH = ("letter", "text")
VERIFY: dict[str, Callable | None] = {"full": load, "header": header_size, "none": None}


@dataclass(frozen=True)
class Problem:
    """One question about one picture whose facts may also be known in words."""

    id: str
    group: str  # problems that are not independent (one picture, one sentence) share a group
    source: str
    image: str | None  # path relative to `root`, "/"-separated; None: no picture
    facts: str | None  # what the picture shows, in words; None: cannot be posed as text
    question: str
    options: tuple[str, ...] | None  # None: open answer
    answer: str  # one of the options when there are options
    license: str
    meta: dict = field(hash=False)  # free, but meta["answer_with"] is "letter" (default) or "text"
    root: Path = field(default=Path("."), compare=False, repr=False)  # folder of the JSONL file; not written
    max_pixels: int = field(default=MAX_PIXELS, compare=False, repr=False)  # largest picture to load; not written


FIELDS = tuple(f.name for f in fields(Problem) if f.compare)
NULLABLE = ("image", "facts")


def check_row(row: Any) -> dict:
    """The row, if it has exactly the fields of a Problem with right types and values; else ProblemError "<field>: ...".

    `options` may be a list or a tuple. Pictures are not looked at.
    """
    if not isinstance(row, dict):
        raise ProblemError(f"row: must be an object, not {_kind(row)}")
    for name in row:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise ProblemError(f"{name}: unknown field" + (f"; did you mean {near[0]!r}?" if near else ""))
    for name in FIELDS:
        if name not in row:
            raise ProblemError(f"{name}: missing field")
    for name in FIELDS:
        if name not in ("options", "meta") and not (row[name] is None and name in NULLABLE):
            _check_text(name, row[name], " or null" if name in NULLABLE else "")
    if row["image"] is None and row["facts"] is None:
        raise ProblemError("facts: a problem needs a picture or facts, this one has neither")
    _check_meta(row["meta"])
    if row["options"] is not None:
        _check_options(row)
    return row


def _check_text(name: str, value: Any, otherwise: str = "") -> None:
    if not isinstance(value, str):
        raise ProblemError(f"{name}: must be text{otherwise}, not {_kind(value)}")
    if not value.strip():
        raise ProblemError(f"{name}: is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProblemError(f"{name}: holds half of a surrogate pair at character {error.start}") from error


def _check_meta(meta: Any) -> None:
    if not isinstance(meta, dict):
        raise ProblemError(f"meta: must be an object, not {_kind(meta)}")
    if meta.get("answer_with", "letter") not in ANSWER_WITH:
        raise ProblemError(f"meta: answer_with must be 'letter' or 'text', not {meta['answer_with']!r}")
    try:
        json.dumps(meta, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ProblemError(f"meta: cannot be written as JSON ({error})") from error


def _check_options(row: dict) -> None:
    options = row["options"]
    if not isinstance(options, list | tuple):
        raise ProblemError(f"options: must be a list or null, not {_kind(options)}")
    for number, option in enumerate(options):
        _check_text(f"options[{number}]", option)
        if option != option.strip():
            raise ProblemError(f"options[{number}]: {option!r} has spaces at its edge")
    if len(options) < 2:
        raise ProblemError(f"options: needs at least 2, has {len(options)}")
    if len(set(options)) < len(options):
        twice = next(option for option in options if options.count(option) > 1)
        raise ProblemError(f"options: {twice!r} stands there twice")
    if len(options) > len(LETTERS) and row["meta"].get("answer_with", "letter") == "letter":
        raise ProblemError(f"options: {len(options)} options, but {len(LETTERS)} letters; set meta.answer_with to text")
    if row["answer"] not in options:
        raise ProblemError(f"answer: {row['answer']!r} is not among the options ({', '.join(options)})")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def parse_json(line: bytes) -> Any:
    """One line of JSON, strictly: utf-8, no NaN or infinity, no key twice. ProblemError "row: ..." otherwise."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
    except UnicodeDecodeError as error:
        raise ProblemError(f"row: is not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})") from error
    except json.JSONDecodeError as error:
        raise ProblemError(f"row: is not JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ProblemError("row: is nested too deeply") from error
    except ProblemError:
        raise
    except ValueError as error:  # an integer of more than 4,300 digits
        raise ProblemError(f"row: is not JSON that can be read ({error})") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise ProblemError(f"{name}: is given twice")
        found[name] = value
    return found


def _constant(name: str) -> None:
    raise ProblemError(f"row: {name} is not a number that JSON knows")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ProblemError(f"row: {text} is too large for a number")
    return value


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of each line; blank lines at the end are left out, one before a row is passed on."""
    blank: list[int] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                blank.append(number)
                continue
            yield from ((n, b"") for n in blank)
            blank.clear()
            yield number, line.rstrip(b"\r\n")


class BadRows:
    """Rows that could not be read: `keep` raises the first, or notes it when `skip` is set; `close` reports them."""

    def __init__(self, name: str | Path, skip: bool, side: Path):
        """name: what is read, for messages; side: the file that bad rows are written to."""
        self.name, self.skip, self.side, self.rows = name, skip, side, []

    def keep(self, file: Path | str, where: int | str, error: ProblemError, raw: bytes | str) -> None:
        """Note the row at `where` (line number or place) of `file` under its error, or raise it."""
        message = f"{file}:{where}: {error}"
        if not self.skip:
            raise ProblemError(message) from error
        text = raw.decode("utf-8", errors="backslashreplace") if isinstance(raw, bytes) else raw
        self.rows.append({"line": where, "error": message, "raw": text})

    def close(self, good: int) -> None:
        """Write the bad rows to the side file and say so on stderr. ProblemError when no row was good."""
        if self.skip:
            self._write(good)
        if not good:
            first = f"; the first: {self.rows[0]['error']}" if self.rows else ""
            raise ProblemError(f"{self.name}: no good row ({len(self.rows)} bad){first}")

    def _write(self, good: int) -> None:
        told = f"written to {self.side}"
        try:
            if self.rows:
                with replacing(self.side) as file:
                    file.writelines(dump(row) for row in self.rows)
            else:
                self.side.unlink(missing_ok=True)  # an earlier reading's file would tell of rows mended since
        except OSError as error:
            told = f"not written, {self.side.parent} is not writable ({error.strerror})"
        if self.rows:
            print(f"{self.name}: {len(self.rows)} of {len(self.rows) + good} rows are bad, {told}", file=sys.stderr)


def side_file(path: Path) -> Path:
    """Where the bad rows of `path` are written: train.jsonl -> train.bad.jsonl."""
    return path.with_name(f"{path.stem}.bad.jsonl")


def read_problems(
    path: str | Path, *, verify: str = "full", skip_bad: bool = False, max_pixels: int = MAX_PIXELS
) -> list[Problem]:
    """The problems of a JSONL file, in its order, every row checked.

    verify: "full" decodes each picture, "header" only opens it (format, size), "none" only checks that its path is safe
    and names a file. skip_bad: leave bad rows out, write them to `<name>.bad.jsonl` beside the file (line, error, raw)
    and report their number on stderr. max_pixels: the largest picture; Pillow itself refuses above about 179 million.

    Raises ProblemError "<file>:<line>: <field>: <what is wrong>", also when no row is good.
    """
    path = Path(path)
    if verify not in VERIFY:
        raise ProblemError(f"verify must be one of {', '.join(VERIFY)}, not {verify!r}")
    bad, problems, seen = BadRows(path, skip_bad, side_file(path)), [], {}
    check_picture = _picture_check(path.parent, VERIFY[verify], max_pixels)
    try:
        for number, line in json_lines(path):
            try:
                row = check_row(parse_json(line)) if line else _blank()
                if row["id"] in seen:
                    raise ProblemError(f"id: {row['id']!r} stands on line {seen[row['id']]} already")
                if row["image"] is not None:
                    check_picture(row["image"])
            except ProblemError as error:
                bad.keep(path, number, error, line)
                continue
            seen[row["id"]] = number
            row["options"] = None if row["options"] is None else tuple(row["options"])
            problems.append(Problem(**row, root=path.parent, max_pixels=max_pixels))
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read ({error.strerror})") from error
    bad.close(len(problems))
    return problems


def _blank() -> dict:
    raise ProblemError("row: is blank; only the end of the file may be")


def _picture_check(root: Path, look: Callable | None, max_pixels: int) -> Callable[[str], None]:
    """A check of one picture that looks at each file once, however many problems share it."""
    known: dict[str, str | None] = {}

    def check(image: str) -> None:
        if image not in known:
            try:
                file = picture_path(root, image)
                if look:
                    look(file, max_pixels)
                known[image] = None
            except ProblemError as error:
                known[image] = str(error)
        if known[image]:
            raise ProblemError(f"image: {known[image]}")

    return check


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSONL: utf-8, keys sorted, "\\n", all or nothing. Their pictures must lie beside it already.

    Raises ProblemError "<file>:<line>: <field>: ..." when a problem would not be read back, and OSError.
    """
    path, seen = Path(path), {}
    with replacing(path) as file:
        for number, problem in enumerate(problems, start=1):
            row = {name: getattr(problem, name) for name in FIELDS}
            try:
                check_row(row)
                if row["id"] in seen:
                    raise ProblemError(f"id: {row['id']!r} stands on line {seen[row['id']]} already")
            except ProblemError as error:
                raise ProblemError(f"{path}:{number}: {error}") from error
            seen[row["id"]] = number
            file.write(dump(row))


def dump(row: dict) -> bytes:
    """One JSON line, the same bytes for the same row."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n").encode("utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` at the end, or leaves no trace when something fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
