"""MathVerse (Zhang et al. 2024): text and vision versions of one problem, in pairs (python -m data_prep.sources.mathverse)."""

import math

from data_prep.problem import Prompt
from eval.quantity import Quantity, read_quantity
from eval.tasks.base import Score, Task


def same_rounded(pred: Quantity, gold: Quantity) -> bool:
    """Equal, or equal when rounded to the digits after gold's point: 9.86 accepts 9.8596 and not 9.9; 30 accepts 30.0 alone.

    A gold that is no plain number accepts what is rounded to two digits or more: 2sqrt(3) accepts 3.46 and not 3.5.
    """
    if math.isclose(pred.value, gold.value, rel_tol=1e-6):
        return True
    places = gold.places if gold.places is not None else pred.places
    if not places or (gold.places is None and places < 2):
        return False
    return abs(pred.value - gold.value) <= 0.5 * 10**-places * (1 + 1e-9)


class Quantities(Task):
    """Options are letters; free-form answers are quantities, or expressions that are compared as text."""

    def score(self, prompt: Prompt, text: str) -> Score:
        if prompt.choices is not None:
            return super().score(prompt, text)
        return Score(*read_quantity(text, prompt.answer, same_rounded))


TASKS = [
    Quantities("mathverse", "mathverse/test.jsonl", "geometry and functions; both = a text version, vision = a vision version"),
]
