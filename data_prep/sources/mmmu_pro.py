"""MMMU-Pro (Yue et al., 2024; arXiv 2409.02813): college questions with pictures, also as screenshots of themselves.

    python -m data_prep.sources.mmmu_pro --from MMMU/MMMU_Pro --out data/mmmu_pro [--options 4] [--no-rendered]

--from is the hub's id or a local copy of it. One problem per item of the standard configuration with 10 (or 4) options.
Its pictures stand where the question or an option names them (<image 1>). Where some are named, the others are those of
the item's explanation (the authors say so in MMMU-Benchmark/MMMU, issue 56) and are left out; where none is, all stand
before the question. With 10 options the `rendered` view is the screenshot that the configuration `vision` holds under
the same id, so the options keep their order. Everything goes to test.jsonl.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from data_prep.images import ProblemError
from data_prep.read import LETTERS, BadRows, Problem
from data_prep.sources import hub
from data_prep.sources.common import Draft, Row, arguments, drafts_of, run, take
from data_prep.sources.hf import option_list

SOURCE, LICENSE = "mmmu_pro", "Apache-2.0"
PICTURES = tuple(f"image_{number}" for number in range(1, 8))

_MARKER = re.compile(r"<\s*image\s*(\d+)\s*>")


def renumbered(texts: Sequence[str], there: Sequence[int]) -> list[str]:
    """The texts with their markers counting the pictures that are there: 1 for the first, without gaps.

    there: numbers of the pictures, ascending. ProblemError for a marker whose picture is not among them.
    """

    def mark(match: re.Match) -> str:
        if int(match[1]) not in there:
            raise ProblemError(f"question: {match[0]} is named there or in an option, but image_{match[1]} is empty")
        return f"<image {there.index(int(match[1])) + 1}>"

    return [_MARKER.sub(mark, text) for text in texts]


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    config = f"standard ({args.options} options)"
    data = hub.table(args.source_name, config, args.split, args.revision)
    hub.check_columns(data, f"{args.source_name} {config}", "id", "question", "options", "answer", PICTURES[0])
    shots, screens = {}, None
    if args.options == 10 and not args.no_rendered:
        screens = hub.table(args.source_name, "vision", args.split, args.revision)
        hub.check_columns(screens, f"{args.source_name} vision", "id", "image", "answer")
        shots = {record["id"]: (number, record["answer"]) for number, record in enumerate(hub.words(screens))}
        records = hub.words(data).select_columns(["id", "answer"])
        lone = sum(shots.get(record["id"], (0, None))[1] != record["answer"] for record in records)
        if lone:
            print(
                f"mmmu_pro: {lone} of {len(data)} problems have no screenshot with their id and answer; "
                "for them `rendered` is drawn",
                file=sys.stderr,
            )
    rows = (_row(f"{args.source_name} {config}", number, record) for number, record in enumerate(data))
    yield from drafts_of(rows, partial(_build, data=data, screens=screens, shots=shots), bad)


def _row(name: str, number: int, record: dict) -> Row:
    words = {key: value for key, value in record.items() if key not in PICTURES}
    there = [place for place, column in enumerate(PICTURES, start=1) if record.get(column) is not None]
    found = {**words, "number": number, "pictures": there}
    return Row(name, f"row {number}", json.dumps(words, ensure_ascii=False, default=str), lambda: found)


def _build(row: dict, _: Row, *, data, screens, shots: dict[str, tuple[int, str]]) -> list[Draft]:
    ident, letter, there = take(row, "id", str), take(row, "answer", str).strip(), row["pictures"]
    options = option_list(row["options"]) or ()
    texts = [take(row, "question", str).strip(), *options]
    named = {int(number) for text in texts for number in _MARKER.findall(text)}
    there = [number for number in there if number in named or not named]
    question, *options = renumbered(texts, there)
    place = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= place < len(options):
        raise ProblemError(f"answer: {letter!r} is no letter of the {len(options)} options")
    meta = {"answer_with": "letter", "keep_order": True, "kind": str(row.get("subject") or "")}
    meta |= {name: row[name] for name in ("topic_difficulty", "img_type") if row.get(name) is not None}
    published = {}
    number, shown = shots.get(ident, (None, None))
    if number is not None and shown == letter:
        meta["published"] = {"rendered": {"question": None}}
        published = {"rendered": (hub.picture(screens, number, "image"),)}
    problem = Problem(
        id=f"{SOURCE}-{ident}",
        group=f"{SOURCE}-{ident}",
        source=SOURCE,
        image=tuple(PICTURES[number - 1] for number in there) or None,  # stand-ins: bytes lie under names of their own
        facts=None,
        question=question,
        options=tuple(options),
        answer=options[place],
        license=LICENSE,
        meta=meta,
    )
    return [Draft(problem, tuple(hub.picture(data, row["number"], PICTURES[number - 1]) for number in there), published)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.mmmu_pro", test_share=1)
    parser.add_argument("--from", dest="source_name", required=True, help="MMMU/MMMU_Pro or a local copy of it")
    parser.add_argument(
        "--options", type=int, choices=(10, 4), default=10, help="the standard configuration (default: %(default)s)"
    )
    parser.add_argument("--no-rendered", action="store_true", help="leave the screenshots out; `rendered` is then drawn")
    parser.add_argument("--split", default="test", help="the split (default: %(default)s)")
    parser.add_argument("--revision", help="the hub revision, for a run that can be repeated")
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
