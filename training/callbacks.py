"""What happens around the steps of training: checkpoints marked as whole, the log and its progress bar, restarts of the optimizer."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.config import Recipe
from training.memory import forget_peak_memory, peak_memory_gb

COMPLETE = "complete"       # a file that is written last into a checkpoint: without it, a checkpoint is not one


class MarkComplete(TrainerCallback):
    """Writes the mark of a whole checkpoint, after everything else in it, and only then deletes all but the last `keep`.

    (The trainer itself would delete older ones first, so that a process killed in between had none left.)
    """

    def __init__(self, keep: int = 2, also: Callable[[Path, int], None] | None = None) -> None:
        """also: writes something more of ours into a checkpoint, given its folder and step."""
        self.keep, self.also = keep, also

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        PartialState().wait_for_everyone()      # every rank writes its own random state into the checkpoint
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.also is not None:
            self.also(folder, state.global_step)
        (folder / COMPLETE).touch()
        for old in sorted(checkpoints(Path(args.output_dir)), key=step_of)[:-self.keep]:
            (old / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(old)


class RestartOptimizer(TrainerCallback):
    """Forgets the optimizer's moments where a stage asks for it: before the first step of the stage."""

    def __init__(self, recipe: Recipe) -> None:
        self.steps = {start for start, stage in zip(recipe.stage_starts, recipe.stages) if stage.optimizer == "restart" and start}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        if state.global_step in self.steps:
            while getattr(optimizer, "optimizer", None) is not None:
                optimizer = optimizer.optimizer     # inside accelerate's and DeepSpeed's wrappers
            optimizer.state.clear()


class Metrics(TrainerCallback):
    """metrics.jsonl (one JSON object per logged step) and a progress bar with loss and examples per second."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch
        self._bar = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._bar = None
        if not state.is_world_process_zero:
            return
        from tqdm import tqdm

        self._seconds_before = self._forget_after(state.global_step)
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.path.parent.name, unit="step", mininterval=2)
        self._start = (time.perf_counter(), state.global_step)
        forget_peak_memory()

    def _forget_after(self, step: int) -> float:
        """Drop the lines after the checkpoint that a run continues from, which are logged again; seconds up to there."""
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
                if 0 <= row["step"] <= step and math.isfinite(row.get("seconds", 0.0)):
                    rows.append(row)
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
                # Cut off when the process was killed, or damaged: a log is not worth a run.
                continue
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        os.replace(part, self.path)
        return rows[-1].get("seconds", 0.0) if rows else 0.0

    @property
    def seconds(self) -> float:
        """Of training, over all resumed parts."""
        return self._seconds_before + time.perf_counter() - self._start[0]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self._bar is None or "loss" not in logs:
            return
        seconds, steps = time.perf_counter() - self._start[0], state.global_step - self._start[1]
        rate = steps * self.batch / seconds
        self._bar.set_postfix(loss=f"{logs['loss']:.3f}", examples_per_s=f"{rate:.1f}")
        row = {"step": state.global_step, **logs, "examples_per_s": round(rate, 2), "seconds": round(self.seconds, 1)}
        if (peak_gb := peak_memory_gb()) is not None:
            row["peak_memory_gb"] = round(peak_gb, 3)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """End the progress bar, also of a training that failed: an error's sentence stands in a line of its own then."""
        if self._bar is not None:
            self._bar.close()


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [folder for folder in checkpoints(run_dir / "checkpoints") if (folder / COMPLETE).is_file()]
    return max(whole, key=step_of, default=None)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not; what a user keeps there under another name (checkpoint-100-best) is none."""
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name) and path.is_dir()]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
