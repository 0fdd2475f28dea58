"""VLFeedback (Li et al., 2023; arXiv 2312.10665): 80,258 prompts with four models' answers each, rated by GPT-4V.

    python -m data_prep.sources.preference.vlfeedback --data MMInstruction/VLFeedback --images DIR --out data/vlfeedback
        [--all-pairs] [--revision refs/convert/parquet]

--data is a hub id, a folder with its parquet files, or the repository's vlfeedback_80k.jsonl; DIR is where its
merged_images.zip was unpacked. Columns: id, prompt, completions, and img_path, of which the last part is looked for in DIR
where the whole path is not there. The JSONL has no img_path: there a picture is called <id>.jpg. `completions` may be a list of
{annotations, model, response}, or an object of three lists; older and newer tables of the hub differ in this.

An answer's score is the mean of its three ratings (Helpfulness, Ethical Considerations, Visual Faithfulness), as in the
authors' training. Answers without all three (N/A) and empty answers are dropped. One pair is made for each prompt, the best
answer against the worst (of several the first), or with --all-pairs one for any two whose scores differ; equal scores are left
out. `id` repeats, so a pair's id ends with a hash. The authors name no licence; --license says what you know.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_prep.images import ProblemError
from data_prep.read import BadRows
from data_prep.sources.common import Row, made_of, take
from data_prep.sources.preference.common import UNNAMED, Draft, Shown, Source, arguments, prompt_of, run, said
from data_prep.sources.preference.rows import picture_folder, pictures_at, source_rows

SOURCE = "vlfeedback"
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


class Answer(NamedTuple):
    score: float
    text: str
    model: str | None


def drafts(args, source: Source, bad: BadRows) -> Iterator[Draft]:
    root = picture_folder(args)

    def build(record: dict, row: Row) -> list[Draft]:
        prompt = prompt_of([("user", take(record, "prompt", str))], 1, "prompt")
        images = _picture(record, root)
        made = []
        for better, worse in _pairs(_answers(record, source), source, args.all_pairs):
            meta = {"chosen_score": round(better.score, 4), "rejected_score": round(worse.score, 4),
                    "chosen_model": better.model, "rejected_model": worse.model}
            label = record.get("id")
            made += source.draft(row, prompt, better.text, rejected=worse.text, images=images, label=label, meta=meta)
        return made

    return made_of(source_rows(args), build, bad)


def _pairs(answers: list[Answer], source: Source, every: bool) -> Iterator[tuple[Answer, Answer]]:
    """(better, worse), where one is better."""
    if len(answers) < 2:
        source.left_out["prompts with fewer than two rated answers"] += 1
        return
    scores = [answer.score for answer in answers]
    extremes = (answers[scores.index(max(scores))], answers[scores.index(min(scores))])
    for one, other in combinations(answers, 2) if every else [extremes]:
        if one.score == other.score:
            source.left_out["ties"] += 1
        else:
            yield (one, other) if one.score > other.score else (other, one)


def _answers(record: dict, source: Source) -> list[Answer]:
    """The answers that have a text and a score, in the row's order."""
    found = []
    for number, completion in enumerate(_completions(record)):
        place = f"completions[{number}]"
        text, score = said(completion.get("response"), f"{place}.response"), _score(completion.get("annotations"), place)
        if not text:
            source.dropped["empty answers"] += 1
        elif score is None:
            source.dropped["answers without three ratings"] += 1
        else:
            found.append(Answer(score, text, completion.get("model")))
    return found


def _completions(record: dict) -> list[dict]:
    value = take(record, "completions", list, dict)
    if isinstance(value, dict):
        names = ("annotations", "response", "model")
        columns = {name: take(value, name, list) for name in names if value.get(name) is not None}
        for name in ("annotations", "response"):
            if name not in columns:
                raise ProblemError(f"completions.{name}: missing field")
        if len({len(column) for column in columns.values()}) > 1:
            lengths = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
            raise ProblemError(f"completions: must hold as many of each, holds {lengths}")
        value = [dict(zip(columns, row)) for row in zip(*columns.values())]
    for number, completion in enumerate(value):
        if not isinstance(completion, dict):
            raise ProblemError(f"completions[{number}]: must be an object, not {completion!r:.60}")
        for name in ("annotations", "response"):
            if name not in completion:
                raise ProblemError(f"completions[{number}].{name}: missing field")
    return value


def _score(annotations: Any, place: str) -> float | None:
    """The mean rating; None when one of the three is missing or no number."""
    if not isinstance(annotations, dict):
        raise ProblemError(f"{place}.annotations: must be an object, not {annotations!r:.60}")
    ratings = []
    for aspect in ASPECTS:
        rating = annotations.get(aspect)
        try:
            ratings.append(float(rating.get("Rating") if isinstance(rating, dict) else rating))
        except (TypeError, ValueError):  # null, "N/A"
            return None
    return sum(ratings) / len(ratings) if all(map(math.isfinite, ratings)) else None


def _picture(record: dict, root: Path | None) -> Shown:
    if record.get("img_path") is None:
        return pictures_at("img_path", [f"{take(record, 'id', str, int)}.jpg"], root)
    name = take(record, "img_path", str)
    path = PurePosixPath(name)
    there = root is not None and not path.is_absolute() and (root / name).is_file()
    return pictures_at("img_path", [name if there else path.name], root)


def main(argv: Sequence[str] | None = None) -> None:
    data = "MMInstruction/VLFeedback, a local copy of it, or vlfeedback_80k.jsonl"
    parser = arguments(__doc__, "data_prep.sources.preference.vlfeedback", data)
    parser.add_argument("--images", type=Path, help="folder of the pictures (default: beside the rows)")
    parser.add_argument("--all-pairs", action="store_true", help="pair any two answers whose scores differ")
    parser.add_argument("--license", default=UNNAMED, help="the licence (default: %(default)s)")
    run(parser, argv, drafts, SOURCE)


if __name__ == "__main__":
    main()
