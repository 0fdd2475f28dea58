"""Tables with pictures in them, as the hub stores them: what the adapters of single hub data sets share."""

from collections.abc import Callable
from pathlib import Path

from data_prep.images import ProblemError
from data_prep.sources import hf


def table(name: str, config: str, split: str, revision: str | None):
    """One split of one configuration, its pictures as the bytes that are stored.

    name: a hub id, or a folder with a copy of the repository's parquet files, which needs no README.
    """
    import datasets  # here, because it takes seconds and the command's --help should not

    files = parquet_files(Path(name), config, split) if Path(name).is_dir() else ()
    data, _ = hf.load(name, config, split, revision, files)
    for column, feature in data.features.items():
        # a struct or plain bytes: written by another library, which does not say that they are pictures
        bare = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        if isinstance(feature, datasets.Image) or bare or getattr(feature, "dtype", None) in ("binary", "large_binary"):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def parquet_files(folder: Path, config: str, split: str) -> list[Path]:
    """The files of a split where the hub's repositories have them; ProblemError when there are none."""
    named_split = (f"{config}/{split}-*.parquet", f"{config}/{split}/*.parquet", f"{config}/{split}.parquet")
    for pattern in (*named_split, f"{config}.parquet", f"{config}-*.parquet", f"data/{config}-*.parquet"):
        if found := sorted(folder.glob(pattern)):
            return found
    raise ProblemError(f"{folder}: no parquet files of {config!r} ({config}/{split}-*.parquet or {config}.parquet)")


def words(data):
    """The table without its pictures, to be walked through without reading them."""
    import datasets

    kept = [column for column, feature in data.features.items() if not isinstance(feature, datasets.Image)]
    return data.select_columns(kept)


def picture(data, number: int, column: str) -> Callable[[], bytes]:
    """A function that reads the bytes of a picture when they are needed: a large set does not lie in memory."""

    def read() -> bytes:
        stored = data[number][column]
        if not isinstance(stored, dict) or not isinstance(stored.get("bytes"), bytes):
            raise ProblemError(f"{column}: must be a picture with its bytes, not {stored!r:.60}")
        return stored["bytes"]

    return read


def check_columns(data, name: str, *wanted: str) -> None:
    """ProblemError when a column is missing."""
    for column in wanted:
        if column not in data.column_names:
            raise ProblemError(f"{name}: no column {column!r}; columns: {', '.join(data.column_names)}")
