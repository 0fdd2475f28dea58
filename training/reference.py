"""The reference's log-probabilities ahead of training: computed once, kept on disk, refused when they belong to something else.

    <folder>/key.json       what they depend on
    <folder>/values.npz     by side, one number per draw (NaN where a pair does not have the side); `done`: which draws are computed

Training then makes no forward pass of the reference. Interrupted, it goes on with the draws that are missing.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_prep.encode import Encoder
from data_prep.provenance import weights_fingerprint, write_json
from training.collate_pairs import PairCollator
from training.config import Recipe, RecipeError
from training.plan import Plan
from training.preference import Side, needed, watched
from training.preference_trainer import VisionDPOTrainer

KEY, VALUES = "key.json", "values.npz"
SAVE_EVERY = 50         # rounds of one micro-batch per rank


def key_of(recipe: Recipe, plan: Plan, encoder: Encoder, model: Any) -> dict[str, Any]:
    """What the values depend on, as plain JSON values: model, adapter, pixels, template, data, negatives, order, sides."""
    def fingerprint(folder: str | None) -> str | None:
        return weights_fingerprint(folder) if folder and Path(folder).is_dir() else None

    template = encoder.tokenizer.chat_template
    return {
        "model": recipe.model.name, "model_sha256": fingerprint(recipe.model.name),
        "revision": getattr(model.config, "_commit_hash", None) or recipe.model.revision, "dtype": recipe.model.dtype,
        "adapter": recipe.model.adapter, "adapter_sha256": fingerprint(recipe.model.adapter),
        "pixels": encoder.pixel_bounds, "template_sha256": hashlib.sha256(str(template).encode()).hexdigest(),
        "data": plan.hashes, "negative": recipe.preference.negative, "seed": recipe.seed, "batch": recipe.batch,
        "stages": recipe.stage_starts, "logged_every": recipe.log_every if recipe.preference.watch else None,
        "sides": [str(side) for side in (*needed(recipe.preference), *watched(recipe.preference))],
    }


def ahead_of_training(trainer: VisionDPOTrainer, folder: Path, key: dict[str, Any]) -> dict[Side, torch.Tensor]:
    """By side, (draws,) float32: the reference's log-probabilities of every draw of the plan.

    Args:
        folder: where they are kept, or are to be.
        key: what `key_of` gives.

    Raises:
        RecipeError: the folder holds values of something else, or the reference cannot be run before training (ZeRO-3).
    """
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise RecipeError("preference.reference: ahead cannot be computed under ZeRO-3, which has the model in parts before training "
                          "begins; use live, or ZeRO-2")
    collator: PairCollator = trainer.data_collator
    accelerator, draws = trainer.accelerator, len(collator.plan)
    sides = (*collator.needed, *collator.watched)
    values, done = _opened(folder, key, sides, draws)
    missing = np.flatnonzero(~done)
    if len(missing):
        trainer.model.to(accelerator.device)
        size, ranks, rank = trainer.recipe.micro_batch, accelerator.num_processes, accelerator.process_index
        chunks = [missing[start:start + size].tolist() for start in range(0, len(missing), size)]
        rounds = -(-len(chunks) // ranks)
        mine = [chunks[turn * ranks + rank] if turn * ranks + rank < len(chunks) else [] for turn in range(rounds)]
        loader = DataLoader(mine, batch_size=None, num_workers=trainer.recipe.data.workers, collate_fn=_Build(collator))
        bar = tqdm(total=draws, initial=draws - len(missing), desc="reference", unit="pair", disable=rank != 0, mininterval=2)
        for turn, (numbers, batch) in enumerate(loader):
            found = _values(trainer, batch, numbers) if numbers else []
            for number, one in gather_object(found):
                for side, value in one.items():
                    values[side][number] = value
                done[number] = True
                bar.update()
            if rank == 0 and ((turn + 1) % SAVE_EVERY == 0 or turn + 1 == rounds):
                _write(folder, key, values, done)
        bar.close()
        accelerator.wait_for_everyone()
    return {side: torch.from_numpy(values[str(side)]) for side in sides}


class _Build:
    """Numbers of draws to (the numbers, their batch); a class, so that workers can get it however they are started."""

    def __init__(self, collator: PairCollator) -> None:
        self.collator = collator

    def __call__(self, numbers: list[int]) -> tuple[list[int], dict[str, Any]]:
        if not numbers:
            return [], {}
        wanted = self.collator.watched if any(map(self.collator.logged, numbers)) else ()
        return numbers, self.collator.build(numbers, {"learn": (*self.collator.needed, *wanted)})


def _values(trainer: VisionDPOTrainer, batch: dict[str, Any], numbers: Sequence[int]) -> list[tuple[int, dict[str, float]]]:
    batch = trainer._prepare_inputs(batch)
    rows = batch["learn"]
    found = trainer.reference_log_probs(rows, trainer._features(rows)).tolist()
    places = {str(side): place.tolist() for side, place in batch["places"]["learn"].items()}
    return [(number, {side: found[place[i]] for side, place in places.items() if place[i] >= 0}) for i, number in enumerate(numbers)]


def _opened(folder: Path, key: dict[str, Any], sides: Sequence[Side], draws: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What is there already."""
    if (folder / KEY).exists():
        old = json.loads((folder / KEY).read_text(encoding="utf-8"))
        if differing := [name for name in key if old.get(name) != key[name]]:
            raise RecipeError(f"{folder}: holds the reference's log-probabilities of something else; it differs in "
                              f"{', '.join(differing)}. Delete it, or give another preference.cache")
        try:
            with np.load(folder / VALUES) as saved:
                return {str(side): saved[str(side)] for side in sides}, saved["done"]
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(f"{folder / VALUES}: cannot be read ({error}); delete the folder {folder}") from error
    return {str(side): np.full(draws, np.nan, dtype=np.float32) for side in sides}, np.zeros(draws, dtype=bool)


def _write(folder: Path, key: dict[str, Any], values: dict[str, np.ndarray], done: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{VALUES}.part"
    with open(part, "wb") as file:
        np.savez(file, done=done, **values)
    os.replace(part, folder / VALUES)
    if not (folder / KEY).exists():
        write_json(folder / KEY, key)
