"""The run folder: everything that a result needs to name its parents.

    recipe.yaml      the resolved recipe
    run.json         commit, dirty, packages, data hashes, device, command, seconds, finished
    metrics.jsonl    one JSON object per logged step
    checkpoints/     for --resume
    tensorboard/
    adapter/         the trained adapter in PEFT's layout (model/ when the recipe trains all weights)
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.provenance import parents, write_json
from training.config import Recipe, RecipeError

class RunFolder:
    """Opens the folder of a run, new or to be resumed.

    Raises:
        RecipeError: the folder holds a run and `resume` is off, or a run of another recipe.
    """

    def __init__(self, recipe: Recipe, *, resume: bool) -> None:
        self.path = Path(recipe.run_dir)
        self._recipe = plain = recipe.to_dict()
        recorded = self.path / "recipe.yaml"
        if recorded.exists():
            if not resume:
                raise RecipeError(f"{self.path} already holds a run: continue it with --resume, or give another run_dir=...")
            old = yaml.safe_load(recorded.read_text(encoding="utf-8"))
            if old != plain:
                raise RecipeError(f"{self.path} holds a run of another recipe; it differs in {', '.join(_differences(old, plain))}")

    @property
    def info(self) -> dict[str, Any]:
        path = self.path / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def finished(self) -> bool:
        return bool(self.info.get("finished"))

    def record(self, **values: Any) -> None:
        """Add to run.json."""
        write_json(self.path / "run.json", {**self.info, **values})

    def start(self, data_hashes: dict[str, str]) -> None:
        """Begin the folder with the recipe and the parents: not before everything could be read, so that a run that never
        began leaves nothing to resume. Raises RecipeError when a resumed run's data files have changed."""
        old = self.info.get("data")
        if old is not None and old != data_hashes:
            changed = sorted(set(old.items()) ^ set(data_hashes.items()))
            raise RecipeError(f"{self.path}: the data changed since the run began: {', '.join(sorted({name for name, _ in changed}))}")
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.yaml").write_text(yaml.safe_dump(self._recipe, sort_keys=False), encoding="utf-8")
        self.record(**parents(), data=data_hashes, command=sys.argv, finished=False,
                    device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads())


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted({*old, *new}) for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}".strip("."))]
    return [] if old == new else [f"{prefix} ({old!r} then, {new!r} now)"]
