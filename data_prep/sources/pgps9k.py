"""PGPS9K (Zhang et al., 2023; arXiv 2302.11097): plane geometry, every diagram also written down in clauses.

    python -m data_prep.sources.pgps9k --from DIR --out data/pgps9k [--choices] [--upstream-slip] [--limit N]

The data is handed out by its owners on request (www.nlpr.ia.ac.cn/databases/CASIA-PGPS9K) and is never shipped. DIR is
their folder: train.json and test.json, or a folder PGPS9K with both, and Diagram_Visual/ beside or above them. Their
split is kept: train.json becomes train.jsonl, test.json becomes test.jsonl.

Facts are the clauses in the words of Yao et al. (2025, arXiv 2510.22836): structure first, then measures and relations.
Their code reads "line D E I K" as "D, E are on line IK"; here it is "E, I are on line DK", because the first and the
last point name a line and the others lie on it. --upstream-slip brings their reading back.

Answers are open numbers ("48.000" is kept as "48"). --choices asks for one of the four published choices instead: the
one nearest to the answer is right.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from data_prep.images import ProblemError, picture_path
from data_prep.read import BadRows, Problem, parse_json
from data_prep.sources.common import Draft, Row, arguments, drafts_of, run, take

SOURCE, LICENSE = "pgps9k", "research use, on request from the owners"
SPLITS = ("train", "test")
PICTURES = "Diagram_Visual"


def in_words(clause: str, *, upstream_slip: bool = False) -> str | None:
    """A structure clause in English; None for one that says nothing beyond the names of a line's ends."""
    match clause.split():
        case ["line", name, "lieson", first, *rest]:
            return f"{', '.join([first, *rest])} lie on line {name}"
        case ["line", start, middle, end]:
            return f"{middle} is on line {start}{end}"
        case ["line", first, *middle, before, last] if middle and upstream_slip:
            return f"{', '.join([first, *middle])} are on line {before}{last}"
        case ["line", start, *middle, end] if middle:
            return f"{', '.join(middle)} are on line {start}{end}"
        case ["\\odot", centre, "lieson", first, *rest]:
            return f"In \\odot {centre}, point {', '.join([first, *rest])} lie on \\odot {centre}"
    return None


def facts(structure: Sequence[str], semantics: Sequence[str], *, upstream_slip: bool = False) -> str | None:
    """All clauses as one text; None when there is none."""
    said = [in_words(clause, upstream_slip=upstream_slip) for clause in structure]
    return ", ".join(clause for clause in [*said, *(clause.strip() for clause in semantics)] if clause) or None


def number_text(value: str | float) -> str:
    """A number without the zeros that say nothing: "48.000" -> "48", 8.50 -> "8.5"."""
    text = (value if isinstance(value, str) else f"{value:.10f}").strip()
    try:
        finite = math.isfinite(float(text))
    except ValueError:
        finite = False
    if not finite:
        raise ProblemError(f"answer: {text!r} is not a number")
    if text.lstrip("+-").replace(".", "", 1).isdecimal() and "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def nearest(choices: Sequence[float], answer: str) -> str:
    """The text of the choice that is nearest to the answer; ProblemError when two are."""
    order = sorted(choices, key=lambda choice: abs(choice - float(answer)))
    if len(order) > 1 and abs(order[0] - float(answer)) == abs(order[1] - float(answer)):
        raise ProblemError(f"choices: {order[0]} and {order[1]} are equally near to the answer {answer}")
    return number_text(order[0])


def data_folders(root: Path) -> tuple[Path, Path]:
    """(folder of the split files, folder of the pictures) at, or below, `root`."""
    for folder in (root, root / "PGPS9K", root / "PGPS9K_all" / "PGPS9K"):
        if any((folder / f"{split}.json").is_file() for split in SPLITS):
            for above in (folder, folder.parent):
                if (above / PICTURES).is_dir():
                    return folder, above / PICTURES
            raise ProblemError(f"{folder}: no folder {PICTURES}/ beside its json files or above them")
    raise ProblemError(f"{root}: holds no PGPS9K data (train.json and test.json)")


def rows_of(file: Path) -> list[Row]:
    """One row per problem; the file is one object {"prob_1": {...}, ...}."""
    try:
        found = parse_json(file.read_bytes())
    except ProblemError as error:
        raise ProblemError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise ProblemError(f"{file}: must be one object of problems by name")
    return [
        Row(file, name, json.dumps(row, ensure_ascii=False), lambda row=row: row) for name, row in found.items()
    ]


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    folder, pictures = data_folders(args.source_dir)
    parts = {split: rows_of(folder / f"{split}.json") for split in SPLITS if (folder / f"{split}.json").is_file()}
    _tell_shared(parts)
    for split, rows in parts.items():
        yield from drafts_of(rows, partial(_build, split=split, pictures=pictures, args=args), bad)


def _tell_shared(parts: dict[str, list[Row]]) -> None:
    diagrams = [
        {str(row.parse().get("diagram")) for row in rows if isinstance(row.parse(), dict)} for rows in parts.values()
    ]
    shared = set.intersection(*diagrams) if len(diagrams) > 1 else set()
    if shared:
        print(
            f"pgps9k: {len(shared)} diagrams stand in train.json and in test.json; the owners' split is kept",
            file=sys.stderr,
        )


def _build(row: dict, source: Row, *, split: str, pictures: Path, args) -> list[Draft]:
    diagram = take(row, "diagram", str)
    clauses = [_texts(row, name) for name in ("parsing_stru_seqs", "parsing_sem_seqs")]
    answer = number_text(take(row, "answer", str, int, float))
    options = None
    if args.choices:
        choices = take(row, "choices", list)
        if not all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices) or not choices:
            raise ProblemError(f"choices: must be numbers, not {choices!r:.60}")
        options, answer = tuple(number_text(choice) for choice in choices), nearest(choices, answer)

    def picture() -> Path:
        try:
            return picture_path(pictures, diagram)
        except ProblemError as error:
            raise ProblemError(f"diagram: {error}") from error

    problem = Problem(
        id=f"{SOURCE}-{split}-{source.where}",
        group=f"{SOURCE}-{diagram}",  # problems about one diagram are not independent
        source=SOURCE,
        image=diagram,
        facts=facts(*clauses, upstream_slip=args.upstream_slip),
        question=take(row, "text", str).strip(),
        options=options,
        answer=answer,
        license=LICENSE,
        meta={
            "answer_with": "letter",
            "kind": str(row.get("type", "")).strip(),
            "split": split,
            "book": row.get("book"),
            "page": row.get("page"),
        },
    )
    return [Draft(problem, (picture,))]


def _texts(row: dict, name: str) -> list[str]:
    found = take(row, name, list)
    if not all(isinstance(text, str) for text in found):
        raise ProblemError(f"{name}: must be a list of texts")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.pgps9k", test_share=None)
    parser.add_argument("--from", dest="source_dir", type=Path, required=True, help="the owners' folder")
    parser.add_argument("--choices", action="store_true", help="the four published choices as options (default: open)")
    parser.add_argument(
        "--upstream-slip", action="store_true", help="clauses of lines with 4 or more points as Yao et al.'s code reads them"
    )
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
