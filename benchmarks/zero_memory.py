"""What the 3B and the 7B model need on each GPU under every DeepSpeed configuration: the table of ds_configs/README.md.

    python -m benchmarks.zero_memory [--check]      writes it; --check says whether it is out of date instead

Computed, not measured: training.estimate on the published shapes, for the ordinary recipe of each size.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.shapes import config
from data_prep.encode import Encoder
from training.config import load_recipe
from training.estimate import memory_gb, sharded_gb
from training.model import count_parameters, prepare
from training.sharding import rewrite, settings_of, stage_of

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "ds_configs" / "README.md"
RECIPES = {"3b": "recipes/qwen2_5_vl_3b/sft/full_text.yaml", "7b": "recipes/qwen2_5_vl_7b/sft/full_text.yaml"}
TOKENS = {"text_tokens": 250, "image_tokens": 512, "answer_tokens": 20}     # of a conversation: a long question, the largest picture
RANKS = (1, 2, 4, 8)
BLOCK = "memory under DeepSpeed"


def rows(shape: str) -> list[tuple[str, list[float]]]:
    """By configuration, GB on each GPU for 1, 2, 4 and 8 of them; at last, of the host for the whole machine with offload."""
    recipe = replace(load_recipe(ROOT / RECIPES[shape]), micro_batch=1)
    with torch.device("meta"):
        base = Qwen2_5_VLForConditionalGeneration(config(shape, Encoder(ROOT / "assets/tiny")))
    model = prepare(base.to(torch.bfloat16).requires_grad_(False), recipe)
    counts = count_parameters(model)
    trained = sum(numbers["trained"] for numbers in counts.values())
    frozen = sum(numbers["total"] for numbers in counts.values()) - trained
    kinds = memory_gb(model, recipe, **TOKENS)
    batch = kinds["activations"] + kinds["logits of answers"]
    found = []
    for name in ("none", "zero1", "zero2", "zero3", "zero3_offload"):
        stage = 0 if name == "none" else stage_of(settings_of(ROOT / "ds_configs" / f"{name}.json"))
        offload = name == "zero3_offload"
        found.append((name, [sum(sharded_gb(frozen, trained, size=2, stage=stage, ranks=ranks, offload=offload).values()) + batch
                             for ranks in RANKS]))
    host = sharded_gb(frozen, trained, size=2, stage=0, ranks=1)
    return [*found, ("host", [host["weights"] + host["optimizer"]] * len(RANKS))]


def table() -> list[str]:
    """Lines of Markdown."""
    lines = ["| model | configuration | " + " | ".join(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in RANKS) + " |",
             "|---|---|" + "---:|" * len(RANKS)]
    for shape in RECIPES:
        for name, values in rows(shape):
            shown = {"none": "without DeepSpeed", "host": "memory of the host with `zero3_offload.json`"}.get(name, f"`{name}.json`")
            lines.append(f"| {shape.upper()} | {shown} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    rewrite(DOCUMENT, BLOCK, table(), check=args.check)


if __name__ == "__main__":
    main()
