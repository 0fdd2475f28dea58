"""RLHF-V (Yu et al., 2023; arXiv 2312.00849): 5,733 answers, each corrected by a person where the picture shows it wrong.

    python -m data_prep.sources.preference.rlhf_v --data openbmb/RLHF-V-Dataset --out data/rlhf_v [--limit N]

--data is the hub id or a folder with its parquet file. Columns: image, text (a JSON object written as text: question, chosen,
rejected), and ds_name, origin_dataset, origin_split, idx, image_path, which are kept in meta. CC-BY-NC-4.0.
"""

from collections.abc import Iterator, Sequence

from data_prep.images import ProblemError
from data_prep.read import BadRows
from data_prep.sources import hub
from data_prep.sources.common import made_of
from data_prep.sources.preference.common import Draft, Source, arguments, run
from data_prep.sources.preference.rlaif_v import flat
from data_prep.sources.preference.rows import TableRow, parsed, table, table_rows

SOURCE, LICENSE = "rlhf_v", "CC-BY-NC-4.0"


def drafts(args, source: Source, bad: BadRows) -> Iterator[Draft]:
    data = table(args.data, args.split, args.revision)
    hub.check_columns(data, args.data, "image", "text")

    def build(record: dict, row: TableRow) -> list[Draft]:
        answers = parsed(record["text"])
        if not isinstance(answers, dict):
            raise ProblemError(f"text: must be a JSON object with question, chosen and rejected, not {record['text']!r:.60}")
        for name in ("question", "chosen", "rejected"):
            if name not in answers:
                raise ProblemError(f"text.{name}: missing field")
        return flat(source, data, record, row, answers=answers)

    return made_of(table_rows(data, args.data), build, bad)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "data_prep.sources.preference.rlhf_v", "openbmb/RLHF-V-Dataset or a local copy of it")
    run(parser, argv, drafts, SOURCE, LICENSE)


if __name__ == "__main__":
    main()
