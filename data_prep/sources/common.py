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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from tqdm import tqdm

from data_prep.images import FORMATS, MAX_PIXELS, ProblemError, load
from data_prep.read import (
    FIELDS, BadRows, Problem, as_tuple, check_row, json_lines, named, one_or_several, parse_json, write_problems,
)  # fmt: skip
from data_prep.sources.groups import tied

T = TypeVar("T")
Picture = Callable[[], Path | bytes]  # gives a picture's file or its bytes; asked only when its draft is used


@dataclass(frozen=True)
class Row:
    """One row of an outside file. `parse` raises ProblemError when the bytes are not what they should be."""

    file: Path | str
    where: int | str  # line number, or "row 7"
    raw: bytes | str
    parse: Callable[[], Any]


@dataclass(frozen=True)
class Draft:
    """A problem whose pictures are not yet beside it.

    `pictures` belong to the names in `problem.image`, one each, in order: a file lands in OUT/images/<its name>, bytes
    land under a hash of themselves, whatever the name says. Without pictures `problem.image` becomes null.
    `published` holds, by view, the pictures of meta["published"][view]["image"]. They are placed the same way, and their
    paths are filled in there. Where that gives no names, files too land under a hash of their bytes; the whole entry may
    be missing when the view publishes nothing but pictures.
    """

    problem: Problem
    pictures: tuple[Picture, ...] = ()
    published: Mapping[str, tuple[Picture, ...]] = field(default_factory=dict)
    check: Callable[..., None] | None = None  # takes `pictures`, decoded; ProblemError when they do not fit the words
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


def made_of(rows: Iterable[Row], build: Callable[[dict, Row], list[T]], bad: BadRows) -> Iterator[T]:
    """What `build` makes of each row; rows that fail, all that they hold, go to `bad`."""
    for row in rows:
        try:
            value = row.parse()
            if not isinstance(value, dict):
                raise ProblemError("row: must be an object")
            made = build(value, row)
        except ProblemError as error:
            bad.keep(row.file, row.where, error, row.raw)
            continue
        yield from made


def drafts_of(rows: Iterable[Row], build: Callable[[dict, Row], list[Draft]], bad: BadRows) -> Iterator[Draft]:
    """The drafts that `build` makes of each row, their words checked; rows that fail go to `bad`."""

    def checked(value: dict, row: Row) -> list[Draft]:
        drafts = [replace(draft, row=row) for draft in build(value, row)]
        for draft in drafts:
            problem = _with_published(draft.problem, _stand_ins(draft))
            check_row({name: getattr(problem, name) for name in FIELDS})
        return drafts

    return made_of(rows, checked, bad)


def _stand_ins(draft: Draft) -> dict[str, tuple[str, ...]]:
    """Names for the published pictures that have none yet, so that the row can be checked before any is read."""
    entries = draft.problem.meta.get("published", {})
    return {
        view: ("picture",) * len(pictures)
        for view, pictures in draft.published.items()
        if "image" not in entries.get(view, {})
    }


def joined(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """The drafts, those that share a picture, directly or by way of others, in one group: that of the first of them.

    Problems are split by group, and a picture may not stand in two splits.
    """
    drafts = list(drafts)
    groups = tied((draft.problem.group, *draft.problem.pictures) for draft in drafts)
    for draft, group in zip(drafts, groups, strict=True):
        yield replace(draft, problem=replace(draft.problem, group=group))


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


def arguments(doc: str, module: str, test_share: float | None = 0.2) -> argparse.ArgumentParser:
    """The options that every adapter has; `doc` is the module's docstring.

    test_share: the default of --test-share; None: there is no such option, because each problem's meta["split"], "train"
    or "test", says where it goes.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl and images/")
    if test_share is None:
        parser.set_defaults(test_share=None)
    else:
        said = "share of problems in test.jsonl (default: %(default)s)"
        parser.add_argument("--test-share", type=_share, default=test_share, help=said)
    parser.add_argument("--limit", type=positive, help="at most this many problems, groups in a hash's order, the last cut off")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, write them to OUT/rows.bad.jsonl")
    parser.add_argument(
        "--max-pixels", type=positive, default=MAX_PIXELS, help="largest picture (default: %(default)s)"
    )
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1, from the command line."""
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
    out: Path, drafts: Iterable[Draft], bad: BadRows, test_share: float | None, limit: int | None, max_pixels: int = MAX_PIXELS
) -> dict[str, int]:
    """Place the pictures, write the files, and return the number of problems in each. test_share: see `arguments`."""
    chosen = sorted(enumerate(_unique(drafts, bad)), key=lambda pair: (hashed("limit", pair[1].problem.group), pair[0]))
    total = min(limit or len(chosen), len(chosen))
    good: list[tuple[int, Problem]] = []
    placer = Placer(out, max_pixels)
    with tqdm(total=total, unit="problem", desc=str(out), disable=None, file=sys.stderr) as bar:
        for place, draft in chosen:
            if len(good) == total:
                break
            try:
                good.append((place, placer.place(draft)))
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


class _Found(NamedTuple):
    """A picture of a draft."""

    source: Path | bytes
    path: str  # relative to OUT
    pixels: Image.Image | None  # None: placed before, not decoded again


class Placer:
    """Puts the pictures of drafts below OUT/images, each decoded once, however many problems share it."""

    def __init__(self, out: Path, max_pixels: int):
        self.out, self.max_pixels = out, max_pixels
        self.paths: dict[str, str] = {}  # by key
        self.owners: dict[str, str] = {}  # keys, by path

    def place(self, draft: Draft) -> Problem:
        """The draft's problem, its pictures in their places; ProblemError "<field>: ..." when one cannot be used."""
        names = draft.problem.pictures if draft.pictures else ()
        new: dict[str, _Found] = {}  # pictures not placed before, by key; placed when all are known to be good
        own = self._look("image", draft.pictures, names, new, decode=draft.check is not None)
        if draft.check:
            draft.check(*(one.pixels for one in own))
        entries = draft.problem.meta.get("published", {})
        published = {
            view: self._look(f"meta.published.{view}.image", pictures, as_tuple(entries.get(view, {}).get("image")), new)
            for view, pictures in draft.published.items()
        }
        self._settle(new)
        problem = replace(draft.problem, image=one_or_several(one.path for one in own))
        return _with_published(problem, {view: [one.path for one in found] for view, found in published.items()})

    def put(self, fields: Mapping[str, Sequence[Picture]]) -> dict[str, tuple[str, ...]]:
        """Paths, relative to OUT, of pictures that then lie in OUT/images under hashes of their bytes; by field, in order.

        ProblemError "<field>: ..." when one cannot be used; then none of them is placed.
        """
        new: dict[str, _Found] = {}
        found = {field: self._look(field, pictures, (), new) for field, pictures in fields.items()}
        self._settle(new)
        return {field: tuple(one.path for one in pictures) for field, pictures in found.items()}

    def _settle(self, new: Mapping[str, _Found]) -> None:
        for key, one in new.items():
            (_link if isinstance(one.source, Path) else _store)(one.source, self.out / one.path)
            self.paths[key] = one.path

    def _look(
        self, field: str, pictures: Sequence[Picture], names: Sequence[str], new: dict[str, _Found], *, decode: bool = False
    ) -> list[_Found]:
        """decode: also what was placed before."""
        found = []
        for picture, (where, name) in zip(pictures, named(field, names or (None,) * len(pictures)), strict=True):
            source = picture()
            # A file without a name is known by its bytes too, and linked like one with a name.
            data = source.read_bytes() if isinstance(source, Path) and name is None else source
            key = str(data) if isinstance(data, Path) else hashlib.sha256(data).hexdigest()
            if key in self.paths:
                found.append(_Found(source, self.paths[key], self._decoded(source, where) if decode else None))
                continue
            if key not in new:
                path = f"images/{name if isinstance(data, Path) else key[:24] + _suffix(data)}"
                new[key] = _Found(source, path, self._decoded(source, where))
                if self.owners.setdefault(path, key) != key:
                    raise ProblemError(f"{where}: {path} is another picture's place already")
            found.append(new[key])
        return found

    def _decoded(self, source: Path | bytes, where: str) -> Image.Image:
        try:
            return load(source if isinstance(source, Path) else io.BytesIO(source), self.max_pixels)
        except ProblemError as error:
            raise ProblemError(f"{where}: {error}") from error


def _with_published(problem: Problem, names: Mapping[str, Sequence[str]]) -> Problem:
    """The problem with the pictures of some views in meta["published"]."""
    if not names:
        return problem
    published = dict(problem.meta.get("published", {}))
    for view, found in names.items():
        published[view] = {**published.get(view, {}), "image": found[0] if len(found) == 1 else list(found)}
    return replace(problem, meta={**problem.meta, "published": published})


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


def _write_split(out: Path, problems: list[Problem], test_share: float | None) -> dict[str, int]:
    """train.jsonl and test.jsonl. Where one would be empty, the other is written and that of an earlier run removed."""
    if test_share is None:
        test = {problem.id for problem in problems if problem.meta["split"] == "test"}
    else:
        groups = _test_groups(out, problems, test_share)
        test = {problem.id for problem in problems if problem.group in groups}
    counts = {}
    for name, part in (
        ("train.jsonl", [problem for problem in problems if problem.id not in test]),
        ("test.jsonl", [problem for problem in problems if problem.id in test]),
    ):
        if part:
            write_problems(out / name, part)
            counts[name] = len(part)
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier run with another share: its groups are elsewhere now
    return counts


def _test_groups(out: Path, problems: list[Problem], test_share: float) -> set[str]:
    """The groups that stand in test.jsonl: none is divided."""
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
    return test
