"""A Hugging Face dataset, local (a folder of parquet, or one saved by save_to_disk) or on the hub, with a column map.

    python -m data_prep.sources.hf --from DIR_OR_HUB_ID --out data/mine --license NAME \\
        --map question=query image=img options=choices answer=label facts=caption id=uid [--answer-as index]

Columns named like a field map to it by themselves; `--map facts=` leaves one out. Options may be a list or a list
written as text ("['red', 'blue']"); the answer may be text, a letter or an index from 0.
"""

import ast
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.images import ProblemError
from data_prep.read import ANSWER_WITH, LETTERS, BadRows, Problem
from data_prep.sources.chat import picture_of
from data_prep.sources.common import Draft, Row, arguments, drafts_of, hashed, run

MAPPED = ("id", "group", "image", "facts", "question", "options", "answer", "license")
ANSWER_AS = ("auto", "text", "letter", "index")


def load(name: str, config: str | None, split: str | None, revision: str | None):
    """The dataset's rows and the split's name. Errors of the library become ProblemError."""
    import datasets  # here, because it takes seconds and the command's --help should not

    try:
        folder = Path(name)
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds, for the network, the names and the files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ProblemError(f"{name}: cannot be loaded ({reason})") from error
    if isinstance(found, dict):
        if split is None and len(found) > 1:
            raise ProblemError(f"{name}: has the splits {', '.join(found)}; choose one with --split")
        split = split or next(iter(found))
        if split not in found:
            raise ProblemError(f"{name}: no split {split!r}; there are {', '.join(found)}")
        found = found[split]
    return found, split or "all"


def column_map(pairs: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """field -> column from "field=column" pairs; unnamed fields take the column of their own name."""
    found = {name: name for name in MAPPED if name in columns}
    for pair in pairs:
        name, sign, column = pair.partition("=")
        if not sign or name not in MAPPED:
            raise ProblemError(f"--map {pair}: {_near(name, MAPPED)}write field=column; fields: {', '.join(MAPPED)}")
        if column and column not in columns:
            raise ProblemError(
                f"--map {pair}: no column {column!r}; {_near(column, columns)}columns: {', '.join(columns)}"
            )
        found.pop(name, None)
        if column:
            found[name] = column
    for name in ("question", "answer"):
        if name not in found:
            raise ProblemError(f"--map: no column for {name!r}; columns: {', '.join(columns)}")
    return found


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
    data = _undecoded(data, columns.get("image"))
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
        name, picture = None, None
        if field.get("image") is not None:
            name, picture = _picture(field["image"], args, lambda: data[number][columns["image"]])
        problem = Problem(
            id=ident,
            group=str(field["group"]) if field.get("group") is not None else name or ident,
            source=source,
            image=name,
            facts=field.get("facts") or None,
            question=field["question"],
            options=options,
            answer=answer_text(answer, options, args.answer_as),
            license=field.get("license") or license,
            meta={"answer_with": args.answer_with, "split": split},
        )
        return [Draft(problem, picture)]

    return drafts_of(_rows(data, args.source_name, columns.get("image")), build, bad)


def _rows(data, name: str, image: str | None) -> Iterator[Row]:
    for number, record in enumerate(data):
        words = {column: value for column, value in record.items() if column != image}
        yield Row(name, f"row {number}", repr(words), lambda record=record: record)


def _class_names(data, columns: dict[str, str]) -> tuple[str, ...] | None:
    """The class names when the answer is a class label: they are the options when no column gives any."""
    import datasets

    feature = data.features[columns["answer"]]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _undecoded(data, column: str | None):
    """Pictures as the bytes that are stored: decoding and encoding again would change them and drop their rotation."""
    import datasets

    if column and isinstance(data.features[column], datasets.Image):
        return data.cast_column(column, datasets.Image(decode=False))
    return data


def _picture(value: Any, args, again: Callable[[], Any]) -> tuple[str, Callable[[], Path | bytes]]:
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
