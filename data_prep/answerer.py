"""A model or an adapter as any user would load it, and ways to ask it: likelihood of choices or of an answer, and generation."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from data_prep.corrupt import corrupt_row
from data_prep.encode import MISSING_TOKEN, Encoded, Encoder
from data_prep.problem import Prompt
from data_prep.provenance import weights_fingerprint
from modeling.adapters import load_adapter


class ModelError(ValueError):
    """A model or adapter that cannot be loaded or asked."""


class Generated(NamedTuple):
    text: str
    tokens: int             # without the end-of-turn token
    finish: str             # "stop", or "length" when the token budget cut it off


class Answerer:
    """Model, adapter and encoder, ready to answer prompts in batches.

    Args:
        model: local folder or hub id.
        adapter: a PEFT adapter folder for it.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA, float32 elsewhere.

    Raises:
        ModelError: model or adapter cannot be loaded, or the adapter changes nothing, which is what one made for other module
            names looks like.
    """

    def __init__(self, model: str, adapter: str | None = None, *, revision: str | None = None, dtype: str = "auto",
                 min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = dtype
        self.name, self.adapter, self._revision = model, adapter, revision
        try:
            self.encoder = Encoder(model, revision=revision, min_pixels=min_pixels, max_pixels=max_pixels)
            self.model = AutoModelForImageTextToText.from_pretrained(model, revision=revision, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise ModelError(f"--model {model}: {' '.join(str(error).split())}") from error
        if adapter is not None:
            try:
                self.model = load_adapter(self.model, adapter)
            except (OSError, ValueError, RuntimeError) as error:
                raise ModelError(f"--adapter {adapter}: {' '.join(str(error).split())[:500]}") from error
            ups = [p for name, p in self.model.named_parameters() if "lora_B" in name]
            if not ups or not any(bool(p.any()) for p in ups):
                raise ModelError(f"{adapter}: no LoRA weight of it changes {model}; was it made for another model?")
        self.model.to(self.device).eval()
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if (mender := getattr(base, "mender", None)) is not None:
            if mender.slot_id != self.encoder.slot_id:
                raise ModelError(f"--adapter {adapter}: its slots are token {mender.slot_id}, those of {model} "
                                 f"{self.encoder.slot_id}")
            self.encoder.slots = mender.slots

    @classmethod
    def of(cls, args: Namespace) -> "Answerer":
        """From the options --model, --adapter, --revision, --dtype, --min-pixels and --max-pixels of a command."""
        return cls(args.model, args.adapter, revision=args.revision, dtype=args.dtype, min_pixels=args.min_pixels,
                   max_pixels=args.max_pixels)

    def identity(self) -> dict[str, Any]:
        """What scores depend on, to be recorded beside them: model and adapter with fingerprints, revision, dtype, pixels."""
        def fingerprint(folder: str | None) -> str | None:
            return weights_fingerprint(folder) if folder and Path(folder).is_dir() else None

        return {"model": self.name, "model_sha256": fingerprint(self.name),
                "revision": getattr(self.model.config, "_commit_hash", None) or self._revision,
                "adapter": self.adapter, "adapter_sha256": fingerprint(self.adapter),
                "dtype": self.dtype, "pixels": self.encoder.pixel_bounds}

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt as the model is shown it. ModelError: it is to be corrupted, and no token can stand for missing words."""
        row = self.encoder.encode(prompt.messages, prompt.images, generate=True)
        if prompt.corruption is None:
            return row
        if self.encoder.missing_id is None:
            raise ModelError(f"--model {self.name}: its tokenizer has no {MISSING_TOKEN} to stand for missing words")
        return corrupt_row(row, **prompt.corruption._asdict(), missing=self.encoder.missing_id, image_id=self.encoder.image_id,
                           merge=self.encoder.image_processor.merge_size)

    @torch.inference_mode()
    def likelihoods(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-likelihood of each prompt's choices, in their order.

        Where every choice is one token, that token's. Otherwise the sum over a choice's tokens and the end of the turn, so
        that no choice is the beginning of another.
        """
        rows, tails = [], []
        for prompt in prompts:
            encoded = self.encode(prompt)
            said = [self.encoder.text_ids(choice) for choice in prompt.choices]
            if all(len(ids) == 1 for ids in said):
                rows.append(encoded)
                tails.append([ids for ids in said])
                continue
            tails += [(*ids, self.encoder.end_id) for ids in said]
            rows += [_followed(encoded, ids) for ids in tails[-len(said):]]
        scores = iter(self._scores(rows, tails))
        found = []
        for prompt in prompts:
            first = next(scores)
            found.append(first if isinstance(first, list) else [first, *(next(scores) for _ in prompt.choices[1:])])
        return found

    @torch.inference_mode()
    def answer_log_probs(self, prompts: Sequence[Prompt]) -> list[float]:
        """Log-probability per token of each prompt's answer: the mean over its tokens and the end of the turn."""
        tails = [(*self.encoder.text_ids(prompt.answer), self.encoder.end_id) for prompt in prompts]
        rows = [_followed(self.encode(prompt), ids) for prompt, ids in zip(prompts, tails)]
        return [total / len(ids) for total, ids in zip(self._scores(rows, tails), tails)]

    def _scores(self, rows: list[Encoded], tails: list[list | tuple]) -> list[list[float] | float]:
        """Per row and tail: of a list of one-token choices each one's log-probability next, of a tuple of token ids, with which
        the row ends (but for the last), their sum."""
        keep = max(len(tail) if isinstance(tail, tuple) else 1 for tail in tails)
        logits = self.model(**self._batch(rows), use_cache=False, logits_to_keep=keep).logits.float().log_softmax(-1)
        return [logits[i, -1, [ids[0] for ids in tail]].tolist() if isinstance(tail, list)
                else logits[i, -len(tail):].gather(1, torch.tensor(tail, device=self.device)[:, None]).sum().item()
                for i, tail in enumerate(tails)]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int,
                 begun: Sequence[Sequence[int]] | None = None) -> list[Generated]:
        """Greedy answers.

        begun: token ids that each answer begins with. They are part of its text, and neither of its tokens nor of the budget.
        """
        begun = [tuple(ids) for ids in begun] if begun else [()] * len(prompts)
        rows = [_followed(self.encode(prompt), (*ids, self.encoder.end_id)) for prompt, ids in zip(prompts, begun)]
        batch = self._batch(rows)
        out = self.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None,
                                  top_k=None, eos_token_id=self.encoder.end_id, pad_token_id=self.encoder.pad_id)
        answers = []
        for first, ids in zip(begun, out[:, batch["input_ids"].shape[1]:].tolist()):
            end = ids.index(self.encoder.end_id) if self.encoder.end_id in ids else None
            said = ids[:end]
            text = self.encoder.tokenizer.decode([*first, *said], skip_special_tokens=True).strip()
            answers.append(Generated(text, len(said), "length" if end is None else "stop"))
        return answers

    def _batch(self, rows: list[Encoded]) -> dict[str, torch.Tensor]:
        batch = self.encoder.batch(rows, side="left")
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        return {key: value.to(self.device) for key, value in batch.items()}


def _followed(prompt: Encoded, said: tuple[int, ...]) -> Encoded:
    """A prompt with the tokens of an answer after it, but for the last, which nothing comes after."""
    return Encoded(np.concatenate([prompt.ids, said[:-1]]).astype(np.int64),
                   np.concatenate([prompt.trained, [False] * (len(said) - 1)]).astype(bool), prompt.pixel_values, prompt.grid)
