"""What differs between the recipe that a run began with and the one that it is to be continued with, and what of it cannot."""

from typing import Any

from training.config import TOWERS, Recipe

ALLOW = "to continue it changed all the same, add --allow-changes"      # ends a refusal of what may be allowed


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """By key, with dots: its old and its new value, None where there is none. Both are plain YAML values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {name: change for key in sorted({*old, *new}, key=str)
                for name, change in differences(old.get(key), new.get(key), f"{prefix}.{key}".strip(".")).items()}
    return {} if old == new else {prefix: {"old": old, "new": new}}


def fixed(old: Recipe, new: Recipe) -> str | None:
    """Why no checkpoint of `old` can be continued as `new`: its weights or moments would be of something else. None where it can."""
    for key in ("name", "revision", "quantize", "adapter"):
        before, after = getattr(old.model, key), getattr(new.model, key)
        if before != after:
            return f"model.{key}: the weights were learned on another base model ({before} then, {after} now)"
    if (old.lora is None) != (new.lora is None):
        return f"lora: {'a LoRA was' if old.lora else 'all weights were'} trained, and the other has no checkpoint"
    if [*filter(old.trains, TOWERS)] != [*filter(new.trains, TOWERS)]:
        return (f"{', '.join(filter(old.trains, TOWERS))} was trained, and now {', '.join(filter(new.trains, TOWERS))} would be: the "
                "optimizer knows only those that it began with")
    if old.lora is not None:
        for tower in filter(old.trains, TOWERS):
            before, after = getattr(old.lora, tower), getattr(new.lora, tower)
            if _scale(before) != _scale(after):
                return f"lora.{tower}: rank and alpha belong to the weights that were learned (rank {before.rank} then, {after.rank} now)"
        if old.lora.by_token != new.lora.by_token:
            return "lora.by_token: the weights that were learned are of the other kind"
    if old.optim.name != new.optim.name:
        return f"optim.name: the moments of {old.optim.name} are not those of {new.optim.name}"
    if (old.preference is None) != (new.preference is None):
        return ("preference: learning from problems and from pairs have different references; begin a run of its own from this one with "
                "model.adapter, or a pipeline")
    return _balance(old, new)


def _scale(rank: Any) -> tuple[int, float]:
    return rank.rank, 2 * rank.rank if rank.alpha is None else rank.alpha


def _balance(old: Recipe, new: Recipe) -> str | None:
    before, after = old.active_balance, new.active_balance
    if (before and before.modules()) != (after and after.modules()):
        return "balance: the modules that a method adds to the model have weights and optimizer groups of their own"
    if after is not None and (before is None or before.method != after.method):
        return f"balance.method: a run cannot go on with {after.method}, which remembers what it saw since the beginning"
    return None
