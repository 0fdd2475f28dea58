"""ZeRO-1 and 2 with another number of ranks: a checkpoint holds the optimizer's state in as many parts as wrote it.

DeepSpeed converts it into a universal one, which has a file for each parameter and is loaded by any number (arXiv 2406.18820).
"""

import contextlib
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from training.sharding import settings_of


def universal_settings(deepspeed: str) -> dict[str, Any]:
    """A DeepSpeed configuration under which a universal checkpoint is loaded. Checkpoints are written as ever."""
    settings = settings_of(deepspeed)
    return {**settings, "checkpoint": {**settings.get("checkpoint", {}), "load_universal": True}}


@contextlib.contextmanager
def universal(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint as a universal one, in a folder beside it that is removed afterwards. To be called by all ranks.

    Random states belong to ranks and are left out: dropout draws anew.
    """
    folder, state = checkpoint.with_name(f"universal-{checkpoint.name}"), PartialState()
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)       # of a process that was killed
        folder.mkdir()
        for file in checkpoint.iterdir():
            if file.is_file() and not file.name.startswith("rng_state"):
                os.link(file, folder / file.name)       # no copy: among them may be all weights of the model
        convert(next(checkpoint.glob("global_step*")), folder)
    state.wait_for_everyone()
    try:
        yield folder
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def convert(step: Path, folder: Path) -> None:
    """DeepSpeed's own command, in this process."""
    from deepspeed.checkpoint.ds_to_universal import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(Namespace(input_folder=str(step), output_folder=str(folder / step.name), num_extract_workers=1, num_merge_workers=1,
                       keep_temp_folder=False, strict=True, inject_missing_state=True))
    (folder / "latest_universal").write_text(step.name, encoding="utf-8")
