"""Build the embedded model: the real Qwen2.5-VL class with 1.7 million parameters, from a seed.

    python -m training.tiny --out assets/tiny

Pre-trained as real ones are: language first (facts in words, from two things to five), then mostly pictures with text that
repeats them, so that it ends with the gap that the recipes are about. Everything else is the ordinary engine: the trainer, the
collator and the prompts of every other run.
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_prep.encode import Encoder
from data_prep.problem import OPEN_TAIL, RENDERED_TEXT, TAIL, Problem, View, render
from data_prep.provenance import parents, write_json
from data_prep.twins.drills import DESCRIBE, drills, in_any_order
from data_prep.twins.questions import KINDS, Balance, ask
from data_prep.twins.worlds import FAMILIES, LEVELS, World, draw, sample_world
from training.callbacks import MarkComplete, Metrics, last_checkpoint
from training.collate import Collator
from training.config import Data, Model, Optim, Recipe, Save, TowerRates
from training.trainers import VisionSFTTrainer, sft_arguments

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
                  "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>")
# Where Qwen2's tokenizer cuts text before merging bytes.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Writes the same text as Qwen2.5-VL's template for messages with text and pictures.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
QUESTIONS_PER_PICTURE = 6


class Stage(NamedTuple):
    """One stage of pre-training. `rates`: how a world is shown; `copy` and `describe` ask for the facts, in words or in pixels."""
    name: str
    steps: int
    batch: int
    lr: float
    rates: dict[str, float]
    levels: int             # hardest level at the start; it rises by one with the share of right tokens
    schedule: str = "constant_with_warmup"
    warmup: int = 50


STAGES = (
    Stage("language", 800, 48, 3e-3, {"text": 0.75, "copy": 0.25}, levels=2),
    Stage("pictures", 100, 48, 2e-3, {"describe": 0.5, "both": 0.35, "text": 0.15}, levels=4),
    Stage("both", 300, 48, 2e-3, {"both": 0.7, "text": 0.2, "describe": 0.1}, levels=4, schedule="cosine"),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the twins' own words, with Qwen's special tokens and chat template."""
    rng, balance = random.Random("tokenizer"), Balance()
    lines = ["system\n", "user\n", "assistant\n", "You are a helpful assistant.", *TAIL.values(), OPEN_TAIL, RENDERED_TEXT,
             *DESCRIBE.values(), "true", "false", "none", "Options: true, false"] * 50
    for number in range(3000):
        world = sample_world(rng, FAMILIES[number % 4], rng.choice(LEVELS), "train")
        for problem in _problems(world, rng, balance, number):
            prompt = render(problem, View.text)
            lines += [prompt.messages[0]["content"][0]["text"], prompt.answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=1000, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")])
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Five language layers of width 128, three vision blocks of width 96, the last of them with full attention."""
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"))}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 15) // 16 * 16, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
            "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        vision_config={
            "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128,
            "fullatt_block_indexes": [2], "window_size": 112, "patch_size": 14},
        tie_word_embeddings=True, **ids)


def _problems(world: World, rng: random.Random, balance: Balance, number: int) -> list[Problem]:
    """Up to six questions about a world, as problems without a file: the stream draws the picture itself."""
    kinds = [*KINDS, "lookup"]
    rng.shuffle(kinds)
    questions: list[tuple[str, str, tuple[str, ...] | None]] = [
        (question.text, question.answer, question.options) for question in ask(world, rng, balance, tuple(kinds))]
    extra = list(drills(world, rng))
    questions += [(text, answer, None) for text, answer in rng.sample(extra, 2)]
    rng.shuffle(questions)
    return [_problem(world, f"{number}-{i}", *question) for i, question in enumerate(questions[:QUESTIONS_PER_PICTURE])]


def _problem(world: World, name: str, text: str, answer: str, options: tuple[str, ...] | None = None) -> Problem:
    return Problem(id=name, group=name, source=world.family, image=None, facts=world.facts, question=text, options=options,
                   answer=answer, license="CC0-1.0", meta={"answer_with": "text"})


class TwinStream:
    """An endless mixture of fresh worlds: conversation n is a function of the seed, n and the level reached."""

    branch_probe = gap_probe = None         # nothing is held out from it

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.seed, self.level = stage, seed, stage.levels

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch

    def draw(self, number: int) -> int:
        return number

    def ids(self, number: int) -> tuple[str, ...]:
        return (f"{self.stage.name}-{number}",)

    def world(self, number: int) -> World:
        return self._sample(number)[1]

    def _sample(self, number: int) -> tuple[str, World, random.Random]:
        rng = random.Random(f"{self.seed} {self.stage.name} {number}")
        way = rng.choices(list(self.stage.rates), list(self.stage.rates.values()))[0]
        return way, sample_world(rng, rng.choice(FAMILIES), rng.randint(1, self.level), "train"), rng

    def conversation(self, number: int) -> tuple[list[dict], tuple, list]:
        way, world, rng = self._sample(number)
        if way in ("copy", "describe"):
            text = DESCRIBE["facts" if way == "copy" else "picture"]
            content = [{"type": "text", "text": f"Facts: {world.facts}\n{text}" if way == "copy" else text}]
            answer = in_any_order(world, rng) if way == "copy" else world.facts
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        else:
            messages = []
            for turn, problem in enumerate(_problems(world, rng, Balance(), number)):
                prompt = render(problem, View.text if turn == 0 and way in ("text", "both") else View.blind)
                messages += [*prompt.messages, {"role": "assistant", "content": prompt.answer}]
        if way in ("text", "copy"):
            return messages, (), []
        messages[0]["content"].insert(0, {"type": "image"})
        return messages, (draw(world),), []


class Curriculum(TrainerCallback):
    """Raises the level of the stream when `goal` of the trained tokens are predicted right, and keeps a record for resuming."""

    def __init__(self, stream: TwinStream, goal: float, path: Path) -> None:
        self.stream, self.goal, self.path = stream, goal, path
        self.raised: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}     # step -> level

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.raised = {step: level for step, level in self.raised.items() if int(step) <= state.global_step}
        self.stream.level = max([self.stream.level, *self.raised.values()])

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and logs.get("token_accuracy", 0) > self.goal and self.stream.level < LEVELS[-1]:
            self.stream.level += 1
            self.raised[str(state.global_step)] = self.stream.level
            write_json(self.path, self.raised)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on the matrices of hidden layers and AdamW on everything else, as one optimizer.

    From random weights it seemed to leave this model's plateaus sooner than AdamW alone (one run each, so no more than a choice).
    """

    def __init__(self, model: torch.nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if hidden else others).append(parameter)
        self.parts = (torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=betas))
        for part, tower in zip(self.parts, ("matrices", "others")):
            part.param_groups[0]["tower"] = tower
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, values in zip(self.parts, state["parts"]):
            part.load_state_dict(values)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class TinyTrainer(VisionSFTTrainer):
    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optim = self.recipe.optim
            self.optimizer = MuonAndAdamW(self.model, lr=optim.lr.language, weight_decay=optim.weight_decay, betas=tuple(optim.betas))
        return self.optimizer


def pretrain(stage: Stage, start: Path, out: Path, seed: int) -> None:
    """One stage: all weights, from the model in `start` to `out`; resumable."""
    if (out / "model.safetensors").exists():
        print(f"{out} is there already")
        return
    run_dir = out.with_name(f"{out.name}.run")
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        name=stage.name, model=Model(name=str(start), dtype="float32"), data=Data(mixture="twins, drawn as needed"), lora=None,
        optim=Optim(lr=TowerRates(*[stage.lr] * 3), schedule=stage.schedule, warmup_steps=stage.warmup, weight_decay=0.01,
                    betas=[0.9, 0.95]),
        steps=stage.steps, batch=stage.batch, micro_batch=stage.batch, seed=seed, save=Save(every=50), log_every=25)
    transformers.set_seed(seed)
    encoder = Encoder(start)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    stream = TwinStream(stage, seed)
    trainer = TinyTrainer(model, recipe, Collator(stream, encoder), sft_arguments(recipe, run_dir), callbacks=[
        MarkComplete(), Metrics(run_dir / "metrics.jsonl", stage.batch), Curriculum(stream, 0.88, run_dir / "level.json")])
    checkpoint = last_checkpoint(run_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    save_folder(model, encoder, out)


def save_folder(model: Any, encoder: Any, out: Path) -> None:
    model.save_pretrained(out)
    encoder.tokenizer.save_pretrained(out)
    encoder.image_processor.save_pretrained(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.tiny", description="Build the embedded model from a seed.")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny"))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="stages and checkpoints; the same command continues")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    start = args.work / "random"
    if not (start / "model.safetensors").exists():
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(start)
        Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280).save_pretrained(start)
        transformers.set_seed(args.seed)
        save_folder(Qwen2_5_VLForConditionalGeneration(build_config(tokenizer)), Encoder(start), start)
    for stage in STAGES:
        pretrain(stage, start, args.work / stage.name, args.seed)
        start = args.work / stage.name
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    save_folder(model, Encoder(start), args.out)
    write_json(args.out / "build.json", {**parents(), "seed": args.seed, "stages": [stage._asdict() for stage in STAGES],
                                         "parameters": sum(p.numel() for p in model.parameters())})
    print(f"{args.out} is written")


if __name__ == "__main__":
    main()
