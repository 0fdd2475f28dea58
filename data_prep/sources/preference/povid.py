"""POVID (Zhou et al., 2024; arXiv 2402.11411): 17 thousand answers from LLaVA's data, and each with errors put in by GPT-4V.

    python -m data_prep.sources.preference.povid --data POVID_preference_data_for_VLLMs.json --images DIR --out data/povid

A JSON list (or JSONL) of {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}],
"rejected_conversations": the same with worse answers}. `image` is a path below DIR; a list is read too. Where a conversation
has several answers, every one that differs becomes a pair, with the better answers before it in its prompt. The questions of
both must be the same. The data card names CC-BY-4.0; the pictures (COCO, Visual Genome) have their own terms.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.images import ProblemError
from data_prep.read import BadRows
from data_prep.sources import chat
from data_prep.sources.common import Row, made_of, take
from data_prep.sources.preference.common import Draft, Shown, Source, arguments, prompt_of, run, said
from data_prep.sources.preference.rows import named_pictures, picture_folder, source_rows

SOURCE, LICENSE = "povid", "CC-BY-4.0"


def drafts(args, source: Source, bad: BadRows) -> Iterator[Draft]:
    root = picture_folder(args)

    def build(record: dict, row: Row) -> list[Draft]:
        better, worse = (_turns(record, field) for field in ("conversations", "rejected_conversations"))
        if [turn.role for turn in better] != [turn.role for turn in worse]:
            raise ProblemError("rejected_conversations: must have the same turns as conversations")
        for number, (one, other) in enumerate(zip(better, worse)):
            if one.role != "assistant" and _words(one.text) != _words(other.text):
                raise ProblemError(f"rejected_conversations[{number}]: asks something else than conversations[{number}]")
        images, made = named_pictures(record, "image", root), []
        answers = [number for number, turn in enumerate(better) if turn.role == "assistant"]
        if not answers or answers[0] == 0 or better[answers[0] - 1].role != "user":
            raise ProblemError("conversations: must have a question and then an answer")
        whole = _prompt(better[: answers[-1]], len(images.pictures))
        differing = [number for number in answers if better[number].text.strip() != worse[number].text.strip()]
        for number in differing or answers[-1:]:
            # A picture that stands in a later question is not shown with an earlier one.
            shown = _tokens(better[:number]) if _tokens(better) else len(images.pictures)
            made += source.draft(
                row,
                whole if number == answers[-1] else _prompt(better[:number], shown),
                said(better[number].text, "conversations"),
                rejected=said(worse[number].text, "rejected_conversations"),
                images=Shown(images.field, images.pictures[:shown]),
                label=record.get("id"),
                meta={"turn": answers.index(number)} if len(answers) > 1 else {},
            )
        return made

    return made_of(source_rows(args), build, bad)


def _turns(record: dict, field: str) -> list[chat.Turn]:
    return [chat.turn_of(number, turn, field) for number, turn in enumerate(take(record, field, list))]


def _tokens(turns: Sequence[chat.Turn]) -> int:
    return sum(turn.text.count(chat.IMAGE_TOKEN) for turn in turns)


def _prompt(turns: Sequence[chat.Turn], count: int) -> tuple[dict, ...]:
    return prompt_of([(turn.role, turn.text) for turn in turns], count, "conversations")


def _words(text: str) -> list[str]:
    return text.replace(chat.IMAGE_TOKEN, " ").split()


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.preference.povid", "the JSON file, or the hub's id")
    parser.add_argument("--images", type=Path, help="folder that picture paths start from (default: beside --data)")
    run(parser, argv, drafts, SOURCE, LICENSE)


if __name__ == "__main__":
    main()
