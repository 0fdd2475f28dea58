"""Adapter folders: what PEFT writes, and beside it what it does not know.

    adapter_config.json, adapter_model.safetensors      PEFT's
    extras.json         {"token_lora": true}: LoRA by token type (modeling.token_lora)
                        {"mender": {settings}}: further modules (modeling.mender), whose weights are in mender.safetensors

A folder without extras.json is an ordinary PEFT adapter, and loads as one.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modeling.token_lora import TokenLoraConfig, connect, has_token_lora

EXTRAS = "extras.json"
MENDER = "mender.safetensors"
WEIGHTS = "adapter_model.safetensors"       # PEFT's name
KINDS = {"token_lora": bool, "mender": dict}


def load_adapter(base: nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """The base, changed in place, with all that an adapter folder (or a hub id) holds.

    PEFT alone would load a folder with LoRA by token type, leave out the weights for image tokens without a word, and treat
    image tokens as text. What it does say is a warning about the key `token_lora` in adapter_config.json, which is there for
    that. Here, a folder whose weights and extras.json do not belong together is an error.

    Raises:
        ValueError: extras.json or the weights beside it are missing, damaged, of a newer version, or do not fit.
        OSError, RuntimeError: PEFT cannot read the folder, or its weights do not fit.
    """
    folder = _local(folder)
    extras = read_extras(folder)
    _check_weights(folder, bool(extras.get("token_lora")))
    config = _token_config(folder) if extras.get("token_lora") else None
    if "mender" in extras:
        from modeling.mender import attach

        attach(base, extras["mender"])
        load_mender(base, folder)
    model = PeftModel.from_pretrained(base, str(folder), config=config, is_trainable=trainable)
    if "mender" in extras:
        base.mender.requires_grad_(trainable)       # PEFT freezes what is not its own
    return connect(model) if has_token_lora(model) else model


def read_extras(folder: str | Path) -> dict[str, Any]:
    """What extras.json says; nothing where there is none. ValueError names the file and what is wrong with it."""
    path = Path(folder) / EXTRAS
    if not path.exists():
        return {}
    try:
        extras = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(extras, dict):
        raise ValueError(f"{path}: a mapping is needed")
    for key, value in extras.items():
        if key not in KINDS:
            raise ValueError(f"{path}: {key}: is not known here; a newer version of this software is needed for this adapter")
        if not isinstance(value, KINDS[key]):
            raise ValueError(f"{path}: {key}: must be {'true or false' if KINDS[key] is bool else 'a mapping'}, not {value!r}")
    return extras


def save_extras(model: nn.Module, folder: str | Path) -> None:
    """Write extras.json and mender.safetensors beside an adapter that PEFT has written; nothing where the model has neither."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    mender = getattr(base, "mender", None)
    extras: dict[str, Any] = {"token_lora": True} if has_token_lora(model) else {}
    if mender is not None:
        extras["mender"] = mender.settings
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in mender.state_dict().items()}
        save_file(weights, Path(folder) / MENDER)
    if extras:
        (Path(folder) / EXTRAS).write_text(json.dumps(extras, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_mender(model: nn.Module, folder: str | Path) -> None:
    """Put the weights of mender.safetensors into the model's mender. ValueError: the file is missing or does not fit."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    path = Path(folder) / MENDER
    try:
        base.mender.load_state_dict(load_file(path), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: {'is missing' if not path.exists() else ' '.join(str(error).split())}") from error


def _local(folder: str | Path) -> Path:
    """The folder itself, or of a hub id the folder of what is downloaded. PEFT says what is wrong where there is neither."""
    if Path(folder).exists():
        return Path(folder)
    try:
        return Path(snapshot_download(str(folder), allow_patterns=["adapter_*", EXTRAS, MENDER]))
    except (OSError, ValueError):
        return Path(folder)


def _check_weights(folder: Path, token_lora: bool) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt") as file:
            there = any(".lora_A_image." in name for name in file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    if there != token_lora:
        raise ValueError(f"{path}: has {'weights' if there else 'no weights'} for image tokens, but {folder / EXTRAS} "
                         f"{'does not say' if there else 'says'} token_lora; was a part of the folder copied or lost?")


def _token_config(folder: Path) -> TokenLoraConfig:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{path}: is missing")
    values = PeftConfig.from_json_file(str(path))
    values.pop("token_lora", None)
    config = PeftConfig.from_peft_type(**values)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path}: {EXTRAS} says token_lora, but this is no LoRA")
    return TokenLoraConfig(**{field.name: getattr(config, field.name) for field in fields(config) if field.init})


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)
