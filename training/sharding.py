"""DeepSpeed's ZeRO: how a run under it begins, what cannot be trained under it, and what sharding saves.

Stage 1 shares the optimizer's state out over the ranks, stage 2 the gradients as well, stage 3 the weights too: there every rank
holds a part of each weight and gathers the rest for the moment in which a module runs. Gathering is a collective, so under stage 3
all ranks must run the same modules in the same order, whatever their batches hold.
"""

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from modeling.adapters import read_extras
from training.config import Recipe, RecipeError


def settings_of(path: str | Path | dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration file, or what was read from one. RecipeError: it cannot be read, or holds what recipes decide."""
    if isinstance(path, dict):
        return path
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--deepspeed: {path}: cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"--deepspeed: {path}: a JSON object is needed")
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise RecipeError(f"--deepspeed: {path}: {section}: the recipe's `optim` decides this, with a rate per tower; leave the "
                              "section out")
    if stage_of(settings) not in range(4):
        raise RecipeError(f"--deepspeed: {path}: zero_optimization.stage: 0 to 3, not {stage_of(settings)!r}")
    return settings


def stage_of(settings: dict[str, Any]) -> int:
    """0 to 3."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def refusal(recipe: Recipe, stage: int) -> str | None:
    """Why a recipe cannot be trained under a stage; None where it can. What balance methods refuse: training.balance.methods."""
    balance = recipe.active_balance
    if recipe.guard.non_finite == "skip":
        return ("guard.non_finite: skip cannot be kept under DeepSpeed, which makes the optimizer's step before the gradient's norm "
                "is known; use stop")
    if recipe.optim.name == "adamw_8bit":
        return "optim.name: adamw_8bit is for one GPU; ZeRO shares the moments out over the ranks instead, so use adamw"
    if stage < 3:
        return None
    if recipe.model.quantize is not None:
        return "model.quantize: quantised weights cannot be shared out, as ZeRO-3 does; use ZeRO-2"
    if balance is not None and balance.modules() is not None:
        return (f"balance: the modules that {balance.method} adds to the model are neither saved nor loaded in parts, as ZeRO-3 has "
                "them; use ZeRO-2")
    adapter = recipe.model.adapter
    if adapter is not None and Path(adapter).is_dir() and "mender" in read_extras(adapter):
        return f"model.adapter: {adapter} has modules that are neither saved nor loaded in parts, as ZeRO-3 has them; use ZeRO-2"
    if recipe.preference is not None and recipe.preference.reference == "ahead":
        return ("preference.reference: ahead cannot be computed under ZeRO-3, which has the model in parts before training begins; "
                "use live, or ZeRO-2")
    return None


def ranks_of(checkpoint: Path) -> int:
    """How many ranks wrote a checkpoint under ZeRO; 0: it was written without."""
    return len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))


def check_checkpoint(checkpoint: Path, deepspeed: str | None, ranks: int) -> None:
    """Whether a run can continue from a checkpoint in this way: one without the optimizer's state as it is looked for would be
    continued without a word, with fresh moments.

    Raises:
        RecipeError: it was written with DeepSpeed and is to be continued without or the other way round, in parts and is to be
            continued whole or the other way round, or in parts by another number of ranks.
    """
    wrote = ranks_of(checkpoint)
    stage = 0 if deepspeed is None else stage_of(settings_of(deepspeed))
    if bool(wrote) != (stage > 0):
        raise RecipeError(f"{checkpoint} was written {'under' if wrote else 'without'} DeepSpeed's ZeRO: continue with"
                          f"{' --deepspeed' if wrote else 'out it'}")
    if wrote and (stage == 3) != any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt")):
        raise RecipeError(f"{checkpoint} was written {'without' if stage == 3 else 'under'} ZeRO-3: continue so")
    if stage == 3 and wrote != ranks:
        raise RecipeError(f"{checkpoint} was written by {wrote} ranks under ZeRO-3, whose parts fit no other number: continue with as "
                          f"many, not {ranks}")


def begin() -> None:
    """Let the ranks find each other, before the trainer's arguments are made and anything is loaded."""
    if "RANK" not in os.environ:        # started without a launcher: a world of one, which DeepSpeed would look for with MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not torch.cuda.is_available():
        # On a CPU accelerate sets up torch's process group only; without DeepSpeed's own, from_pretrained would share the weights
        # out over one rank.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False      # is compiled for a minute, and serves inference only
        deepspeed.init_distributed("gloo")


def gathers(arguments: TrainingArguments) -> bool:
    """Whether weights lie in parts on the ranks, which must then run the same modules in the same order."""
    plugin = arguments.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, of a part under ZeRO-3 as of a whole one."""
    return getattr(parameter, "ds_shape", parameter.shape)


def rewrite(document: Path, what: str, lines: Sequence[str], *, check: bool) -> None:
    """Put lines between `<!-- generated: WHAT -->` and `<!-- end -->`, or only look. SystemExit: they are not the same, and `check`;
    or there is no such place."""
    text = document.read_text(encoding="utf-8")
    before, mark, rest = text.partition(f"<!-- generated: {what} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise SystemExit(f"error: {document} has no block '{what}'")
    fresh = before + mark + "\n".join(["", *lines, "", end]) + after
    if fresh != text:
        if check:
            raise SystemExit(f"out of date: {document.name}: the block '{what}'")
        document.write_text(fresh, encoding="utf-8", newline="\n")


def config_of(given: str | None) -> str | None:
    """The DeepSpeed configuration of a run: the one that was given, or the one that `accelerate launch` was told of.

    Raises:
        RecipeError: accelerate is to use DeepSpeed, but with settings of its own instead of a file.
    """
    if given is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("1", "true", "yes"):
        return given
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is None or not Path(file).is_file():
        raise RecipeError("accelerate is set up for DeepSpeed without a file: let deepspeed_config_file of its configuration name one of "
                          "ds_configs/, or give --deepspeed")
    return file
