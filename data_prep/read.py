"""Problems on disk: one JSON object a line (utf-8), pictures beside the file. Rows are checked on both ways.

What a problem is and when a row is one is in data_prep.rows; its names are importable from here.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.images import MAX_PIXELS, ProblemError, header_size, load, picture_path
from data_prep.rows import ANSWER_WITH, FIELDS, LETTERS, MARKER, Problem, as_tuple, check_row, named, one_or_several

__all__ = [
    "ANSWER_WITH", "FIELDS", "LETTERS", "MARKER", "BadRows", "Problem", "as_tuple", "check_beside", "check_row", "dump",
    "json_lines", "named", "one_or_several", "parse_json", "picture_check", "read_problems", "replacing", "side_file", "write_problems",
]  # fmt: skip

VERIFY: dict[str, Callable | None] = {"full": load, "header": header_size, "none": None}


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
    check_picture = picture_check(path.parent, VERIFY[verify], max_pixels)
    try:
        for number, line in json_lines(path):
            try:
                row = check_row(parse_json(line)) if line else _blank()
                if row["id"] in seen:
                    raise ProblemError(f"id: {row['id']!r} stands on line {seen[row['id']]} already")
                for place, picture in _all_pictures(row):
                    check_picture(place, picture)
            except ProblemError as error:
                bad.keep(path, number, error, line)
                continue
            seen[row["id"]] = number
            row["options"] = None if row["options"] is None else tuple(row["options"])
            row["image"] = one_or_several(as_tuple(row["image"]))
            problems.append(Problem(**row, root=path.parent, max_pixels=max_pixels))
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read ({error.strerror})") from error
    bad.close(len(problems))
    return problems


def _blank() -> dict:
    raise ProblemError("row: is blank; only the end of the file may be")


def _all_pictures(row: dict) -> Iterator[tuple[str, str]]:
    """(field, path) of the row's own pictures and of those that it holds for single views."""
    yield from named("image", row["image"])
    for view, entry in row["meta"].get("published", {}).items():
        yield from named(f"meta.published.{view}.image", entry.get("image"))


def picture_check(root: Path, look: Callable | None, max_pixels: int) -> Callable[[str, str], None]:
    """A check of one picture that looks at each file once, however many problems share it."""
    known: dict[str, str | None] = {}

    def check(place: str, image: str) -> None:
        if image not in known:
            try:
                file = picture_path(root, image)
                if look:
                    look(file, max_pixels)
                known[image] = None
            except ProblemError as error:
                known[image] = str(error)
        if known[image]:
            raise ProblemError(f"{place}: {known[image]}")

    return check


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSONL: utf-8, keys sorted, "\\n", all or nothing. Their pictures must lie beside it already.

    Raises ProblemError "<file>:<line>: <field>: ..." when a problem would not be read back, and OSError.
    """
    path, seen = Path(path), {}
    with replacing(path) as file:
        for number, problem in enumerate(problems, start=1):
            row = {name: getattr(problem, name) for name in FIELDS}
            row["image"] = one_or_several(problem.pictures) if isinstance(problem.image, tuple) else problem.image
            try:
                check_row(row)
                if row["id"] in seen:
                    raise ProblemError(f"id: {row['id']!r} stands on line {seen[row['id']]} already")
            except ProblemError as error:
                raise ProblemError(f"{path}:{number}: {error}") from error
            seen[row["id"]] = number
            file.write(dump(row))


def check_beside(option: str, out: Path, file: Path) -> None:
    """ProblemError unless `out` is another .jsonl in the folder of `file`: its pictures are named relative to that folder."""
    if out.parent.resolve() != file.parent.resolve():
        raise ProblemError(f"{option} {out}: must lie in {file.parent}, because pictures are named relative to that folder")
    if out.suffix != ".jsonl" or out.resolve() == file.resolve():
        raise ProblemError(f"{option} {out}: must be a .jsonl file of its own")


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
