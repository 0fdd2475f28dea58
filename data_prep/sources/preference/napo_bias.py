"""RLAIF-V with biased answers (Zhang et al., 2025; arXiv 2503.17928): what the model says without the picture, or the question.

    python -m data_prep.sources.preference.napo_bias --data Starrrrrry/RLAIF-V-Bias-Dataset --out data/napo_bias [--limit N]

--data is the hub id or a folder with its parquet files. Columns are those of RLAIF-V, and

    question_only   the answer to the question without the picture: the pair's rejected_prior
    image_only      what is said of the picture without the question: kept in meta, no side of the pair

The card names Apache-2.0, but questions, pictures and both sides are RLAIF-V's, whose CC-BY-NC-4.0 is written into the pairs.
"""

from collections.abc import Iterator, Sequence

from data_prep.read import BadRows
from data_prep.sources import hub
from data_prep.sources.common import made_of
from data_prep.sources.preference.common import Draft, Source, arguments, run, said
from data_prep.sources.preference.rlaif_v import FLAT, flat
from data_prep.sources.preference.rows import TableRow, table, table_rows

SOURCE, LICENSE = "napo_bias", "CC-BY-NC-4.0"


def drafts(args, source: Source, bad: BadRows) -> Iterator[Draft]:
    data = table(args.data, args.split, args.revision)
    hub.check_columns(data, args.data, *FLAT, "question_only", "image_only")

    def build(record: dict, row: TableRow) -> list[Draft]:
        prior = said(record["question_only"], "question_only")
        meta = {"image_only": said(record["image_only"], "image_only") or None}
        return flat(source, data, record, row, prior=prior, meta=meta)

    return made_of(table_rows(data, args.data), build, bad)


def main(argv: Sequence[str] | None = None) -> None:
    data = "Starrrrrry/RLAIF-V-Bias-Dataset or a local copy of it"
    run(arguments(__doc__, "data_prep.sources.preference.napo_bias", data), argv, drafts, SOURCE, LICENSE)


if __name__ == "__main__":
    main()
