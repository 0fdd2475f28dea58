"""Leave out training problems that occur in an evaluation file: by picture, or by what is asked.

    python -m data_prep.overlap data/pgps9k/train.jsonl --against data/mathverse/test.jsonl [--out data/pgps9k/train.clean.jsonl]

**Pictures.** Equal pixels, or nearly equal ones: re-encoded, resized, or with a plain border added on all sides. A difference
hash (N. Krawetz) of 64 bits finds candidates: re-encoding rarely moves it by more than 4 bits. A DCT hash moves further,
because flat ground leaves many of its coefficients near their median. By itself the hash is no evidence: on small drawings it
takes two of five for one of 200 others. So a candidate is confirmed on pixels: colours of a 16x16 grid, then brightness at up
to 192x192 and colour at 32x32, with one pixel of play, since resizing moves edges. For borders, pictures are also compared
without the plain ground around them, where it is about equally wide. What stays hidden are crops, mirrored pictures, changed
colours, a strip on one side only (such as a question drawn below), and a border together with strong JPEG. What is taken for
equal are drawings that differ in a dozen pixels at 192x192, or in colours as close as yellow and orange.

**Questions.** Data sets ask from templates ("Which shape is at B?" a thousand times), so an equal question says little. It counts

* with equal options, answer and facts: the same item;
* with equal options and answer, when question and options have at least 8 words and stand in one group of either file only;
* alone, when it has at least 8 words, the share of word triples in common (Jaccard) is at least 0.8, and no other group of its
  own file asks nearly the same. A group, not a problem: NLVR says one sentence about four pictures.

Two problems of the same source whose facts differ are about different things, however they are worded: then neither of the last
two rules holds. Questions that a problem publishes for a view count like its own. Text is compared in lower case without
punctuation; words are what spaces separate.
"""

import argparse
import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.sparse import csr_array
from tqdm import tqdm

from data_prep import images
from data_prep.images import ProblemError
from data_prep.problem import every_picture
from data_prep.read import MARKER, Problem, check_beside, read_problems, write_problems

DISTANCE, QUESTION = 4, 0.8
MIN_WORDS = 8           # of a question that says something by itself
GRID = 16               # cells a side of the colours that are compared first
FINE, CHROMA = 192, 32  # pixels a side, at most, of the brightness that is compared last, and of the colour
# Largest difference (of 255) that re-encoding and resizing make, measured on drawings of 56 to 512 pixels, where they make most.
GRID_LEVELS, LUMA_LEVELS, CHROMA_LEVELS = 64, 64, 24
ASPECT = 1.1            # of two copies, at most this factor apart
GROUND_LEVELS = 40      # that a pixel of plain ground may be off: above JPEG's ripples around edges
BORDER = 0.15           # of a side: how far the edges of what stands on plain ground may lie apart
PAIRS = 4_000_000       # compared at a time


@dataclass(frozen=True)
class Overlap:
    """A training problem and where it occurs."""

    id: str
    file: str       # of the other problem
    other: str      # its id
    reason: str     # one of REASONS


REASONS = ("same picture", "near picture", "same item", "near question")


class Form(NamedTuple):
    """A picture as it is compared."""

    code: np.uint64         # difference hash
    grid: np.ndarray        # (768,) uint8: mean colours of 16x16 cells
    box: np.ndarray         # (4,) left, top, right, bottom of what is compared, as parts of the picture's sides
    aspect: float           # width / height of what is compared


class Seen(NamedTuple):
    file: Path
    pixels: bytes           # hash of size and pixels
    forms: tuple[Form, Form]        # whole, and without plain ground around it
    max_pixels: int


def dhash(picture: Image.Image) -> np.uint64:
    """Difference hash, 64 bits: is a cell darker than the one right of it, by more than noise on flat ground? 8 rows of 8."""
    gray = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return np.packbits(gray[:, 1:] > gray[:, :-1] + 2).view(np.uint64)[0]


def content_box(picture: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what stands on plain ground, in pixels; all of it where the corners differ or little is left.

    Ground within ground counts as ground, so that a border that was added on all sides leaves the box on the same content.
    """
    pixels = np.asarray(picture, dtype=np.int16)
    left, top, right, bottom = 0, 0, picture.width, picture.height
    while True:
        inside = pixels[top:bottom, left:right]
        corners = inside[[0, 0, -1, -1], [0, -1, 0, -1]]
        if np.ptp(corners, axis=0).max() > GROUND_LEVELS:
            break
        content = np.abs(inside - corners.mean(axis=0)).max(axis=2) > GROUND_LEVELS
        rows, columns = np.flatnonzero(content.any(axis=1)), np.flatnonzero(content.any(axis=0))
        if not len(rows) or min(np.ptp(rows), np.ptp(columns)) < 8 or (np.ptp(rows) + 1, np.ptp(columns) + 1) == content.shape:
            break
        left, top, right, bottom = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
    return int(left), int(top), int(right), int(bottom)


def _form(picture: Image.Image, box: tuple[int, int, int, int]) -> Form:
    part = picture.crop(box)
    grid = np.asarray(part.resize((GRID, GRID), Image.Resampling.BOX)).ravel()
    return Form(dhash(part), grid, np.array(box) / (picture.size * 2), part.width / part.height)


def look(file: Path, max_pixels: int) -> Seen:
    """A picture's hashes. ProblemError when it cannot be read."""
    picture = images.load(file, max_pixels)
    whole = (0, 0, *picture.size)
    return Seen(file, hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest(),
                (_form(picture, whole), _form(picture, content_box(picture))), max_pixels)


@lru_cache(maxsize=1024)
def _reduced(file: Path, max_pixels: int, inner: bool) -> Image.Image:
    """A picture, or what stands on its plain ground, with sides of at most FINE pixels."""
    picture = images.load(file, max_pixels)
    part = picture.crop(content_box(picture)) if inner else picture
    return part.resize((min(part.width, FINE), min(part.height, FINE)), Image.Resampling.BILINEAR)


def _equal_pixels(one: Seen, other: Seen, inner: bool) -> bool:
    a, b = (_reduced(seen.file, seen.max_pixels, inner) for seen in (one, other))
    # Brightness at the smaller one's size, because enlarging invents edges; colour coarser, because JPEG keeps it so.
    luma = (min(a.width, b.width), min(a.height, b.height))
    for size, mode, levels in ((luma, "L", LUMA_LEVELS), ((CHROMA, CHROMA), "YCbCr", CHROMA_LEVELS)):
        x, y = (np.asarray(part.resize(size, Image.Resampling.BILINEAR).convert(mode), dtype=np.int16).reshape(*size[::-1], -1)
                for part in (a, b))
        if mode == "YCbCr":
            x, y = x[:, :, 1:], y[:, :, 1:]
        if max(_outside(x, y), _outside(y, x)) > levels:
            return False
    return True


def _outside(x: np.ndarray, y: np.ndarray) -> int:
    """How far a value of x lies outside the range of y's 3x3 pixels there."""
    return int(max((x - maximum_filter(y, (3, 3, 1))).max(), (minimum_filter(y, (3, 3, 1)) - x).max()))


def near_pictures(mine: Sequence[Seen], others: Sequence[Seen], distance: int) -> Iterator[tuple[int, int]]:
    """(place in mine, place in others) of nearly equal pictures, at most one pair for each of mine."""
    found: set[int] = set()
    for inner in (False, True):
        a, b = ([seen.forms[inner] for seen in side] for side in (mine, others))
        if not a or not b:
            return
        (codes, grids, boxes, aspects), (codes_b, grids_b, boxes_b, aspects_b) = (
            [np.array([form[i] for form in side]) for i in range(4)] for side in (a, b))
        for start in range(0, len(a), step := max(1, PAIRS // len(b))):
            near = np.bitwise_count(codes[start:start + step, None] ^ codes_b[None]) <= distance
            for first in range(0, len(pairs := np.argwhere(near)), 100_000):
                i, j = (pairs[first:first + 100_000] + (start, 0)).T
                alike = np.abs(np.log(aspects[i] / aspects_b[j])) <= np.log(ASPECT)
                alike &= np.abs(boxes[i] - boxes_b[j]).max(axis=1) <= BORDER
                i, j = i[alike], j[alike]
                alike = np.abs(grids[i].astype(np.int16) - grids_b[j]).max(axis=1, initial=0) <= GRID_LEVELS
                for one, other in zip(i[alike].tolist(), j[alike].tolist()):
                    if one not in found and _equal_pixels(mine[one], others[other], inner):
                        found.add(one)
                        yield one, other


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case: no punctuation, no markers of pictures; + and = are words."""
    tokens = re.findall(r"\w+|[^\w\s]", MARKER.sub(" ", unicodedata.normalize("NFKC", text)).casefold())
    return tuple(token for token in tokens if not unicodedata.category(token[0]).startswith("P"))


def shingles(said: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {said[start:start + 3] for start in range(len(said) - 2)}


class Asked(NamedTuple):
    question: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]    # sorted: the order is no difference
    answer: tuple[str, ...]
    facts: tuple[str, ...] | None

    @classmethod
    def by(cls, problem: Problem) -> "list[Asked]":
        """One for each way in which the problem asks."""
        options = tuple(sorted(words(option) for option in problem.options or ()))
        facts = None if problem.facts is None else words(problem.facts)
        return [cls(question, options, words(problem.answer), facts) for question in questions_of(problem)]


def questions_of(problem: Problem) -> list[tuple[str, ...]]:
    """The words of the problem's question and of those that it publishes for a view (meta.published), each once."""
    published = (entry.get("question") for entry in problem.meta.get("published", {}).values())
    return list(dict.fromkeys(words(question) for question in (problem.question, *published) if question is not None))


def _group(problem: Problem) -> tuple[str, str]:
    return problem.source, problem.group


def _in_one_group(keys: Iterable[tuple[Hashable, tuple[str, str]]]) -> set[Hashable]:
    """The keys that stand in one group only."""
    return {key for key, times in Counter(key for key, _ in set(keys)).items() if times == 1}


def _contradict(mine: Problem, other: Problem) -> bool:
    return mine.source == other.source and None not in (mine.facts, other.facts) and words(mine.facts) != words(other.facts)


def same_items(mine: Sequence[Problem], others: Sequence[Problem]) -> Iterator[tuple[int, int]]:
    """(place in mine, place in others) of problems that ask the same of the same; see the module's docstring."""
    asked, asked_b = ([(place, one) for place, problem in enumerate(side) for one in Asked.by(problem)]
                      for side in (mine, others))
    full = {one: place for place, one in reversed(asked_b) if one.facts is not None}
    distinct = set.intersection(*(_in_one_group((one[:3], _group(problems[place])) for place, one in side)
                                  for side, problems in ((asked, mine), (asked_b, others))))
    places: dict[tuple, list[int]] = {}
    for place, one in asked_b:
        places.setdefault(one[:3], []).append(place)
    for place, one in asked:
        if one in full:
            yield place, full[one]
        elif one[:3] in distinct and len(one.question) + sum(map(len, one.options)) >= MIN_WORDS:
            if (other := next((p for p in places[one[:3]] if not _contradict(mine[place], others[p])), None)) is not None:
                yield place, other


class Texts:
    """The different questions of some problems that are long enough to say something, with who asks them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.places: dict[tuple[str, ...], list[int]] = {}
        for place, problem in enumerate(problems):
            for said in questions_of(problem):
                if len(said) >= MIN_WORDS:
                    self.places.setdefault(said, []).append(place)
        self.said = list(self.places)
        self.groups = [{_group(problems[place]) for place in places} for places in self.places.values()]

    def matrix(self, vocabulary: dict[tuple[str, ...], int]) -> csr_array:
        """(texts, word triples): 1 where a text holds a triple. New triples enter the vocabulary."""
        columns = [[vocabulary.setdefault(one, len(vocabulary)) for one in shingles(said)] for said in self.said]
        ends = np.cumsum([0, *map(len, columns)])
        flat = np.fromiter((column for row in columns for column in row), dtype=np.int64, count=ends[-1])
        return csr_array((np.ones(len(flat), dtype=np.int32), flat, ends), shape=(len(columns), len(vocabulary)))


def _near(a: csr_array, b: csr_array, least: float) -> Iterator[tuple[int, int]]:
    """(row of a, row of b) with a Jaccard index of at least `least`."""
    sizes, sizes_b = a.sum(axis=1), b.sum(axis=1)
    columns = b.T.tocsr()
    for start in range(0, a.shape[0], step := max(1, PAIRS // max(1, b.shape[0]))):
        shared = (a[start:start + step] @ columns).tocoo()
        i, j = shared.row + start, shared.col
        alike = shared.data >= least * (sizes[i] + sizes_b[j] - shared.data) - 1e-9
        yield from zip(i[alike].tolist(), j[alike].tolist())


def near_questions(mine: Sequence[Problem], others: Sequence[Problem], least: float) -> Iterator[tuple[int, int]]:
    """(place in mine, place in others) of problems with nearly the same question, which no other group of either file asks."""
    texts, texts_b = Texts(mine), Texts(others)
    if not texts.said or not texts_b.said:
        return
    vocabulary: dict[tuple[str, ...], int] = {}
    a, b = texts.matrix(vocabulary), texts_b.matrix(vocabulary)
    a.resize((a.shape[0], b.shape[1]))      # the second one's new triples are columns of both
    pairs = list(_near(a, b, least))
    own = [_unlike_others(side, matrix, sorted({pair[which] for pair in pairs}), least)
           for which, (side, matrix) in enumerate(((texts, a), (texts_b, b)))]
    for i, j in pairs:
        if i in own[0] and j in own[1]:
            for place in texts.places[texts.said[i]]:
                for other in texts_b.places[texts_b.said[j]]:
                    if not _contradict(mine[place], others[other]):
                        yield place, other
                        break


def _unlike_others(texts: Texts, matrix: csr_array, rows: list[int], least: float) -> set[int]:
    """Those of the rows whose question, and nearly the same ones, stand in one group only."""
    if not rows:
        return set()
    groups = {row: set(texts.groups[row]) for row in rows}
    for i, j in _near(matrix[rows], matrix, least):
        groups[rows[i]] |= texts.groups[j]
    return {row for row in rows if len(groups[row]) == 1}


def _look_at(problems: Sequence[Problem], desc: str) -> tuple[list[Seen], list[list[int]]]:
    """The different pictures of some problems, and for each picture the places of the problems that show it."""
    shown: dict[Path, list[int]] = {}
    for place, problem in enumerate(problems):
        for name in every_picture(problem):
            shown.setdefault(problem.root / name, []).append(place)
    seen = []
    for file, places in tqdm(shown.items(), desc=desc, unit="picture", delay=2, disable=None, file=sys.stderr):
        problem = problems[places[0]]
        try:
            seen.append(look(images.picture_path(problem.root, file.relative_to(problem.root).as_posix()), problem.max_pixels))
        except ProblemError as error:
            raise ProblemError(f"{problem.id}: image: {error}") from error
    return seen, list(shown.values())


def without_overlap(problems: Sequence[Problem], against: Sequence[Sequence[Problem] | str | Path], *, distance: int = DISTANCE,
                    question: float = QUESTION) -> tuple[list[Problem], list[Overlap]]:
    """(problems that occur in none of `against`, one Overlap for each that does, in the order of the problems).

    Args:
        against: files of problems, or problems already read; such a list is called "against[<place>]".
        distance: of two pictures' hashes, in bits of 64, up to which they are compared closely. 0 to 64.
        question: share of word triples in common (Jaccard) from which questions are nearly the same. Above 0, up to 1.

    Raises:
        ProblemError: a file has a bad row, a picture cannot be read, or an argument is out of range.
    """
    if not 0 <= distance <= 64:
        raise ProblemError(f"distance must be from 0 to 64 bits, not {distance}")
    if not 0 < question <= 1:
        raise ProblemError(f"question must be above 0 and at most 1, not {question}")
    files = [(str(one), read_problems(one, verify="header")) if isinstance(one, str | Path) else (f"against[{place}]", one)
             for place, one in enumerate(against)]
    found: dict[int, Overlap] = {}
    seen, shown_by = _look_at(problems, "training pictures")
    for name, others in files:
        seen_b, shown_by_b = _look_at(others, f"pictures of {name}")
        pixels = {one.pixels: place for place, one in reversed(list(enumerate(seen_b)))}
        same = [(place, pixels[one.pixels]) for place, one in enumerate(seen) if one.pixels in pixels]
        rest = [place for place in range(len(seen)) if seen[place].pixels not in pixels]
        near = [(rest[i], j) for i, j in near_pictures([seen[place] for place in rest], seen_b, distance)]
        by_picture = [[(place, shown_by_b[j][0]) for i, j in pairs for place in shown_by[i]] for pairs in (same, near)]
        by_words = same_items(problems, others), near_questions(problems, others, question)
        for pairs, reason in zip((*by_picture, *by_words), REASONS):
            for place, other in pairs:
                found.setdefault(place, Overlap(problems[place].id, name, others[other].id, reason))
    return [problem for place, problem in enumerate(problems) if place not in found], [found[place] for place in sorted(found)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="TRAIN.jsonl")
    parser.add_argument("--against", type=Path, nargs="+", required=True, metavar="EVAL.jsonl",
                        help="what evaluation asks: data/<task>/test.jsonl of every task that counts")
    parser.add_argument("--distance", type=int, default=DISTANCE, help="of hashes, in bits of 64 (default: %(default)s)")
    parser.add_argument("--question", type=float, default=QUESTION, help="share of word triples in common (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="KEPT.jsonl", help="write the other problems; in the folder of TRAIN.jsonl")
    parser.add_argument("--show", type=int, default=5, help="pairs to print (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.out is not None:
            check_beside("--out", args.out, args.file)
            if args.out.resolve() in [other.resolve() for other in args.against]:
                raise ProblemError(f"--out {args.out}: is one of --against")
        problems = read_problems(args.file, verify="header")
        kept, found = without_overlap(problems, args.against, distance=args.distance, question=args.question)
        for one in found[:args.show]:
            print(f"{one.reason}: {one.id} is {one.other} of {one.file}")
        counts = Counter(one.reason for one in found)
        print(f"{args.file}: {len(found)} of {len(problems)} problems occur in {', '.join(map(str, args.against))}"
              + "".join(f"; {reason}: {counts[reason]}" for reason in REASONS if counts[reason]))
        if args.out is not None:
            if not kept:
                raise ProblemError(f"--out {args.out}: no problem is left, so it is not written")
            write_problems(args.out, kept)
            print(f"{args.out}: {len(kept)} problems")
    except (ProblemError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
