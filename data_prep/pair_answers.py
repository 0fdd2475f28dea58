"""What a model says of problems, shown in a view or continuing half of the right answer; kept in a file as it comes.

A row of the file is one question asked: scores of a closed question's options, in the order shown, or the text of an answer.
Its key is a hash of everything that it depends on (model, what is shown, budget), so a row is used again exactly where it would
come out the same, and rows of several models and settings may stand in one file.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.blind import Contents
from data_prep.problem import Problem, ProblemError, Prompt, View, render
from data_prep.read import dump, json_lines, parse_json
from data_prep.sources.common import hashed

CONTINUED = "continued"     # beside the views a way to ask: without the picture, half of the right answer being said
VERSION = 1                 # raised when the same model would say something else
WINDOW = 8                  # batches that are sorted by length together, so that short and long prompts do not pad each other

Asked = tuple[Problem, str]


class Answers:
    """What was said so far, in a file that grows by a row for each question.

    Args:
        path: a .jsonl file, new or of earlier runs.
        identity: of the model; see Answerer.identity.
        max_new_tokens: budget of a generated answer.

    Raises:
        ProblemError: "<file>:<line>: <field>: ..." for a row that is none of these.
    """

    def __init__(self, path: Path, identity: dict[str, Any], max_new_tokens: int) -> None:
        self.path, self.identity, self.max_new_tokens = path, identity, max_new_tokens
        self._contents, self._rows = Contents(), {}
        if path.exists():
            data = path.read_bytes()
            if (whole := data[: data.rfind(b"\n") + 1]) != data:    # a killed process left half a line
                path.write_bytes(whole)
            for number, line in json_lines(path):
                try:
                    row = _checked(parse_json(line))
                except ProblemError as error:
                    raise ProblemError(f"{path}:{number}: {error}") from error
                self._rows[row["key"]] = row

    def key(self, problem: Problem, way: str) -> str:
        shown = [self._contents.of(problem), problem.facts if way == View.both.value else None]
        budget = self.max_new_tokens if generates(problem, way) else None
        return hashed(json.dumps([VERSION, self.identity, way, shown, budget], sort_keys=True))

    def __contains__(self, asked: Asked) -> bool:
        return self.key(*asked) in self._rows

    def get(self, problem: Problem, way: str) -> dict[str, Any]:
        """{"scores": [...]} or {"text": ..., "finish": "stop" or "length"}, and what else the row has."""
        return self._rows[self.key(problem, way)]

    def add(self, found: Sequence[tuple[Asked, dict[str, Any]]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            for (problem, way), said in found:
                row = {"key": self.key(problem, way), "id": problem.id, "way": way, "model": self.identity.get("model"), **said}
                file.write(dump(row))
                self._rows[row["key"]] = row


def _checked(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise ProblemError("key: missing; is this what data_prep.pairs wrote?")
    if not isinstance(row.get("scores", []), list) or "scores" not in row and not {"text", "finish"} <= set(row):
        raise ProblemError("scores: neither they nor text and finish are there; is this what data_prep.pairs wrote?")
    return row


def generates(problem: Problem, way: str) -> bool:
    """Whether the answer is generated; else the options are scored."""
    return problem.options is None or way == CONTINUED


def ask(answerer: Any, wanted: Sequence[Asked], answers: Answers, *, batch_size: int) -> None:
    """Ask what is wanted and not known yet. answerer: a data_prep.answerer.Answerer."""
    left = [asked for asked in wanted if asked not in answers]
    with tqdm(total=len(wanted), initial=len(wanted) - len(left), desc=answers.path.name, unit="answer", mininterval=2) as bar:
        for start in range(0, len(left), WINDOW * batch_size):
            window = [(asked, _shown(*asked)) for asked in left[start:start + WINDOW * batch_size]]
            for batch in _batches(window, batch_size):
                answers.add(list(_said(answerer, batch, answers.max_new_tokens)))
                bar.update(len(batch))


def _shown(problem: Problem, way: str) -> Prompt:
    return render(problem, View.blind if way == CONTINUED else way)


def _batches(window: list[tuple[Asked, Prompt]], size: int) -> Iterator[list[tuple[Asked, Prompt]]]:
    """Questions that are asked alike and are about equally long."""
    groups: dict[tuple[bool, bool], list[tuple[Asked, Prompt]]] = {}
    for one in window:
        (problem, way), _ = one
        groups.setdefault((generates(problem, way), way == CONTINUED), []).append(one)
    for group in groups.values():
        group.sort(key=lambda one: _length(one[1]))
        for start in range(0, len(group), size):
            yield group[start:start + size]


def _length(prompt: Prompt) -> tuple[int, int]:
    texts = [part.get("text", "") for part in prompt.messages[0]["content"]]
    return sum(image.width * image.height for image in prompt.images), sum(map(len, texts))


def _said(answerer: Any, batch: list[tuple[Asked, Prompt]], max_new_tokens: int) -> Iterator[tuple[Asked, dict[str, Any]]]:
    asked, prompts = [one for one, _ in batch], [prompt for _, prompt in batch]
    if not generates(*asked[0]):
        for one, scores in zip(asked, answerer.likelihoods(prompts)):
            yield one, {"scores": [round(score, 6) for score in scores]}
        return
    begun = [half(answerer.encoder.text_ids(prompt.answer)) for prompt in prompts] if asked[0][1] == CONTINUED else None
    for one, said in zip(asked, answerer.generate(prompts, max_new_tokens, begun)):
        yield one, {"text": said.text, "tokens": said.tokens, "finish": said.finish}


def half(ids: Sequence[int]) -> tuple[int, ...]:
    """The first half of some tokens, at least one."""
    return tuple(ids[:max(1, len(ids) // 2)])


def most_likely(prompt: Prompt, row: dict[str, Any], *, wrong: bool = False) -> str:
    """The choice with the highest score, of equal ones the first; wrong: of those that are not the answer."""
    places = [place for place, choice in enumerate(prompt.choices) if not (wrong and choice == prompt.answer)]
    return prompt.choices[max(places, key=lambda place: row["scores"][place])]
