"""From a recipe to its trainer: supervised on a mixture of problems, or on preferences when it has them."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from data_prep.encode import Encoder
from training import sharding
from training.balance.methods import check, showing_of
from training.collate import Collator
from training.collate_pairs import PairCollator
from training.config import Recipe, RecipeError
from training.model import load_base
from training.plan import Plan
from training.preference_trainer import VisionDPOTrainer, dpo_arguments
from training.trainers import VisionSFTTrainer, sft_arguments


def arguments_of(recipe: Recipe, *, world_size: int = 1, deepspeed: str | dict | None = None) -> TrainingArguments:
    """The recipe in its trainer's words.

    Raises:
        RecipeError: the batch cannot be divided over the ranks, the library refuses a value, or the recipe cannot be trained this
            way.
    """
    check(recipe, deepspeed=deepspeed is not None)
    if deepspeed is not None:
        if reason := sharding.refusal(recipe, sharding.stage_of(sharding.settings_of(deepspeed))):
            raise RecipeError(reason)
        sharding.begin()
    arguments = sft_arguments if recipe.preference is None else dpo_arguments
    try:
        return arguments(recipe, Path(recipe.run_dir), world_size=world_size, deepspeed=deepspeed)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def build_trainer(recipe: Recipe, plan: Plan, encoder: Encoder, model: nn.Module, args: TrainingArguments,
                  callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """The trainer of a recipe.

    Args:
        model: what training.model.prepare gives.
        args: what `arguments_of` gives.

    Raises:
        RecipeError: the library refuses the preference's terms, or several ranks could not be trained on its pairs.
    """
    if recipe.preference is None:
        collator = Collator(plan, encoder, [stage.objective for stage in plan.stages], balance=recipe.active_balance,
                            showing=showing_of(recipe, encoder))
        return VisionSFTTrainer(model, recipe, collator, args, callbacks=list(callbacks))
    reference = load_base(recipe.model) if recipe.lora is None else None
    try:
        return VisionDPOTrainer(model, recipe, PairCollator(plan, encoder, recipe), args, callbacks=list(callbacks), reference=reference)
    except RecipeError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"preference: {' '.join(str(error).split())}") from error
