"""MMPR (Wang et al., 2024; arXiv 2411.10442): about 3 million pairs of reasoning and short answers, in 90 JSONL files.

    python -m data_prep.sources.preference.mmpr --data MMPR/meta.json --images MMPR/images --out data/mmpr [--limit N]
    python -m data_prep.sources.preference.mmpr --data MMPR/annotations/NAME.jsonl --images MMPR/images/NAME --out data/mmpr

Rows: image (a path, a list of them, or none: text only), question with `<image>` where pictures stand, chosen, rejected;
perhaps id. With meta.json every annotation file that it names is read; its paths are those of the authors' machines, of which
the part after annotations/ is looked for beside meta.json, and the part after images/ in --images. Without it --data is one
annotation file or a folder of them, whose paths all start in --images. A pair's meta names its file. The repeat_time and length
of meta.json are not looked at. MIT.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.images import ProblemError
from data_prep.read import BadRows, parse_json
from data_prep.sources.common import Row, made_of, take
from data_prep.sources.preference.common import Draft, Source, arguments, prompt_of, run, said
from data_prep.sources.preference.rows import json_files, named_pictures, picture_folder, source_rows

SOURCE, LICENSE = "mmpr", "MIT"


class Subset(NamedTuple):
    file: Path
    root: Path  # of its pictures


def drafts(args, source: Source, bad: BadRows) -> Iterator[Draft]:
    subsets = _subsets(args)
    if subsets is None:
        yield from made_of(source_rows(args), _builder(source, picture_folder(args)), bad)
        return
    for subset in subsets:
        yield from made_of(json_files(args, subset.file), _builder(source, subset.root), bad)


def _builder(source: Source, root: Path | None) -> Callable[[dict, Row], list[Draft]]:
    def build(record: dict, row: Row) -> list[Draft]:
        images = named_pictures(record, "image", root)
        for name in ("chosen", "rejected"):
            if name not in record:
                raise ProblemError(f"{name}: missing field")
        return source.draft(
            row,
            prompt_of([("user", take(record, "question", str))], len(images.pictures), "question"),
            said(record["chosen"], "chosen"),
            rejected=said(record["rejected"], "rejected"),
            images=images,
            label=record.get("id"),
            meta={"subset": Path(row.file).stem},
        )

    return build


def _subsets(args) -> list[Subset] | None:
    """The annotation files that a meta.json names; None when --data is none."""
    path = Path(args.data)
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        meta = parse_json(path.read_bytes())
    except ProblemError:  # rows, one a line
        return None
    if not isinstance(meta, dict) or not all(isinstance(entry, dict) and "annotation" in entry for entry in meta.values()):
        return None
    images, found = args.images or path.parent / "images", []
    for name, entry in meta.items():
        try:
            annotation, root = _after("annotations", take(entry, "annotation", str)), _after("images", take(entry, "root", str))
        except ProblemError as error:
            raise ProblemError(f"{path}: {name}.{error}") from error
        places = (path.parent / "annotations" / annotation, path.parent / annotation)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise ProblemError(f"{path}: {name}.annotation: {annotation!r} does not exist in {path.parent / 'annotations'}")
        found.append(Subset(file, images / root))
    return found


def _after(folder: str, path: str) -> str:
    """The part of a path behind the last folder of this name; all of it when it has none, without a leading slash."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ProblemError(f"{'root' if folder == 'images' else 'annotation'}: {path!r} leaves the data folder with '..'")
    place = max((number for number, part in enumerate(parts) if part == folder), default=-1)
    return "/".join(parts[place + 1 :])


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.preference.mmpr", "meta.json, an annotation file, or a folder of them")
    parser.add_argument("--images", type=Path, help="folder that picture paths start from (default: beside --data)")
    run(parser, argv, drafts, SOURCE, LICENSE)


if __name__ == "__main__":
    main()
