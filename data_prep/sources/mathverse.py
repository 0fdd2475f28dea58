"""MathVerse (Zhang et al., 2024; arXiv 2403.14624): one problem in five versions, from all in words to all in the picture.

    python -m data_prep.sources.mathverse --from AI4Math/MathVerse --out data/mathverse [--limit N]

--from is the hub's id or a local copy of it (parquet with the pictures' bytes). One problem is made for each pair of a
text version (Text Dominant, Text Lite) and a vision version (Vision Intensive, Vision Dominant, Vision Only):

    vision   the vision version's picture and question
    both     the text version's picture and question (meta.published.both)

The question of Vision Only is drawn in its picture, so its `vision` and `rendered` prompts hold no word of it; views
that must say the question in words (blind) take that of Vision Intensive. `question_for_eval`, which repeats the
question of Vision Only for a judge, is never read.

Choices are taken out of the question and shown as options in the order published, because Vision Only draws them. All
versions of a problem are one group. Everything goes to test.jsonl.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence

from data_prep.images import ProblemError
from data_prep.read import LETTERS, BadRows, Problem
from data_prep.sources import hub
from data_prep.sources.common import Draft, Row, arguments, drafts_of, run, take

SOURCE, LICENSE = "mathverse", "MIT"
TEXT_VERSIONS = ("Text Dominant", "Text Lite")
VISION_VERSIONS = ("Vision Intensive", "Vision Dominant", "Vision Only")
DRAWN, IN_WORDS = "Vision Only", "Vision Intensive"  # the version without a question in words, and whose it takes
COLUMNS = ("problem_index", "problem_version", "question", "image", "answer", "question_type")

_HEADER = re.compile(r"(?:^|\s)(?:choices|options)\s*:", re.I)


def split_choices(question: str) -> tuple[str, tuple[str, ...]]:
    """(question without its choices, choices) of "... Choices:\\nA:40\\nB:60"; labels A: A. A) (A), each on a line of its
    own or, where they are not, all in one.

    ProblemError when there are none.
    """
    headers = list(_HEADER.finditer(question))
    start = headers[-1].end() if headers else 0
    for edge in (r"(?:^|\n)\s*", r"(?:^|(?<=\s))"):
        places = _labels(question, start, edge)
        if len(places) > 1:
            ends = [place[0] for place in places[1:]] + [len(question)]
            choices = tuple(question[label_end:end].strip() for (_, label_end), end in zip(places, ends))
            return question[: headers[-1].start() if headers else places[0][0]].strip(), choices
    raise ProblemError("question: no choices (A: ..., B: ...) are found in it")


def _labels(text: str, start: int, edge: str) -> list[tuple[int, int]]:
    """(start, end) of the labels A, B, C, ... as far as they follow each other."""
    places: list[tuple[int, int]] = []
    for letter in LETTERS:
        label = re.compile(rf"{edge}(?:\({letter}\)\s*[:.]?|{letter}\s*[:.)])")
        match = label.search(text, places[-1][1] if places else start)
        if not match:
            break
        places.append(match.span())
    return places


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    data = hub.table(args.source_name, args.config, args.split, args.revision)
    hub.check_columns(data, args.source_name, *COLUMNS)
    problems: dict[str, list[tuple[int, dict]]] = {}
    for number, record in enumerate(hub.words(data)):
        problems.setdefault(str(record["problem_index"]), []).append((number, record))

    incomplete = 0
    for found in problems.values():
        incomplete += not {record["problem_version"] for _, record in found}.issuperset(TEXT_VERSIONS + VISION_VERSIONS)
    if incomplete:
        print(f"mathverse: {incomplete} of {len(problems)} problems lack a version; pairs are made of the rest", file=sys.stderr)

    def build(versions: dict, row: Row) -> list[Draft]:
        return _pairs(versions, data)

    yield from drafts_of((_row(args.source_name, index, found) for index, found in problems.items()), build, bad)


def _row(name: str, index: str, found: list[tuple[int, dict]]) -> Row:
    def parse() -> dict:
        versions: dict[str, tuple[int, dict]] = {}
        for number, record in found:
            version = take(record, "problem_version", str)
            if version in versions:
                raise ProblemError(f"problem_version: {version!r} stands in rows {versions[version][0]} and {number}")
            versions[version] = (number, record)
        return versions

    numbers = [number for number, _ in found]
    where = f"rows {numbers[0]}-{numbers[-1]} (problem_index {index})"
    return Row(name, where, json.dumps([record for _, record in found], ensure_ascii=False, default=str), parse)


def _pairs(versions: dict[str, tuple[int, dict]], data) -> list[Draft]:
    made = []
    for vision in VISION_VERSIONS:
        worded = IN_WORDS if vision == DRAWN else vision  # the version whose question is said in words
        if vision not in versions or worded not in versions:
            continue
        for text in TEXT_VERSIONS:
            if text in versions:
                made.append(_pair(text, vision, worded, versions, data))
    return made


def _pair(text: str, vision: str, worded: str, versions: dict[str, tuple[int, dict]], data) -> Draft:
    row, index = versions[vision][1], str(versions[vision][1]["problem_index"])
    closed = take(row, "question_type", str) == "multi-choice"
    question, options = _said(worded, versions[worded][1], closed)
    told, told_options = _said(text, versions[text][1], closed)
    answer = take(row, "answer", str).strip()
    for other in (text, worded):
        if take(versions[other][1], "answer", str).strip() != answer:
            raise ProblemError(f"answer: {vision} has {answer!r}, {other} has {versions[other][1]['answer']!r}")
    if closed:
        if told_options != options:
            raise ProblemError(f"question: {text} has other choices than {worded}")
        place = LETTERS.find(answer) if len(answer) == 1 else -1
        if not 0 <= place < len(options):
            raise ProblemError(f"answer: {answer!r} is no letter of the {len(options)} choices")
        answer = options[place]
    published: dict[str, dict] = {"both": {"question": told}}
    if vision == DRAWN:
        published |= {"vision": {"question": None}, "rendered": {"question": None}}
    metadata = row["metadata"] if isinstance(row.get("metadata"), dict) else {}
    problem = Problem(
        id=f"{SOURCE}-{index}-{_slug(text)}-{_slug(vision)}",
        group=f"{SOURCE}-{index}",
        source=SOURCE,
        image="picture",  # a stand-in: bytes lie under a name of their own
        facts=None,
        question=question,
        options=options,
        answer=answer,
        license=LICENSE,
        meta={
            "answer_with": "letter",
            "keep_order": True,
            "kind": vision,
            "text_version": text,
            "subject": metadata.get("subject"),
            "subfield": metadata.get("subfield"),
            "published": published,
        },
    )
    own, other = (hub.picture(data, versions[version][0], "image") for version in (vision, text))
    return Draft(problem, (own,), {"both": (other,)})


def _said(version: str, row: dict, closed: bool) -> tuple[str, tuple[str, ...] | None]:
    """(question in words, choices or None) of a version."""
    question = take(row, "question", str).strip()
    if not closed:
        return question, None
    try:
        question, options = split_choices(question)
    except ProblemError as error:
        raise ProblemError(f"{error} ({version})") from error
    return question, tuple(" ".join(option.split()) for option in options)


def _slug(version: str) -> str:
    return version.lower().replace(" ", "_")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.mathverse", test_share=1)
    parser.add_argument("--from", dest="source_name", required=True, help="AI4Math/MathVerse or a local copy of it")
    parser.add_argument("--config", default="testmini", help="the configuration (default: %(default)s)")
    parser.add_argument("--split", default="testmini", help="the split (default: %(default)s)")
    parser.add_argument("--revision", help="the hub revision, for a run that can be repeated")
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
