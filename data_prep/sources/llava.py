"""LLaVA's JSON (Liu et al., 2023): [{"id", "image", "conversations": [{"from", "value"}]}], pictures in a folder.

    python -m data_prep.sources.llava --from FILE.json --images DIR --license NAME --out data/mine

`image` may be a list; then each `<image>` in the questions stands for one of them, in order. Each human/gpt pair becomes
a problem with an open answer. Rows without a picture are bad rows; --skip-bad leaves them out.
"""

from collections.abc import Iterator, Sequence

from data_prep.read import BadRows
from data_prep.sources import chat
from data_prep.sources.common import Draft, arguments, drafts_of, joined, json_rows, run, take


def drafts(args, bad: BadRows) -> Iterator[Draft]:
    maker = chat.conversations(args)

    def build(record: dict, row) -> list[Draft]:
        turns = [chat.turn_of(n, turn, "conversations") for n, turn in enumerate(take(record, "conversations", list))]
        return maker.drafts(record, turns, chat.row_pictures(record, ("image",)), row)

    return joined(drafts_of(json_rows(args.source_file), build, bad))


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.llava")
    chat.add_arguments(parser)
    run(parser, argv, drafts)


if __name__ == "__main__":
    main()
