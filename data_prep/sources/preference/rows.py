"""Rows of preference data: of tables with the pictures in them, as the hub stores them, and of JSON files beside pictures."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.images import ProblemError
from data_prep.rows import named
from data_prep.sources import chat, hf
from data_prep.sources.common import Picture, Row, json_rows
from data_prep.sources.preference.common import Shown


@dataclass(frozen=True)
class TableRow(Row):
    number: int = 0  # in the table, from 0


def table(name: str, split: str | None, revision: str | None):
    """One split of a data set, its pictures as the bytes that are stored.

    name: a hub id, a folder saved by save_to_disk, or a folder with a copy of the repository's parquet files, which needs no
        README.
    """
    path, split = Path(name), split or "train"
    if revision is not None and path.exists():
        raise ProblemError(f"--revision {revision}: {name} lies on this disk; only a hub id has revisions")
    if path.is_file():
        raise ProblemError(f"{name}: is a file; name the folder of the parquet files, or the hub's id")
    saved = any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
    files = parquet_files(path, split) if path.is_dir() and not saved else ()
    return _as_stored(hf.load(name, None, split, revision, files)[0])


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split where the hub's repositories have them; ProblemError when there are none.

    Some repositories (RLAIF-V, RLHF-V) name no split: then all files are `train`.
    """
    named_split = (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet")
    for pattern in [f"{place}{one}" for place in ("data/", "", "default/") for one in named_split]:
        if found := sorted(folder.glob(pattern)):
            return found
    others = ("test", "val", "dev", "eval")
    found = [file for file in sorted(folder.glob("*.parquet")) if not file.name.lower().startswith(others)]
    if split != "train" or not found:
        raise ProblemError(f"{folder}: no parquet files of the split {split!r} (data/{split}-*.parquet or the like)")
    return found


def _as_stored(data):
    """Pictures as bytes: decoding and encoding again would change them and drop their rotation."""
    import datasets  # here, because it takes seconds and a command's --help should not

    stored = datasets.Image(decode=False)
    for column, feature in data.features.items():
        inner = getattr(feature, "feature", None)
        if _pictured(feature):
            data = data.cast_column(column, stored)
        elif inner is not None and _pictured(inner):
            data = data.cast_column(column, datasets.List(stored))
    return data


def _pictured(feature) -> bool:
    """Whether a cell holds a picture; where another library wrote the table, it is a bare struct or plain bytes."""
    import datasets

    bare = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return bare or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def picture_columns(data) -> list[str]:
    """The columns that hold pictures, or lists of them."""
    features = data.features.items()
    return [name for name, feature in features if _pictured(feature) or _pictured(getattr(feature, "feature", None))]


def table_rows(data, name: str) -> Iterator[TableRow]:
    """The rows without their pictures, which are only read when a pair shows them."""
    words = data.remove_columns(picture_columns(data))
    for number, record in enumerate(tqdm(words, unit="row", desc=name, disable=None, file=sys.stderr)):
        raw = json.dumps(record, ensure_ascii=False, default=str)
        yield TableRow(name, f"row {number}", raw, lambda record=record: record, number)


def listed_pictures(data, number: int, column: str, count: int) -> Shown:
    """The pictures of a cell that must hold a list of `count`."""

    def picture(place: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = data[number][column] or []
            if len(cell) != count:
                raise ProblemError(f"{column}: {len(cell)} pictures, but the prompt has {count} image parts")
            stored = cell[place]
            if not isinstance(stored, dict) or not isinstance(stored.get("bytes"), bytes):
                raise ProblemError(f"{column}[{place}]: must be a picture with its bytes, not {stored!r:.60}")
            return stored["bytes"]

        return read

    return Shown(column, tuple(picture(place) for place in range(count)))


def source_rows(args) -> Iterator[Row]:
    """The rows of --data where pictures are named by paths: a JSON or JSONL file, a folder of such files, or a table.

    ProblemError when a table holds pictures.
    """
    path = Path(args.data)
    files = [path] if path.is_file() and path.suffix != ".parquet" else []
    if path.is_dir() and not any(list(path.glob(table)) for table in ("dataset_*.json", "*.parquet", "data/*.parquet")):
        files = sorted(path.glob("*.jsonl")) or sorted(path.glob("*.json"))
    if files:
        return json_files(args, *files)
    data = table(args.data, args.split, args.revision)
    if pictured := picture_columns(data):
        raise ProblemError(f"{args.data}: the column {pictured[0]!r} holds pictures; here rows name them by path")
    return table_rows(data, args.data)


def json_files(args, *files: Path) -> Iterator[Row]:
    """The rows of JSON or JSONL files. ProblemError when --split or --revision is given, which they have not."""
    for option in ("split", "revision"):
        if getattr(args, option) is not None:
            raise ProblemError(f"--{option} {getattr(args, option)}: {args.data} is JSON; only a data set has a {option}")
    for file in files:
        yield from tqdm(json_rows(file), unit="row", desc=file.name, disable=None, file=sys.stderr)


def picture_folder(args) -> Path | None:
    """Where relative picture paths start: --images, or beside the rows; None for a hub id."""
    path = Path(args.data)
    return args.images or (path if path.is_dir() else path.parent if path.is_file() else None)


def named_pictures(record: dict, column: str, root: Path | None) -> Shown:
    """The pictures whose paths a column holds: one, a list, or none (missing, null, empty)."""
    return pictures_at(column, chat.row_pictures(record, (column,)), root)


def pictures_at(field: str, addresses: list[str], root: Path | None) -> Shown:
    """Pictures at paths below `root`, or at file: or data: addresses."""
    return Shown(field, tuple(_picture(place, address, root) for place, address in named(field, tuple(addresses))))


def _picture(place: str, address: str, root: Path | None) -> Picture:
    if root is None and not address.startswith("data:"):
        raise ProblemError(f"{place}: {address!r:.80} is a path; name the folder that it starts from with --images")
    with _renamed(place):
        _, picture = chat.picture_of(address, root)

    def read() -> Path | bytes:
        with _renamed(place):
            return picture()

    return read


@contextmanager
def _renamed(place: str) -> Iterator[None]:
    try:
        yield
    except ProblemError as error:
        raise ProblemError(f"{place}: {str(error).removeprefix('image: ')}") from error


def parsed(value: Any) -> Any:
    """What a text holds as JSON, or the value itself: hub tables keep some objects as text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
