"""Tables with pictures in them, as the hub stores them: what the adapters of single hub data sets share."""

from collections.abc import Callable
from pathlib import Path

from data_prep.images import ProblemError
from data_prep.sources import hf


def table(name: str, config: str, split: str, revision: str | None):
    """One split of one configuration, its pictures as the bytes that are stored.

    name: a hub id, or a folder with a copy of the repository. Of a copy the parquet files are read by themselves, because
    `datasets` keeps what it read of a folder with a README under the folder's last name, and would serve that again for
    another folder of this name, or for files changed since.
    """
    import datasets  # here, because it takes seconds and the command's --help should not

    if Path(name).is_dir():
        files = parquet_files(Path(name), config, split)
        try:
            data = datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
        except Exception as error:  # the library raises many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ProblemError(f"{files[0]}: cannot be loaded ({reason})") from error
    else:
        data, _ = hf.load(name, config, split, revision)
    for column, feature in data.features.items():
        bare = isinstance(feature, dict) and set(feature) == {"bytes", "path"}  # written by another library
        if isinstance(feature, datasets.Image) or bare:
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def parquet_files(folder: Path, config: str, split: str) -> list[Path]:
    """The files of a split where the hub's repositories have them: CONFIG/SPLIT-*, CONFIG/SPLIT/*, or CONFIG.parquet."""
    for pattern in (f"{config}/{split}-*.parquet", f"{config}/{split}/*.parquet", f"{config}.parquet"):
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
            raise ProblemError(f"{column}: must be a picture with its bytes, not {type(stored).__name__}")
        return stored["bytes"]

    return read


def check_columns(data, name: str, *wanted: str) -> None:
    """ProblemError when a column is missing."""
    for column in wanted:
        if column not in data.column_names:
            raise ProblemError(f"{name}: no column {column!r}; columns: {', '.join(data.column_names)}")
