"""An adapter added to the weights of its base, and safetensors written under the names of the base's files."""

import sys
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from training.licences import ExportError

SHARD = "5GB"
INDEX = "model.safetensors.index.json"
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def write_merged(base: Path, adapter: Path, out: Path) -> None:
    """The base's weights with the adapter in them, as safetensors.

    Raises:
        ExportError: base or adapter cannot be loaded, do not belong together, or other tensors were written than the base has.
    """
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
        raise ExportError(f"{base}: {' '.join(str(error).split())}") from error
    merged(model, adapter).save_pretrained(out, max_shard_size=SHARD)
    for path in out.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            path.unlink()                       # configurations, of which the base's own take the place
    written, wanted = tensors(out), tensors(base)
    if model.config.tie_word_embeddings:        # the same tensor as the embedding's, which some files hold twice
        wanted.pop("lm_head.weight", None)
    if differing := sorted({name for name, _ in written.items() ^ wanted.items()}):
        raise ExportError(f"{base}: {len(differing)} of its tensors would be written under other names, shapes or types, such "
                          f"as {differing[0]}; this version of transformers does not keep its layout")


def merged(model, adapter: Path):
    """The model, changed in place: each adapted weight and its change are summed in float32 and cast once to its own dtype.

    Raises:
        ExportError: the adapter cannot be loaded, has weights for modules that the model has not, or changes nothing.
    """
    from peft import get_peft_model_state_dict

    from modeling.adapters import WEIGHTS, load_adapter

    try:
        adapted = load_adapter(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"{adapter}: {' '.join(str(error).split())[:500]}") from error
    with safe_open(adapter / WEIGHTS, "pt") as file:
        unused = sorted(set(file.keys()) ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
    if unused:
        raise ExportError(f"{adapter}: {len(unused)} of its weights do not belong to this model, such as {unused[0]}")
    if not any(bool(parameter.any()) for name, parameter in adapted.named_parameters() if "lora_B" in name):
        raise ExportError(f"{adapter}: no LoRA weight of it changes the model")
    # PEFT loads adapters in float32, and a float32 tensor is added to a bfloat16 one in float32. Its safe_merge would round the
    # change alone first.
    return adapted.merge_and_unload(progressbar=sys.stderr.isatty(), safe_merge=False)


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of every tensor in a folder's safetensors, of which only the headers are read."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    one = file.get_slice(name)
                    found[name] = one.get_dtype(), tuple(one.get_shape())
        except SafetensorError as error:
            raise ExportError(f"{path}: {error}") from error
    return found


def dtype_of(folder: Path) -> str:
    """Of most of the folder's tensors."""
    (name, _), = Counter(kind for kind, _ in tensors(folder).values()).most_common(1)
    return TYPES.get(name, name)
