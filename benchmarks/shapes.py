"""Models of the real sizes with random weights, for measuring speed and memory where the real weights are not at hand.

    python -m benchmarks.shapes 3b --out runs/shapes/3b [--like assets/tiny]

Shapes are those of the published configurations of Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct. Tokenizer and
image processor come from a model folder at hand; their ids are small enough for either vocabulary.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights

from data_prep.encode import Encoder

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31],
          "window_size": 112, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2}
ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
TEXT = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}


def config(shape: str, encoder: Encoder) -> Qwen2_5_VLConfig:
    """The published configuration of a size, with the special tokens of the encoder's tokenizer."""
    ids = encoder.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = {**TEXT[shape], "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_parameters": ROPE,
            "eos_token_id": encoder.end_id, "pad_token_id": encoder.pad_id, "bos_token_id": encoder.pad_id}
    return Qwen2_5_VLConfig(text_config=text, vision_config={**VISION, "out_hidden_size": text["hidden_size"]},
                            tie_word_embeddings=text["tie_word_embeddings"], **dict(zip(names, ids)))


def random_model(shape: str, encoder: Encoder, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
                 ) -> Qwen2_5_VLForConditionalGeneration:
    """A model of the shape with weights drawn at the usual 0.02; norms stay 1 and biases 0."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = Qwen2_5_VLForConditionalGeneration(config(shape, encoder))
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    model.tie_weights()
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(TEXT))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--like", default="assets/tiny", help="folder of the tokenizer and image processor (default: %(default)s)")
    parser.add_argument("--no-weights", action="store_true", help="the configuration alone, enough for train.py --dry-run")
    args = parser.parse_args(argv)
    encoder = Encoder(args.like)
    if args.no_weights:
        config(args.shape, encoder).save_pretrained(args.out)
        said = "configuration"
    else:
        model = random_model(args.shape, encoder)
        model.save_pretrained(args.out)
        said = f"{sum(parameter.numel() for parameter in model.parameters()):,} random parameters"
    encoder.tokenizer.save_pretrained(args.out)
    encoder.image_processor.save_pretrained(args.out)
    print(f"{args.out}: {said}")


if __name__ == "__main__":
    main()
