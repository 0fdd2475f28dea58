"""RLAIF-V (Yu et al., 2024; arXiv 2405.17220): 83,132 pairs whose answers were ranked claim by claim by open models.

    python -m data_prep.sources.preference.rlaif_v --data openbmb/RLAIF-V-Dataset --out data/rlaif_v [--limit N]

--data is a hub id or a folder with its parquet files. Two layouts are told apart by their columns:

    openbmb/RLAIF-V-Dataset             image, question, chosen, rejected; and ds_name, origin_dataset, origin_split, idx,
                                        image_path, which are kept in meta where they are there
    HuggingFaceH4/rlaif-v_formatted,    images, and prompt, chosen, rejected as chat messages; --split train or test
    trl-lib/rlaif-v

`idx` repeats, so a pair's id ends with a hash of what it says and shows. CC-BY-NC-4.0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.images import ProblemError
from data_prep.read import BadRows
from data_prep.sources import hub
from data_prep.sources.chat import IMAGE_TOKEN
from data_prep.sources.common import made_of, take
from data_prep.sources.preference.common import Draft, Shown, Source, arguments, prompt_of, run, said
from data_prep.sources.preference.rows import TableRow, listed_pictures, parsed, table, table_rows

SOURCE, LICENSE = "rlaif_v", "CC-BY-NC-4.0"
FLAT = ("image", "question", "chosen", "rejected")
FORMATTED = ("images", "prompt", "chosen", "rejected")
ORIGIN = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path")


def drafts(args, source: Source, bad: BadRows) -> Iterator[Draft]:
    data = table(args.data, args.split, args.revision)
    formatted = "prompt" in data.column_names
    hub.check_columns(data, args.data, *(FORMATTED if formatted else FLAT))

    def build(record: dict, row: TableRow) -> list[Draft]:
        return (_formatted if formatted else flat)(source, data, record, row)

    return made_of(table_rows(data, args.data), build, bad)


def flat(source: Source, data, record: dict, row: TableRow, *, answers: dict | None = None, prior: str | None = None,
         meta: dict | None = None) -> list[Draft]:
    """The draft of a row with one picture. answers: what holds question, chosen and rejected (default: the row)."""
    answers, where = (record, "") if answers is None else (answers, "text.")
    if not isinstance(answers.get("question"), str):
        raise ProblemError(f"{where}question: must be text, not {answers.get('question')!r:.60}")
    return source.draft(
        row,
        prompt_of([("user", answers["question"])], 1, f"{where}question"),
        said(answers.get("chosen"), f"{where}chosen"),
        rejected=said(answers.get("rejected"), f"{where}rejected"),
        prior=prior,
        images=Shown("image", (hub.picture(data, row.number, "image"),)),
        label=record.get("idx"),
        meta={name: parsed(record.get(name)) if name == "origin_split" else record.get(name) for name in ORIGIN} | (meta or {}),
    )


def _formatted(source: Source, data, record: dict, row: TableRow) -> list[Draft]:
    turns, shown = [], 0
    for number, message in enumerate(take(record, "prompt", list)):
        role, text, pictures = _message(message, f"prompt[{number}]")
        turns.append((role, text))
        shown += pictures
    shown = shown or len(data[row.number]["images"] or [])  # a prompt without image parts shows all before its words
    return source.draft(
        row,
        prompt_of(turns, shown, "prompt"),
        _answer(record, "chosen"),
        rejected=_answer(record, "rejected"),
        images=listed_pictures(data, row.number, "images", shown),
        label=record.get("idx"),
        meta={name: record.get(name) for name in ORIGIN},
    )


def _message(message: Any, place: str) -> tuple[str, str, int]:
    """(role, text with `<image>` where its image parts stand, number of those) of a chat message."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise ProblemError(f"{place}: must be a message of the system, the user or the assistant, not {message!r:.60}")
    content = message.get("content")
    if not isinstance(content, list | str):
        raise ProblemError(f"{place}.content: must be text or a list of parts, not {content!r:.60}")
    texts = []
    for number, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise ProblemError(f"{place}.content[{number}]: must be an image part or a text part, not {part!r:.60}")
        texts.append(IMAGE_TOKEN if kind == "image" else part["text"])
    text = "".join(texts)
    return message["role"], text, text.count(IMAGE_TOKEN)


def _answer(record: dict, name: str) -> str:
    messages = take(record, name, list)
    if len(messages) != 1:
        raise ProblemError(f"{name}: must be one message, not {len(messages)}")
    role, text, pictures = _message(messages[0], f"{name}[0]")
    if role != "assistant" or pictures:
        raise ProblemError(f"{name}[0]: must be the assistant's words, not {messages[0]!r:.60}")
    return said(text, name)


def main(argv: Sequence[str] | None = None) -> None:
    data = "openbmb/RLAIF-V-Dataset, HuggingFaceH4/rlaif-v_formatted, trl-lib/rlaif-v, or a local copy"
    run(arguments(__doc__, "data_prep.sources.preference.rlaif_v", data), argv, drafts, SOURCE, LICENSE)


if __name__ == "__main__":
    main()
