"""What a model is shown: a prompt, and text that knows which of it are facts or question."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image


class Words(str):
    """Text that knows which of its characters are facts or question: what may be missing while the task stays the same.

    It equals the plain text, prints and serialises as it, so a message is the same with it. Whatever is made of it by string
    methods, or read back from a file, is plain and knows nothing.
    """

    open: tuple[tuple[int, int], ...]  # (start, end) of characters

    def __new__(cls, text: str, ranges: Sequence[tuple[int, int]] = ()) -> "Words":
        made = super().__new__(cls, text)
        made.open = tuple(ranges)
        return made

    def __getnewargs__(self) -> tuple:
        return str(self), self.open


class Corruption(NamedTuple):
    """What of a prompt is missing when a model is shown it; see data_prep.corrupt."""

    text: float  # rates
    image: float
    seed: tuple  # of this prompt


@dataclass(frozen=True)
class Prompt:
    """What a model is shown, and what a right answer says."""

    messages: list[dict]  # one user turn; its last part is text (Words), its {"type": "image"} parts stand before and between
    images: tuple[Image.Image, ...]  # RGB, in the order of the image parts
    answer: str  # the option's letter, the option's text, or the open answer
    choices: tuple[str, ...] | None  # what may be said, in the order shown; None: open
    options: tuple[str, ...] | None  # option texts in the order shown
    target: str  # what training teaches to say: the answer, or the way to it and then the answer
    corruption: Corruption | None = None


def stripped(text: str, ranges: Sequence[tuple[int, int]]) -> Words:
    """The text without white space at its ends; ranges: what is open of it."""
    start = len(text) - len(text.lstrip())
    return cut(Words(text, ranges), start, max(start, len(text.rstrip())))


def with_facts(facts: str, text: Words) -> Words:
    """The facts, all of them open, above the text."""
    # The space before the facts counts as theirs: tokenizers make one token of it and the first word.
    label, before = "Facts:", f"Facts: {facts}\n"
    ranges = [(len(label), len(before) - 1), *((start + len(before), end + len(before)) for start, end in text.open)]
    return stripped(before + text, ranges)


def cut(text: Words, start: int, end: int) -> Words:
    """text[start:end] with what is open of it."""
    ranges = [(max(a, start) - start, min(b, end) - start) for a, b in text.open if max(a, start) < min(b, end)]
    return Words(text[start:end], ranges)
