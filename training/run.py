"""The run folder: everything that a result needs to name its parents.

    recipe.yaml      the resolved recipe
    run.json         commit, dirty, packages, data hashes, device, command, seconds, finished; and, of a run that was continued with
                     changes, `changed`: [{"step": after which, "recipe": {key: {"old", "new"}}, "data": {file: {"old", "new"}}}]
    metrics.jsonl    one JSON object per logged step
    checkpoints/     for --resume
    tensorboard/
    adapter/         the trained adapter in PEFT's layout (model/ when the recipe trains all weights)
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.images import one_line
from data_prep.provenance import parents, write_json
from data_prep.read import replacing
from training.callbacks import last_checkpoint, step_of
from training.changes import ALLOW, differences, fixed
from training.config import Recipe, RecipeError
from training.strict import build, read_yaml

SHOWN = 8       # keys that a message names


class RunFolder:
    """Opens the folder of a run, new or to be resumed.

    Args:
        allow_changes: the recipe and the data may have changed since the run began; what did is kept in run.json as `changed`.

    Raises:
        RecipeError: the folder holds a run and `resume` is off, or a run of another recipe and changes are not allowed, or are of a
            kind that no checkpoint can be continued with.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, allow_changes: bool = False) -> None:
        self.path, self.allow_changes = Path(recipe.run_dir), allow_changes
        self._recipe = plain = recipe.to_dict()
        self.changed: dict[str, dict[str, Any]] = {}        # by key: its old and its new value
        recorded = self.path / "recipe.yaml"
        if recorded.exists():
            if not resume:
                raise RecipeError(f"{self.path} already holds a run: continue it with --resume, or give another run_dir=...")
            old = read_yaml(recorded, yaml.SafeLoader)      # as it was written
            if allow_changes:
                before = build(Recipe, read_yaml(recorded), recorded)
                old = before.to_dict()
            self.changed = differences(old, plain)
            if self.changed and not allow_changes:
                shown = [f"{one_line(key, 60)} ({one_line(repr(each['old']), 60)} then, {one_line(repr(each['new']), 60)} now)"
                         for key, each in list(self.changed.items())[:SHOWN]]
                more = f" and {len(self.changed) - SHOWN} more" if len(self.changed) > SHOWN else ""
                raise RecipeError(f"{self.path} holds a run of another recipe; it differs in {', '.join(shown)}{more}; {ALLOW}")
            if self.changed and self.checkpoint is not None:
                if reason := fixed(before, recipe):
                    raise RecipeError(f"{self.path} cannot be continued so, whatever is allowed: {reason}")
                if self.step >= recipe.steps:
                    raise RecipeError(f"{self.path} is at step {self.step}, and the changed recipe has {recipe.steps} steps: nothing would "
                                      "be trained with the changes; give more steps")

    @property
    def checkpoint(self) -> Path | None:
        """The one to continue from."""
        return last_checkpoint(self.path)

    @property
    def step(self) -> int:
        """Optimizer steps up to there."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def info(self) -> dict[str, Any]:
        """What run.json holds. RecipeError: it is damaged."""
        path = self.path / "run.json"
        try:
            info = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            json.dumps(info, indent=1, ensure_ascii=False).encode("utf-8")      # it is written again: no half of a surrogate pair
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from error
        if not isinstance(info, dict) or not isinstance(info.get("finished", False), bool) or not isinstance(info.get("data", {}), dict) \
                or not isinstance(info.get("changed", []), list):
            raise RecipeError(f"{path}: is damaged: an object is needed in which finished is true or false, data an object, and changed a "
                              "list")
        if info.get("finished") and not isinstance(info.get("seconds"), (int, float)):
            raise RecipeError(f"{path}: is damaged: a finished run has its seconds")
        return info

    @property
    def finished(self) -> bool:
        return self.info.get("finished", False) and not self.changed

    def record(self, **values: Any) -> None:
        """Add to run.json."""
        write_json(self.path / "run.json", {**self.info, **values})

    def check_data(self, data_hashes: dict[str, str]) -> dict[str, dict[str, str | None]]:
        """By file: its old and its new hash, of those that changed since the run began. RecipeError: some did, which is not allowed."""
        old = self.info.get("data")
        changed = {} if old is None else {name: {"old": old.get(name), "new": data_hashes.get(name)}
                                          for name in sorted({*old, *data_hashes}) if old.get(name) != data_hashes.get(name)}
        if changed and not self.allow_changes:
            raise RecipeError(f"{self.path}: the data changed since the run began: {', '.join(changed)}; {ALLOW}")
        return changed

    def start(self, data_hashes: dict[str, str]) -> None:
        """Begin the folder with the recipe and the parents: not before everything could be read, so that a run that never
        began leaves nothing to resume. Raises RecipeError as check_data does."""
        data = self.check_data(data_hashes)
        self.path.mkdir(parents=True, exist_ok=True)
        if self.changed or data:        # before the recipe, so that no change goes unrecorded where the process is killed here
            now = {"step": self.step, "recipe": self.changed, "data": data}
            self.record(changed=[one for one in self.info.get("changed", []) if one != now] + [now])
        with replacing(self.path / "recipe.yaml") as file:      # which a run that is resumed and killed here must not lose
            file.write(yaml.safe_dump(self._recipe, sort_keys=False).encode("utf-8"))
        self.record(**parents(), data=data_hashes, command=sys.argv, finished=False,
                    device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads())


def file_trouble(error: Exception) -> str | None:
    """One sentence where torch or safetensors could not write or read a file, which they raise in ways of their own; else None."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if kind == "SafetensorError":
        writing = "serializing" in text and "deserializ" not in text
    elif kind in ("RuntimeError", "UnpicklingError") and re.search(r"PytorchStream|inline_container|weights_only", text):
        writing = "PytorchStreamReader" not in text and kind == "RuntimeError"
    else:
        return None
    if writing:
        return one_line(f"a file could not be written, most likely for want of room ({text}); make some, and continue with --resume: the "
                        "last whole checkpoint is intact")
    return one_line(f"a file of weights or of a checkpoint is damaged ({text}); where it is the newest checkpoint's, remove that folder and "
                    "--resume continues from the one before")

