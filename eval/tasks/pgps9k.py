"""PGPS9K (Zhang et al. 2023): plane geometry with its diagram in clauses (python -m data_prep.sources.pgps9k)."""

from data_prep.problem import Prompt
from eval.quantity import Quantity, read_quantity
from eval.tasks.base import Score, Task


def near(pred: Quantity, gold: Quantity) -> bool:
    """Within 1 % of gold, the tolerance of Yao et al. (2025, arXiv 2510.22836)."""
    return abs(pred.value - gold.value) <= 0.01 * abs(gold.value)


class Numbers(Task):
    """Open answers are numbers, right within 1 %."""

    def score(self, prompt: Prompt, text: str) -> Score:
        if prompt.choices is not None:
            return super().score(prompt, text)
        return Score(*read_quantity(text, prompt.answer, near))


TASKS = [Numbers("pgps9k", "pgps9k/test.jsonl", "lengths, angles and areas in a diagram; facts from the published clauses")]
