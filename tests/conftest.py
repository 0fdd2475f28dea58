"""Shared fixtures: a small random model of the real class, a few twins, and recipes that train on them.

Nothing here reaches the network, and everything that imports torch does so when a test asks for it.
"""

import gc
import os
from pathlib import Path

import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Qwen2.5-VL's added tokens: the first group is special, the second is not and yet never split.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "system You are a helpful assistant. user assistant Facts: Answer with one of the options. Answer briefly. "
    "What colour is the shape at A? Which way does the arrow point? red blue green yellow black white circle square "
    "triangle cross one two three four five six up down left right Is the number larger than the number at"
) * 3


def write_tiny(folder: Path) -> Path:
    """A random Qwen2.5-VL of 40 thousand parameters with tokenizer (stock chat template) and image processor."""
    import torch
    import trl
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen2_5_vl.jinja").read_text(
        encoding="utf-8"
    )
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 64).save_pretrained(folder)
    ids = {
        key: tokenizer.convert_tokens_to_ids(token)
        for key, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
            bos_token_id=pad,
            eos_token_id=end,
            pad_token_id=pad,
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
            window_size=112,
            patch_size=14,
        ),
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # At the usual 0.02, a model this small is nearly blind; larger weights make every input matter.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def pytest_collection_finish(session) -> None:
    """Trainers collect garbage at their end, which takes longer than a step where it goes through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a small random model; an absolute path, so that nothing asks the hub for it."""
    import torch

    torch.set_num_threads(1)
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def encoder(tiny):
    from data_prep.encode import Encoder

    return Encoder(tiny)


@pytest.fixture(scope="session")
def twins(tmp_path_factory) -> Path:
    """A folder of twins with train.jsonl (24 pictures) and test.jsonl (8)."""
    from data_prep.twins.__main__ import write

    folder = tmp_path_factory.mktemp("twins")
    write(folder, {"train": 24, "test": 8}, seed=0)
    return folder


def picture(width: int, height: int, seed: int = 0):
    """A picture of random pixels."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(
        np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def user(text: str, images: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def merged(base: dict, change: dict) -> dict:
    """`base` with the keys of `change`, nested mappings merged."""
    return {
        **base,
        **{
            key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
            for key, value in change.items()
        },
    }


@pytest.fixture
def recipe_file(tiny, twins, tmp_path):
    """Writes a mixture and a recipe, returns the recipe's path: recipe_file(steps=3, views={"vision": 1.0})."""

    def write(*, views=None, turns=1, problems=None, name="recipe", sources=None, **changes) -> Path:
        views = views or {"vision": 0.6, "both": 0.2, "text": 0.2}
        sources = sources or {
            "twins": {"problems": str(problems or twins / "train.jsonl"), "turns": turns, "views": views}
        }
        (tmp_path / f"{name}-mixture.yaml").write_text(yaml.safe_dump({"sources": sources}), encoding="utf-8")
        rank = {"rank": 4}
        values = {
            "name": name,
            "model": {"name": str(tiny), "dtype": "float32"},
            "data": {"mixture": f"{name}-mixture.yaml"},
            "lora": {"vision": rank, "merger": rank, "language": rank},
            "run_dir": str(tmp_path / "runs" / name),
            "optim": {"lr": {"vision": 1e-3, "merger": 1e-3, "language": 1e-3}, "schedule": "constant"},
            "steps": 2,
            "batch": 4,
            "micro_batch": 2,
            "log_every": 1,
            "save": {"every": 100},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(values, changes), sort_keys=False), encoding="utf-8")
        return path

    return write
