"""Chat files in ShareGPT's or OpenAI's spelling, JSONL or one JSON list.

    python -m data_prep.sources.messages --from FILE.jsonl --license NAME --out data/mine [--images DIR]

{"conversations": [{"from": "human", "value": "..."}, ...], "images": ["a.png"]}, or {"messages": [{"role": "user",
"content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "..."}]}, ...]}. Pictures are
local paths, file: or data: addresses. Each question and answer becomes a problem with an open answer, which shows the
pictures given so far; a system message is kept in meta.
"""

from collections.abc import Iterator, Sequence

from data_prep.images import ProblemError
from data_prep.read import BadRows
from data_prep.sources import chat
from data_prep.sources.common import Draft, arguments, drafts_of, joined, json_rows, run, take


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    maker = chat.conversations(args)

    def build(record: dict, row) -> list[Draft]:
        field = next((name for name in ("messages", "conversations") if name in record), None)
        if field is None:
            raise ProblemError("messages: missing field (neither messages nor conversations)")
        turns = [chat.turn_of(n, turn, field) for n, turn in enumerate(take(record, field, list))]
        return maker.drafts(record, turns, chat.row_pictures(record), row)

    return joined(drafts_of(json_rows(args.source_file), build, bad))


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.messages")
    chat.add_arguments(parser)
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
