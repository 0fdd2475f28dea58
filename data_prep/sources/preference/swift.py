"""ms-swift's preference rows: JSONL with messages, images, and what is rejected.

    python -m data_prep.sources.preference.swift --data FILE.jsonl --license NAME --out data/mine [--images DIR] [--source NAME]

{"messages": [..., {"role": "assistant", "content": "better"}], "images": ["a.png"], "rejected_response": "worse"}. In place
of rejected_response (a text; a list makes one pair of each), rejected_messages may hold the whole other conversation, which
must differ in its last answer alone. `<image>` in the user's messages marks the places of the pictures; content may also be a
list of parts. Pictures are local paths, file: or data: addresses.

rejected_images holds as many pictures for which the better answer is wrong. A row may have these and no rejected answer: then
its sides differ in their pictures alone. Where both differ, both become sides of the pair. Other fields (tools, margin) are not
looked at; videos and audios are refused.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.images import ProblemError
from data_prep.read import BadRows
from data_prep.sources import chat
from data_prep.sources.common import Row, made_of, take
from data_prep.sources.preference.common import Draft, Shown, Source, arguments, prompt_of, run, said
from data_prep.sources.preference.rows import picture_folder, pictures_at, source_rows

REFUSED = ("videos", "audios", "rejected_videos", "rejected_audios")


def drafts(args, source: Source, bad: BadRows) -> Iterator[Draft]:
    root = picture_folder(args)

    def build(record: dict, row: Row) -> list[Draft]:
        for name in REFUSED:
            if record.get(name):
                raise ProblemError(f"{name}: only pictures are read")
        turns, chosen = _conversation(record, "messages")
        images = _addresses(record, turns, "images")
        rejected, other = _rejected(record, turns, images)
        if not rejected and not other:
            raise ProblemError("rejected_response: missing, and neither rejected_messages nor other rejected_images are there")
        prompt = prompt_of([(turn.role, turn.text) for turn in turns], len(images), "messages")
        made = []
        for answer in rejected or [None]:
            made += source.draft(
                row, prompt, chosen, rejected=answer, images=pictures_at("images", images, root),
                other=pictures_at("rejected_images", other, root) if other else Shown(), label=record.get("id"),
            )  # fmt: skip
        return made

    return made_of(source_rows(args), build, bad)


def _conversation(record: dict, field: str) -> tuple[list[chat.Turn], str]:
    """(turns before the last answer, last answer)."""
    *turns, last = [chat.turn_of(number, turn, field) for number, turn in enumerate(take(record, field, list))] or [None]
    if last is None or last.role != "assistant":
        raise ProblemError(f"{field}: must end with the assistant's answer")
    if last.pictures or any(turn.pictures for turn in turns if turn.role != "user"):
        raise ProblemError(f"{field}: a picture must stand in the user's messages")
    return turns, said(last.text, field)


def _addresses(record: dict, turns: Sequence[chat.Turn], field: str) -> list[str]:
    """The pictures of a side: those in its turns, or those named beside them."""
    inside = [name for turn in turns for name in turn.pictures]
    beside = chat.row_pictures(record, (field,))
    if inside and beside and inside != beside:
        raise ProblemError(f"{field}: are not the pictures in the messages")
    return inside or beside


def _rejected(record: dict, turns: Sequence[chat.Turn], images: list[str]) -> tuple[list[str], list[str]]:
    """(rejected answers, pictures of the rejected side where they are others); both may be empty."""
    answers, inside = [], ()
    responses = record.get("rejected_response")
    if responses is not None:
        responses = responses if isinstance(responses, list) else [responses]
        several = len(responses) > 1
        places = [f"rejected_response[{number}]" if several else "rejected_response" for number, _ in enumerate(responses)]
        answers = [said(text, place) for text, place in zip(responses, places)]
    if record.get("rejected_messages") is not None:
        if answers:
            raise ProblemError("rejected_messages: stand beside rejected_response; only one can be meant")
        inside, answer = _conversation(record, "rejected_messages")
        if [(turn.role, turn.text) for turn in inside] != [(turn.role, turn.text) for turn in turns]:
            raise ProblemError("rejected_messages: differ from messages before the last answer; the prompt must be the same")
        answers = [answer]
    other = _addresses(record, inside, "rejected_images")
    return answers, [] if other == images else other


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.preference.swift", "a JSONL file, a folder of them, or a hub id")
    parser.add_argument("--images", type=Path, help="folder that picture paths start from (default: beside the rows)")
    parser.add_argument("--source", help="the source's name (default: the file's name)")
    parser.add_argument("--license", required=True, help="the data's licence")
    run(parser, argv, drafts, lambda args: args.source or Path(args.data).stem)


if __name__ == "__main__":
    main()
