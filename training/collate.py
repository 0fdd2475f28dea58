"""From numbers of draws to tensors: the batch carries its loss weights and the views that its loss asks for."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig

from data_prep.encode import Encoded, Encoder
from data_prep.problem import ProblemError, Prompt, View
from training.balance.hook import Showing
from training.balance.settings import Balance
from training.balance.views import branches
from training.config import Loss, Model, RecipeError
from training.objective import VIEWS, Objective, Role, branch_roles

IGNORED = -100          # a label that is not trained


def load_encoder(model: Model) -> Encoder:
    """Tokenizer and image processor of a recipe's model. RecipeError when there are none, or none of the Qwen2-VL family."""
    try:
        encoder = Encoder(model.name, revision=model.revision, min_pixels=model.min_pixels, max_pixels=model.max_pixels)
        encoder.longest = AutoConfig.from_pretrained(model.name, revision=model.revision).get_text_config().max_position_embeddings
        return encoder
    except (ValueError, OSError) as error:
        raise RecipeError(f"model.name: {model.name}: {' '.join(str(error).split())}") from error


def loss_weights(trained: np.ndarray, weigh: Literal["tokens", "rows"]) -> np.ndarray:
    """What each token counts in the loss.

    Args:
        trained: (tokens,) bool, True on the tokens of answers; answers are separated by at least one untrained token.
        weigh: "tokens": 1 for every trained token; "rows": the tokens of one answer share a weight of 1.

    Returns:
        (tokens,) float32.
    """
    weights = trained.astype(np.float32)
    if weigh == "rows":
        starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
        ends = np.flatnonzero(trained & ~np.concatenate([trained[1:], [False]])) + 1
        for start, end in zip(starts, ends):
            weights[start:end] = 1 / (end - start)
    return weights


class Collator:
    """Draws to a batch: what Encoder.batch gives, and labels and loss_weight of shape (batch, tokens).

    Also `draws`, the numbers of the draws; `stage`, the number of the stage that the draws belong to; `views`, (batch,) numbers of the views they were drawn in; and
    `roles`: by name, the same problems with the same answers in the view of each role that the stage's objective asks for.

    Rendering, decoding and tokenising happen here, in the data loader's workers when there are any.

    Args:
        plan: gives a draw by its number, and the conversation of a draw.
        objectives: one per stage.
        balance: a balance method's settings. Then there are also `branches`, the roles that it asks for at this optimizer step,
            and with any of them `at` and `token`, (answers, most options), see training.balance.views.see.
        showing: what a balance method changes about how the drawn problems are shown. Then there is also `extras`: its numbers
            about each row, (batch,) by name, and, where it keeps them, the batch of the unchanged rows as `complete`.
    """

    def __init__(self, plan: Any, encoder: Encoder, objectives: Sequence[Objective] = (Objective(Loss(), ()),), *,
                 balance: Balance | None = None, showing: Showing | None = None) -> None:
        self.plan, self.encoder, self.objectives = plan, encoder, objectives
        self.balance, self.showing = balance, showing

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        draws = [self.plan.draw(row["draw"]) for row in rows]
        stage = getattr(draws[0], "stage", 0)
        objective = self.objectives[stage]
        batch: dict[str, Any] = self._batch(draws, objective) if self.showing is None else self._changed(draws, objective)
        batch["draws"], batch["stage"] = [row["draw"] for row in rows], stage
        batch["views"] = torch.tensor([VIEWS.index(getattr(draw, "view", View.vision)) for draw in draws])
        batch["roles"] = {name: self._batch([draw._replace(view=role.view_of(draw.view)) for draw in draws], objective)
                          for name, role in objective.extra.items()}
        if self.balance is not None:
            roles = branch_roles(self.balance, rows[0]["draw"] // self.plan.batch)
            batch |= self.branches(draws, roles, objective)
        return batch

    def branches(self, draws: list, roles: dict[str, Role], objective: Objective) -> dict[str, Any]:
        """`branches`, `at` and `token` of draws; see the class."""
        if not roles:
            return {"branches": {}}
        shown = {name: self._batch([draw._replace(view=role.view_of(draw.view), question=role.question) for draw in draws], objective)
                 for name, role in roles.items()}
        # Options do not depend on the view: asked for without a picture, none is opened.
        found = [self._options(prompt) for draw in draws for prompt in self.plan.conversation(draw._replace(view=View.blind))[2]]
        table = np.full((len(found), max(map(len, found)), 2), -1)
        for number, options in enumerate(found):
            table[number, : len(options)] = np.reshape(options, (-1, 2))
        at, token = torch.from_numpy(table).unbind(-1)
        return {"branches": shown, "at": at, "token": token}

    def _options(self, prompt: Prompt) -> list[tuple[int, int]]:
        """See training.balance.views.branches; none for an open answer, or one with words before it."""
        if prompt.choices is None or prompt.target != prompt.answer:
            return []
        said = [(*self.encoder.text_ids(choice), self.encoder.end_id) for choice in prompt.choices]
        return branches(said, prompt.choices.index(prompt.answer))

    def _changed(self, draws: list, objective: Objective) -> dict[str, Any]:
        """The batch as the method shows it."""
        rows, complete, numbers = [], [], []
        for draw in draws:
            key = (draw.epoch, draw.view.value, self.plan.ids(draw))
            complete.append(self._encode(self.showing.draw(draw, key)))
            row, told = self.showing.row(complete[-1], key)
            rows.append(row)
            numbers.append(told)
        batch: dict[str, Any] = self._joined(rows, objective)
        batch["extras"] = {name: torch.tensor([told[name] for told in numbers]) for name in numbers[0]}
        if self.showing.complete:
            batch["extras"]["complete"] = self.encoder.batch(complete)
        return batch

    def _batch(self, draws: list, objective: Objective) -> dict[str, torch.Tensor]:
        return self._joined([self._encode(draw) for draw in draws], objective)

    def _encode(self, draw: Any) -> Encoded:
        messages, images, _ = self.plan.conversation(draw)
        row = self.encoder.encode(messages, images)
        if len(row) > self.encoder.longest:
            raise ProblemError(f"{', '.join(self.plan.ids(draw))}: {len(row)} tokens together, and the model has positions for "
                               f"{self.encoder.longest}: lower model.max_pixels or the mixture's turns, or leave them out")
        return row

    def _joined(self, encoded: list[Encoded], objective: Objective) -> dict[str, torch.Tensor]:
        batch = self.encoder.batch(encoded)
        weight = torch.zeros(batch["input_ids"].shape)
        weigh = "rows" if objective.loss.weigh == "rows" else "tokens"
        for i, row in enumerate(encoded):
            weight[i, : len(row)] = torch.from_numpy(loss_weights(row.trained, weigh))
        batch["loss_weight"] = weight
        batch["labels"] = batch["input_ids"].masked_fill(weight == 0, IGNORED)
        return batch


def answer_numbers(labels: torch.Tensor) -> torch.Tensor:
    """Which answer each trained token belongs to.

    Args:
        labels: (batch, tokens); answers are runs of labels that are not ignored.

    Returns:
        (trained tokens,) numbers from 0, row after row.
    """
    trained = labels != IGNORED
    before = torch.nn.functional.pad(trained[:, :-1], (1, 0))
    return ((trained & ~before).flatten().cumsum(0) - 1)[trained.flatten()]
