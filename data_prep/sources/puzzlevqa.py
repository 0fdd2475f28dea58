"""PuzzleVQA (Chia et al., 2024; github.com/declare-lab/LLM-PuzzleTest): abstract patterns with one part missing.

    python -m data_prep.sources.puzzlevqa --from DIR --out data/puzzlevqa [--template color_grid ...] [--limit N]

DIR is a clone, its PuzzleVQA folder, or a `data` folder of `<template>.json` files and `images/`. Two traps:

* The captions of four templates leave out the cue that the answer needs. They get no facts and
  meta.text_sufficient = false, so that they cannot be posed as text.
* In `grid_number` the right option is always the last. The file's order is kept here; `render` shows the options in an
  order drawn by a hash of each id, so a constant letter scores chance.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from data_prep.images import ProblemError, picture_path
from data_prep.read import BadRows, Problem
from data_prep.sources.common import Draft, Row, arguments, drafts_of, hashed, json_rows, run, take

SOURCE, LICENSE = "puzzlevqa", "MIT"
WITHOUT_CUE = {"circle_size_number", "polygon_sides_color", "polygon_sides_number", "shape_morph"}


def data_folder(root: Path) -> Path:
    """The folder of the template files at, or below, `root`."""
    for folder in (root, root / "data", root / "PuzzleVQA" / "data"):
        if (folder / "images").is_dir() and any(folder.glob("*.json")):
            return folder
    raise ProblemError(f"{root}: holds no PuzzleVQA data (a folder with <template>.json files and images/)")


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    folder = data_folder(args.source_dir)
    there = sorted(path.stem for path in folder.glob("*.json"))
    for template in args.template or there:
        if template not in there:
            raise ProblemError(f"{folder}: no template {template!r}; there are {', '.join(there)}")
        rows = json_rows(folder / f"{template}.json")
        yield from drafts_of(rows, partial(_build, template=template, folder=folder), bad)


def _build(row: dict, _: Row, *, template: str, folder: Path) -> list[Draft]:
    image, caption = take(row, "image", str), take(row, "caption", str).strip()
    options = tuple(str(option) for option in take(row, "options", list))
    sufficient = template not in WITHOUT_CUE

    def picture() -> Path:
        try:
            return picture_path(folder, image)
        except ProblemError as error:
            raise ProblemError(f"image: {error}") from error

    problem = Problem(
        id=f"puzzlevqa-{Path(image).stem}",
        # Puzzles with the same caption are one puzzle drawn twice: they may not stand in two splits.
        group=f"{template}-{hashed(caption)}",
        source=SOURCE,
        image=image.removeprefix("images/"),
        facts=caption if sufficient else None,
        question=take(row, "question", str).strip(),
        options=options,
        answer=str(take(row, "answer", str, int)),
        license=LICENSE,
        meta={"answer_with": "letter", "kind": template, "text_sufficient": sufficient},
    )
    return [Draft(problem, (picture,))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.puzzlevqa")
    parser.add_argument("--from", dest="source_dir", type=Path, required=True, help="a clone or its data folder")
    parser.add_argument("--template", action="append", help="a template's name; may be repeated (default: all)")
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
