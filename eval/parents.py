"""Where a committed number comes from: the parents of an output folder of eval.run, in a form that names no machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from data_prep.provenance import file_sha256, place, weights_fingerprint
from eval.answers import AnswersError, Run

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def parents(run: Run, *, allow_dirty: bool = False) -> dict:
    """Where one run comes from: the evaluation's run.json and, behind an adapter, the run folder of its training.

    `steps` are the optimizer steps that the adapter has made: those of its checkpoint, or of the whole recipe.
    Raises AnswersError for an adapter without its training (run.json and recipe.yaml), for the adapter of a training
    that was not finished, for answers of a server, and, unless `allow_dirty`, for a run without a commit or with uncommitted changes.
    """
    info, where = run.info, run.folder.as_posix()
    if info.get("endpoints"):
        raise AnswersError(f"{where}: a server gave these answers, so which weights they come from is not known; a committed number "
                           "needs eval.run on the weights themselves")
    found = {
        **{key: info.get(key) for key in ("commit", "dirty", "packages", "python", "device", "seed", "model_sha256",
                                          "adapter_sha256", "revision")},
        "model": place(info["model"]), "eval_seconds": info.get("seconds"),
        "data_sha256": {task: one["sha256"] for task, one in info["tasks"].items()},
        "recipe": None, "recipe_sha256": None, "steps": None, "training_data_sha256": None, "training_seconds": None,
        "training_commit": None, "training_dirty": False, "training_device": None, "training_packages": None,
    }
    if info.get("adapter"):
        found |= _training(run, Path(info["adapter"]))
    commits = [found["commit"], *([found["training_commit"]] if found["recipe"] else [])]
    if not allow_dirty and not all(commits):
        raise AnswersError(f"{where}: no commit was recorded (--allow-dirty collects it all the same)")
    if not allow_dirty and (found["dirty"] or found["training_dirty"]):
        raise AnswersError(f"{where}: made from a working tree with uncommitted changes (--allow-dirty collects it all "
                           "the same, and says so)")
    return found


def _training(run: Run, adapter: Path) -> dict:
    """The parents of an adapter: the one in RUN/adapter, or one that a training left in RUN/checkpoints/checkpoint-N."""
    where, info = run.folder.as_posix(), run.info
    checkpoint = CHECKPOINT.fullmatch(adapter.name)
    folder = next((one for one in (adapter.parent, adapter.parent.parent) if (one / "recipe.yaml").is_file()), None)
    training = info.get("training") or (_recorded(run, adapter, folder) if folder else None)
    if not folder or not training:
        raise AnswersError(f"{where}: no run.json and recipe.yaml beside the adapter {adapter.as_posix()}, so its "
                           "training is not known")
    if not training.get("finished") and not checkpoint:
        raise AnswersError(f"{where}: the training of {adapter.as_posix()} was not finished")
    recipe = folder / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if info.get("seed") not in (None, values["seed"]):
        raise AnswersError(f"{where}: seed {info['seed']} was recorded, but {recipe} says {values['seed']}")
    return {
        "seed": values["seed"], "recipe": values["name"], "recipe_sha256": file_sha256(recipe),
        "steps": int(checkpoint[1]) if checkpoint else values["steps"],
        "training_seconds": None if checkpoint else training.get("seconds"),    # of the whole run, not up to a checkpoint
        "training_data_sha256": {place(name): one for name, one in training.get("data", {}).items()},
        "training_commit": training.get("commit"), "training_dirty": training.get("dirty"),
        "training_device": training.get("device"), "training_packages": training.get("packages"),
    }


def _recorded(run: Run, adapter: Path, folder: Path) -> dict | None:
    """run.json of the training, for an evaluation that did not record it; the adapter must still be what was evaluated."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        now, training = weights_fingerprint(adapter), json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnswersError(f"{run.folder.as_posix()}: the training of {adapter.as_posix()} is not known: {error}") from None
    if now != run.info.get("adapter_sha256"):
        raise AnswersError(f"{run.folder.as_posix()}: the adapter {adapter.as_posix()} has changed since it was evaluated, "
                           "so its training is not known")
    return training


def rounded(value):
    """Floats to six significant digits: more of them would say nothing and would change with the machine."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
