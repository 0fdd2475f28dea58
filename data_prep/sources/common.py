"""What every adapter shares: rows in, pictures and JSONL out.

An adapter turns rows into drafts. `run` takes them from there: limit, pictures copied into OUT/images and decoded once,
rows split by group into OUT/train.jsonl and OUT/test.jsonl. Running it again gives the same bytes.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_prep.images import FORMATS, MAX_PIXELS, ProblemError, load
from data_prep.read import FIELDS, BadRows, Problem, check_row, json_lines, parse_json, write_problems


@dataclass(frozen=True)
class Row:
    """One row of an outside file. `parse` raises ProblemError when the bytes are not what they should be."""

    file: Path | str
    where: int | str  # line number, or "row 7"
    raw: bytes | str
    parse: Callable[[], Any]


@dataclass(frozen=True)
class Draft:
    """A problem whose picture is not yet beside it.

    `picture` gives the picture's file or its bytes and is asked only when the draft is used. A file lands in
    OUT/images/<problem.image>; bytes land under a hash of themselves.
    """

    problem: Problem
    picture: Callable[[], Path | bytes] | None = None
    check: Callable[[Image.Image], None] | None = None  # raises ProblemError when the picture does not fit the words
    row: Row | None = None


def hashed(*parts: str | bytes) -> str:
    """A short name for some values; the same everywhere."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part) + b"\0")
    return digest.hexdigest()[:16]


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON list or of a JSONL file, whichever the file holds."""
    with _readable(path):
        with open(path, "rb") as file:
            is_list = file.read(4096).lstrip()[:1] == b"["
        if not is_list:
            for number, line in json_lines(path):
                yield Row(path, number, line, lambda line=line: parse_json(line))
            return
        try:
            rows = parse_json(path.read_bytes())
        except ProblemError as error:
            raise ProblemError(f"{path}:1: {error}") from error
    for number, row in enumerate(rows):
        yield Row(path, f"row {number}", json.dumps(row, ensure_ascii=False), lambda row=row: row)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read ({error.strerror})") from error


def drafts_of(rows: Iterable[Row], build: Callable[[dict, Row], list[Draft]], bad: BadRows) -> Iterator[Draft]:
    """The drafts that `build` makes of each row, their words checked; rows that fail go to `bad`."""
    for row in rows:
        try:
            value = row.parse()
            if not isinstance(value, dict):
                raise ProblemError("row: must be an object")
            drafts = [replace(draft, row=row) for draft in build(value, row)]
            for draft in drafts:
                check_row({name: getattr(draft.problem, name) for name in FIELDS})
        except ProblemError as error:
            bad.keep(row.file, row.where, error, row.raw)
            continue
        yield from drafts


def take(row: dict, name: str, *kinds: type) -> Any:
    """row[name] if it has one of the types, else ProblemError; a boolean is no number."""
    if name not in row:
        raise ProblemError(f"{name}: missing field")
    value = row[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        said = {"str": "text", "int": "a number", "float": "a number", "list": "a list", "dict": "an object"}
        wanted = " or ".join(dict.fromkeys(said.get(kind.__name__, kind.__name__) for kind in kinds))
        raise ProblemError(f"{name}: must be {wanted}, not {value!r:.60}")
    return value


def arguments(doc: str, module: str) -> argparse.ArgumentParser:
    """The options that every adapter has; `doc` is the module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl and images/")
    parser.add_argument("--test-share", type=_share, default=0.2, help="share of problems in test.jsonl (default: 0.2)")
    parser.add_argument("--limit", type=_positive, help="at most this many problems, whole groups drawn by a hash")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, write them to OUT/rows.bad.jsonl")
    parser.add_argument(
        "--max-pixels", type=_positive, default=MAX_PIXELS, help="largest picture (default: %(default)s)"
    )
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None, drafts: Callable[..., Iterable[Draft]]) -> None:
    """Parse the command line and write what `drafts(args, bad)` gives. One sentence on stderr when it fails."""
    args = parser.parse_args(argv)
    try:
        bad = BadRows(args.out, args.skip_bad, args.out / "rows.bad.jsonl")
        counts = convert(args.out, drafts(args, bad), bad, args.test_share, args.limit, args.max_pixels)
    except (ProblemError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"{args.out}: " + ", ".join(f"{count} problems in {name}" for name, count in counts.items()))


def convert(
    out: Path, drafts: Iterable[Draft], bad: BadRows, test_share: float, limit: int | None, max_pixels: int = MAX_PIXELS
) -> dict[str, int]:
    """Place the pictures, write the files, and return the number of problems in each."""
    chosen = sorted(enumerate(_unique(drafts, bad)), key=lambda pair: (hashed("limit", pair[1].problem.group), pair[0]))
    total = min(limit or len(chosen), len(chosen))
    good: list[tuple[int, Problem]] = []
    placed: dict[str, str] = {}
    with tqdm(total=total, unit="problem", desc=str(out), disable=None, file=sys.stderr) as bar:
        for place, draft in chosen:
            if len(good) == total:
                break
            try:
                good.append((place, _with_picture(draft, out, placed, max_pixels)))
                bar.update()
            except ProblemError as error:
                bad.keep(draft.row.file, draft.row.where, error, draft.row.raw)
    bad.close(len(good))
    return _write_split(out, [problem for _, problem in sorted(good, key=lambda pair: pair[0])], test_share)


def _unique(drafts: Iterable[Draft], bad: BadRows) -> Iterator[Draft]:
    seen: dict[str, Row] = {}
    for draft in drafts:
        first = seen.setdefault(draft.problem.id, draft.row)
        if first is draft.row:
            yield draft
        else:
            error = ProblemError(f"id: {draft.problem.id!r} stands at {first.file}:{first.where} already")
            bad.keep(draft.row.file, draft.row.where, error, draft.row.raw)


def _with_picture(draft: Draft, out: Path, placed: dict[str, str], max_pixels: int) -> Problem:
    """The problem with its picture copied below `out` and decoded once, however many problems share it."""
    if draft.picture is None:
        return replace(draft.problem, image=None)
    source = draft.picture()
    key = str(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
    if key not in placed or draft.check:
        try:
            if isinstance(source, Path):
                name = f"images/{draft.problem.image}"
                picture = load(source, max_pixels)
            else:
                name = f"images/{key[:24]}{_suffix(source)}"
                picture = load(io.BytesIO(source), max_pixels)
        except ProblemError as error:
            raise ProblemError(f"image: {error}") from error
        if draft.check:
            draft.check(picture)
        if isinstance(source, Path):
            _link(source, out / name)
        else:
            _store(source, out / name)
        placed[key] = name
    return replace(draft.problem, image=placed[key])


def _suffix(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(image.format, f".{image.format.lower()}")
    except Exception:  # a broken picture: `load` says what is wrong with it
        return ""


def _link(source: Path, target: Path) -> None:
    """Hard-link a picture, or copy it where the file system cannot; nothing half-written stays behind."""
    source = source.resolve()
    if target.exists() and target.samefile(source):
        return
    with _partial(target) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def _store(data: bytes, target: Path) -> None:
    if not target.exists():  # its name is a hash of the bytes
        with _partial(target) as partial:
            partial.write_bytes(data)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A path that becomes `target` when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _write_split(out: Path, problems: list[Problem], test_share: float) -> dict[str, int]:
    """train.jsonl and test.jsonl, no group in both. A share of 0 or 1 writes one file and removes the other."""
    sizes: dict[str, int] = {}
    for problem in problems:
        sizes[problem.group] = sizes.get(problem.group, 0) + 1
    if 0 < test_share < 1 and len(sizes) < 2:
        raise ProblemError(f"{out}: one group alone cannot be split; set --test-share to 0 or 1")
    test, count = set(), 0
    for group in sorted(sizes, key=lambda group: hashed("split", group)):
        # At least one group on each side, whatever the share: an empty file would stop the next step.
        if test and (count >= test_share * len(problems) or (test_share < 1 and len(test) == len(sizes) - 1)):
            break
        if test_share > 0:
            test.add(group)
            count += sizes[group]
    counts = {}
    for name, part in (
        ("train.jsonl", [problem for problem in problems if problem.group not in test]),
        ("test.jsonl", [problem for problem in problems if problem.group in test]),
    ):
        if part:
            write_problems(out / name, part)
            counts[name] = len(part)
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier run with another share: its groups are elsewhere now
    return counts
