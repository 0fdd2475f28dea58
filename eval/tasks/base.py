"""What a task is: a file of problems and a rule that scores an answer."""

from dataclasses import dataclass
from typing import NamedTuple

from data_prep.problem import Prompt
from eval.parse import parse_choice, parse_open, same_answer


class TaskError(ValueError):
    """A task that does not exist or whose data is missing."""


class Score(NamedTuple):
    pred: str | None        # one of the prompt's choices, or the open answer; None: unparsed, which counts as wrong
    correct: bool


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: on the command line and in results.
        file: its problems (JSONL), relative to the data folder.
        about: one line: what it asks and how the file is made.
    """
    name: str
    file: str
    about: str

    def score(self, prompt: Prompt, text: str) -> Score:
        """Score a generated answer. The same rule for every view."""
        if prompt.choices is None:
            pred = parse_open(text)
            return Score(pred, same_answer(pred, prompt.answer))
        pred = parse_choice(text, prompt.choices, prompt.options)
        return Score(pred, pred == prompt.answer)
