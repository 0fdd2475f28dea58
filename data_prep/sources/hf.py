"""A Hugging Face dataset, local (a folder of parquet, or one saved by save_to_disk) or on the hub, with a column map.

    python -m data_prep.sources.hf --from DIR_OR_HUB_ID --out data/mine --license NAME \\
        --map question=query image=img options=choices answer=label facts=caption id=uid [--answer-as index]

Columns named like a field map to it by themselves; `--map facts=` leaves one out. Options may be a list or a list
written as text ("['red', 'blue']"); the answer may be text, a letter or an index from 0. Several pictures are a column
of lists, or several columns, `--map image=image_1,image_2,image_3`; those that are null are left out.
"""

import ast
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.images import ProblemError
from data_prep.read import ANSWER_WITH, LETTERS, BadRows, Problem, one_or_several
from data_prep.sources.chat import picture_of
from data_prep.sources.common import Draft, Picture, Row, arguments, drafts_of, hashed, joined, run

MAPPED = ("id", "group", "image", "facts", "question", "options", "answer", "license")
ANSWER_AS = ("auto", "text", "letter", "index")


def load(name: str, config: str | None, split: str | None, revision: str | None, files: Sequence[Path] = ()):
    """The dataset's rows and the split's name. Errors of the library become ProblemError.

    files: parquet files of the local folder `name` that make up the split; without them the library looks for them.
    """
    import datasets  # here, because it takes seconds and the command's --help should not

    folder, place = Path(name), str(files[0]) if files else name
    try:
        if files:
            paths = {split: [str(file) for file in files]}
            found = datasets.load_dataset("parquet", data_files=paths, split=split, cache_dir=_own_cache(folder))
        elif (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            cache = _own_cache(folder) if folder.is_dir() else None
            found = datasets.load_dataset(name, config, split=split, revision=revision, cache_dir=cache)
    except Exception as error:  # the library raises many kinds, for the network, the names and the files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ProblemError(f"{place}: cannot be loaded ({reason})") from error
    if isinstance(found, dict):
        if split is None and len(found) > 1:
            raise ProblemError(f"{name}: has the splits {', '.join(found)}; choose one with --split")
        split = split or next(iter(found))
        if split not in found:
            raise ProblemError(f"{name}: no split {split!r}; there are {', '.join(found)}")
        found = found[split]
    return found, split or "all"


def _own_cache(folder: Path) -> str:
    """Where the library may keep what it reads of a folder, in the state that the folder is in.

    Of a folder with a README it would keep that under the folder's last name alone, and serve it again for another
    folder of this name, or for files changed since.
    """
    import datasets

    found = [(file, file.stat()) for file in sorted(folder.resolve().rglob("*")) if file.is_file()]
    state = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / hashed(str(folder.resolve()), repr(state)))


def column_map(pairs: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """field -> column from "field=column" pairs; unnamed fields take the column of their own name.

    For `image` the column may be several, joined by commas.
    """
    found = {name: name for name in MAPPED if name in columns}
    for pair in pairs:
        name, sign, column = pair.partition("=")
        if not sign or name not in MAPPED:
            raise ProblemError(f"--map {pair}: {_near(name, MAPPED)}write field=column; fields: {', '.join(MAPPED)}")
        for part in _image_columns(column) if name == "image" else [column] if column else []:
            if part not in columns:
                raise ProblemError(
                    f"--map {pair}: no column {part!r}; {_near(part, columns)}columns: {', '.join(columns)}"
                )
        found.pop(name, None)
        if column:
            found[name] = column
    for name in ("question", "answer"):
        if name not in found:
            raise ProblemError(f"--map: no column for {name!r}; columns: {', '.join(columns)}")
    return found


def _image_columns(mapped: str | None) -> list[str]:
    return mapped.split(",") if mapped else []


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}? " if near and near[0] != name else ""


def option_list(value: Any) -> tuple[str, ...] | None:
    """A row's options as texts; None when it has none."""
    if isinstance(value, str):
        value = _literal(value)
    if value is None or (isinstance(value, list | tuple) and not value):
        return None
    if not isinstance(value, list | tuple):
        raise ProblemError(f"options: must be a list, not {value!r:.60}")
    if any(isinstance(item, dict | list) or item is None for item in value):
        raise ProblemError(f"options: must hold texts or numbers, not {value!r:.60}")
    return tuple(str(item).strip() for item in value)


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ProblemError(f"options: {text!r:.60} is not a list written as text")


def answer_text(value: Any, options: tuple[str, ...] | None, how: str) -> str:
    """The answer as one of the options' texts, or as it is when there are none. `auto` refuses two readings."""
    if value is None or isinstance(value, list | dict):
        raise ProblemError(f"answer: must be text or a number, not {value!r:.60}")
    text = str(value).strip()
    if options is None:
        if how in ("letter", "index"):
            raise ProblemError(f"answer: --answer-as {how} needs options")
        return text
    number = int(text) if text.isdecimal() and not isinstance(value, bool) else None
    letter = LETTERS.find(text.upper()) if len(text) == 1 else -1
    readings = {
        "text": text if text in options else None,
        "letter": options[letter] if 0 <= letter < len(options) else None,
        "index": options[number] if number is not None and number < len(options) else None,
    }
    if how != "auto":
        if readings[how] is None:
            raise ProblemError(f"answer: {text!r} is no {how} of the options ({', '.join(options)})")
        return readings[how]
    found = {reading for reading in readings.values() if reading is not None}
    if len(found) != 1:
        said = "can be read in two ways" if found else "is not among the options"
        hint = "; say which with --answer-as" if found else ""
        raise ProblemError(f"answer: {text!r} {said} ({', '.join(options)}){hint}")
    return found.pop()


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    data, split = load(args.source_name, args.config, args.split, args.revision)
    columns = column_map(args.map or [], data.column_names)
    names = _class_names(data, columns)
    pictured = _image_columns(columns.pop("image", None))
    data = _undecoded(data, pictured)
    source = args.source or args.source_name.rstrip("/").split("/")[-1]
    license = args.license or data.info.license or None
    if not license and "license" not in columns:
        raise ProblemError(f"{args.source_name}: license: the dataset names none; give --license")

    def build(record: dict, row: Row) -> list[Draft]:
        field = {name: record[column] for name, column in columns.items()}
        number = int(str(row.where).removeprefix("row "))
        ident = str(field["id"]) if field.get("id") is not None else f"{source}-{split}-{number}"
        options = option_list(field["options"]) if "options" in field else names
        answer = field["answer"]
        if names and isinstance(answer, int) and 0 <= answer < len(names):
            answer = names[answer]
        found = [
            _picture(value, args, lambda at=at: _values(data[number], pictured)[at])
            for at, value in enumerate(_values(record, pictured))
            if value is not None
        ]
        problem = Problem(
            id=ident,
            group=str(field["group"]) if field.get("group") is not None else found[0][0] if found else ident,
            source=source,
            image=one_or_several(name for name, _ in found),
            facts=field.get("facts") or None,
            question=field["question"],
            options=options,
            answer=answer_text(answer, options, args.answer_as),
            license=field.get("license") or license,
            meta={"answer_with": args.answer_with, "split": split},
        )
        return [Draft(problem, tuple(picture for _, picture in found))]

    made = drafts_of(_rows(data, args.source_name, pictured), build, bad)
    return made if "group" in columns else joined(made)


def _rows(data, name: str, pictured: Sequence[str]) -> Iterator[Row]:
    for number, record in enumerate(data):
        words = {column: value for column, value in record.items() if column not in pictured}
        yield Row(name, f"row {number}", repr(words), lambda record=record: record)


def _class_names(data, columns: dict[str, str]) -> tuple[str, ...] | None:
    """The class names when the answer is a class label: they are the options when no column gives any."""
    import datasets

    feature = data.features[columns["answer"]]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _undecoded(data, pictured: Sequence[str]):
    """Pictures as the bytes that are stored: decoding and encoding again would change them and drop their rotation."""
    import datasets

    stored = datasets.Image(decode=False)
    for column in pictured:
        feature = data.features[column]
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, stored)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(column, datasets.Sequence(stored))
    return data


def _values(record: dict, pictured: Sequence[str]) -> list[Any]:
    """What a row holds in its picture columns, lists one after the other."""
    cells = [record[column] for column in pictured]
    return [value for cell in cells for value in (cell if isinstance(cell, list) else [cell])]


def _picture(value: Any, args, again: Callable[[], Any]) -> tuple[str, Picture]:
    """(name, function that gives the picture) of bytes, {"bytes", "path"}, or a path below the dataset's folder."""
    if isinstance(value, dict) and value.get("bytes") is None:
        value = value.get("path")
    if isinstance(value, str):
        return picture_of(value, args.images or Path(args.source_name))
    data = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ProblemError(f"image: must be a picture, its bytes or a path, not {type(value).__name__}")

    def picture() -> bytes:  # read again when it is needed, so that a large set does not lie in memory
        found = again()
        return found["bytes"] if isinstance(found, dict) else found

    return hashed(data), picture


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.hf")
    parser.add_argument("--from", dest="source_name", required=True, help="a local folder or a hub id")
    parser.add_argument("--map", nargs="+", metavar="FIELD=COLUMN", help=f"fields: {', '.join(MAPPED)}")
    parser.add_argument(
        "--answer-as", choices=ANSWER_AS, default="auto", help="how answers are written (default: auto)"
    )
    parser.add_argument(
        "--answer-with", choices=ANSWER_WITH, default="letter", help="what a model says: letter (default) or text"
    )
    parser.add_argument("--config", help="the dataset's configuration")
    parser.add_argument("--split", help="the split to read")
    parser.add_argument("--revision", help="the hub revision, for a run that can be repeated")
    parser.add_argument("--images", type=Path, help="folder of picture paths (default: the dataset's)")
    parser.add_argument("--source", help="the source's name (default: the dataset's)")
    parser.add_argument("--license", help="the licence; read from the dataset where it names one")
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
