"""What the adapters of preference data share: drafts in, pairs and their pictures out.

An adapter turns rows (see rows.py) into drafts. `run` takes them from there: limit, pictures placed below OUT/images under
hashes of their bytes, pairs that share a picture brought into one group, OUT/train.jsonl. What says nothing (the same answer on
both sides, an empty one, a tie) is left out and counted; a broken row is an error, or with --skip-bad a line of
OUT/rows.bad.jsonl. Running it again gives the same bytes.
"""

import argparse
import heapq
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_prep.images import MAX_PIXELS, ProblemError
from data_prep.pair import Pair, to_row, write_pairs
from data_prep.provenance import non_commercial
from data_prep.read import BadRows
from data_prep.sources.chat import IMAGE_TOKEN
from data_prep.sources.common import Picture, Placer, Row, hashed, positive
from data_prep.sources.groups import tied

UNNAMED = "unknown"  # the licence of data whose authors name none


class Shown(NamedTuple):
    """Pictures of a row and the field that they come from, for messages."""

    field: str = ""
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A pair whose pictures are not yet beside it. Its id, group and paths are stand-ins until they are."""

    pair: Pair
    label: str  # what the data set calls the row; rows may share it
    images: Shown
    other: Shown  # the rejected side's own pictures
    row: Row


def prompt_of(turns: Sequence[tuple[str, str]], count: int, field: str) -> tuple[dict, ...]:
    """Chat messages of (role, text) turns that show `count` pictures.

    A picture stands in the place of its `<image>` in a user's text, and of the line breaks on either side of it. Where no text
    has one, all pictures stand before the first user's text.

    Raises ProblemError "<field>: ..." when a text is empty, or `<image>` stands there another number of times.
    """
    tokens = sum(text.count(IMAGE_TOKEN) for _, text in turns)
    if tokens not in (0, count):
        times, pictures = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((tokens, "time"), (count, "picture")))
        raise ProblemError(f"{field}: {IMAGE_TOKEN} stands {times}, the row has {pictures}")
    waiting = 0 if tokens else count
    messages = []
    for role, text in turns:
        if role != "user" and IMAGE_TOKEN in text:
            raise ProblemError(f"{field}: {IMAGE_TOKEN} stands in the {role}'s text; a pair shows pictures with the user's")
        content = _parts(text)
        if role == "user":
            content, waiting = [*({"type": "image"} for _ in range(waiting)), *content], 0
        if not any(part["type"] == "text" for part in content):
            raise ProblemError(f"{field}: is empty")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _parts(text: str) -> list[dict]:
    content: list[dict] = []
    for number, piece in enumerate(text.strip().split(IMAGE_TOKEN)):
        if number:
            content.append({"type": "image"})
        if piece.strip():
            first = all(part["type"] == "image" for part in content)
            content.append({"type": "text", "text": piece.strip("\n").lstrip() if first else piece.strip("\n")})
    return content


def said(value: Any, place: str) -> str:
    """An answer's text without white space around it; null is an empty one. ProblemError "<place>: ..." for anything else."""
    if value is not None and not isinstance(value, str):
        raise ProblemError(f"{place}: must be text, not {value!r:.60}")
    return (value or "").strip()


class Source:
    """One data set: makes drafts and pairs of its rows, and counts what it leaves out."""

    def __init__(self, name: str, license: str):
        self.name, self.license = name, license
        self.left_out: Counter[str] = Counter()  # pairs, by reason
        self.dropped: Counter[str] = Counter()  # parts of rows whose pair is kept

    def draft(self, row: Row, prompt: tuple[dict, ...], chosen: str, *, rejected: str | None = None, prior: str | None = None,
              images: Shown = Shown(), other: Shown = Shown(), label: Any = None, meta: dict | None = None) -> list[Draft]:
        """One draft, or none when the pair is left out.

        chosen, rejected, prior: from `said`; None: there is no such side. A side that is empty or equal to `chosen` is dropped,
            and the pair is left out when no other side remains.
        other: the pictures for which `chosen` is wrong.
        meta: entries that are None are left away.

        Raises ProblemError "<field>: ..." when the row would not be a pair.
        """
        given = {"rejected": rejected, "rejected_prior": prior}
        rejected, prior = (None if side in ("", chosen) else side for side in given.values())
        if not chosen or (rejected is None and prior is None and not other.pictures):
            empty = not chosen or given["rejected"] == ""
            self.left_out["empty answers" if empty else "identical answers"] += 1
            return []
        for name, kept in (("rejected", rejected), ("rejected_prior", prior)):
            if given[name] is not None and kept is None:
                self.dropped[f"{name} that is empty or the same as chosen"] += 1
        label = "" if label is None else str(label).strip()
        pair = Pair(
            id=f"{self.name}-{label}",
            group=self.name,
            source=self.name,
            license=self.license,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            rejected_prior=prior,
            images=tuple(f"{images.field} {number}" for number, _ in enumerate(images.pictures)),
            rejected_images=tuple(f"{other.field} {number}" for number, _ in enumerate(other.pictures)),
            meta={name: value for name, value in (meta or {}).items() if value is not None},
        )
        to_row(pair)
        return [Draft(pair, label, images, other, row)]

    def place(self, draft: Draft, placer: Placer) -> Pair | None:
        """The pair, its pictures in their places; None when it is left out. Its group is its first picture, or itself."""
        paths = placer.put({shown.field: shown.pictures for shown in (draft.images, draft.other) if shown.pictures})
        images, other = (paths.get(shown.field, ()) for shown in (draft.images, draft.other))
        pair = draft.pair
        if other and other == images:
            if pair.rejected is None and pair.rejected_prior is None:
                self.left_out["identical pictures"] += 1
                return None
            other = ()
        told = [pair.prompt, pair.chosen, pair.rejected, pair.rejected_prior, images, other]
        key = hashed(json.dumps(told, ensure_ascii=False, sort_keys=True))
        ident = "-".join(filter(None, (self.name, draft.label, key)))
        return replace(pair, id=ident, group=images[0] if images else ident, images=images, rejected_images=other)

    def counts(self) -> list[str]:
        """What was left out, in one line or two; empty: nothing."""
        found = (("pairs left out", self.left_out), ("dropped", self.dropped))
        return [
            f"{self.name}: {told}: " + ", ".join(f"{why} ({count})" for why, count in sorted(counts.items()))
            for told, counts in found if counts
        ]  # fmt: skip

    def report(self) -> list[str]:
        """What was left out, and what the licence asks for."""
        lines = self.counts()
        if non_commercial(self.license):
            lines.append(f"{self.name}: {self.license}: non-commercial use only")
        if self.license == UNNAMED:
            lines.append(f"{self.name}: the authors name no licence; ask them what the data may be used for")
        return lines


def arguments(doc: str, module: str, data: str) -> argparse.ArgumentParser:
    """The options that every adapter has; doc: the module's docstring, data: what --data names."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help=data)
    parser.add_argument("--split", help="the split to read, of a hub id or a folder of parquet (default: train)")
    parser.add_argument("--revision", help="the hub revision, for a run that can be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and images/")
    parser.add_argument("--limit", type=positive, help="at most this many pairs, drawn by a hash of their words")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, write them to OUT/rows.bad.jsonl")
    parser.add_argument(
        "--max-pixels", type=positive, default=MAX_PIXELS, help="largest picture (default: %(default)s)"
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None, drafts: Callable[..., Iterable[Draft]],
        name: str | Callable[..., str], license: str | None = None) -> None:
    """Parse the command line and write what `drafts(args, source, bad)` gives. One sentence on stderr when it fails.

    name: the source's, or what gives it for the parsed arguments; license: None for that of --license.
    """
    args = parser.parse_args(argv)
    source = Source(name if isinstance(name, str) else name(args), license or args.license)
    try:
        bad = BadRows(args.data, args.skip_bad, args.out / "rows.bad.jsonl")
        pairs = convert(args.out, drafts(args, source, bad), source, bad, args.limit, args.max_pixels)
        count = write_pairs(args.out / "train.jsonl", pairs)
    except (ProblemError, OSError) as error:
        raise SystemExit(str(error)) from error
    print("\n".join([f"{args.out}: {count} pairs in train.jsonl", *source.report()]))


def convert(out: Path, drafts: Iterable[Draft], source: Source, bad: BadRows, limit: int | None, max_pixels: int) -> list[Pair]:
    """The pairs of the drafts, in their order, their pictures placed below `out`. ProblemError when there are none."""
    pairs: dict[str, Pair] = {}
    placer = Placer(out, max_pixels)
    broken: Row | None = None  # whose other drafts show the same pictures
    for draft in drafts if limit is None else _drawn(drafts, limit, str(out)):
        if draft.row is broken:
            continue
        try:
            pair = source.place(draft, placer)
        except ProblemError as error:
            broken = draft.row
            bad.keep(broken.file, broken.where, error, broken.raw)
            continue
        if pair is not None and pairs.setdefault(pair.id, pair) is not pair:
            source.left_out["repeated"] += 1
    try:
        bad.close(len(pairs))
    except ProblemError as error:
        raise ProblemError("; ".join([str(error), *source.counts()])) from error
    groups = tied((pair.group, *pair.images, *pair.rejected_images) for pair in pairs.values())
    return [replace(pair, group=group) for pair, group in zip(pairs.values(), groups, strict=True)]


def _drawn(drafts: Iterable[Draft], limit: int, name: str) -> Iterable[Draft]:
    """`limit` of the drafts, in their order: those whose words' hash comes first, which spreads the draw over the whole set."""

    def key(numbered: tuple[int, Draft]) -> tuple[str, int]:
        number, draft = numbered
        return hashed("limit", repr((draft.label, draft.pair.prompt, draft.pair.chosen, draft.pair.rejected))), number

    drawn = [draft for _, draft in sorted(heapq.nsmallest(limit, enumerate(drafts), key=key), key=lambda pair: pair[0])]
    return tqdm(drawn, unit="pair", desc=name, disable=None, file=sys.stderr)
