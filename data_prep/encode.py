"""From chat messages to tensors: the only place where text becomes tokens and pictures become pixels.

Training and evaluation share it, so an item has the same tokens in both. Three rules:

* Text from data stays text. The chat template is filled with markers and cut at them; only the template's own pieces may
  hold special tokens, while data is tokenised by a twin of the tokenizer that knows no special token at all. A question
  that contains `<|image_pad|>` gets no image slot.
* What is trained is decided by position, not by searching: the tokens of each assistant turn and the end-of-turn token
  that closes it. Prompt and image tokens are never trained.
* Pictures go through the model's image processor on PIL (no torchvision needed).

What may be corrupted is decided by position too: `Encoded.open` marks the tokens of facts and questions, which texts made by
data_prep.problem know. Places for what a model itself puts into the prompt (`Encoder.slots`) are left here and nowhere else.
"""

import json
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

IMAGE_TOKEN = "<|image_pad|>"
END_OF_TURN = "<|im_end|>"
# Qwen's tokens for quadrangles, which no prompt of ours holds and no text can spell; the embedding has rows for them.
SLOT_TOKEN, MISSING_TOKEN = "<|quad_start|>", "<|quad_end|>"
_MARK = re.compile("\ue000(\\d+)\ue001")        # private-use characters around the number of a text


@dataclass(frozen=True)
class Encoded:
    """One conversation. ids, trained: (tokens,); pixel_values: (patches, 3 * 2 * 14 * 14) float32 or None; grid: (images, 3).

    open: (tokens,) bool, True on tokens that lie entirely in facts or question; None where nobody asked.
    """
    ids: np.ndarray
    trained: np.ndarray
    pixel_values: np.ndarray | None
    grid: np.ndarray | None
    open: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Tokenizer and image processor of one model folder or hub id.

    Args:
        name: local folder or hub id.
        revision: branch, tag or commit of a hub id.
        min_pixels, max_pixels: bounds on a picture's area after resizing; None keeps the model's own.

    Attributes:
        slots: how many tokens `slot_id` stand before the first text of a user, after the pictures that stand before it; 0 by
            default. A model with a `mender` (modeling.mender) fills them.
        longest: tokens that the model has positions for; without a bound until someone sets it.
        slot_id, missing_id: the tokens of slots and of corrupted text; None where the tokenizer has no such tokens.

    Raises:
        ValueError: the tokenizer has no chat template or lacks Qwen's image token.
    """

    def __init__(self, name: str | Path, *, revision: str | None = None, min_pixels: int | None = None,
                 max_pixels: int | None = None) -> None:
        bounds = {k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None}
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        self.image_processor: Qwen2VLImageProcessorPil = AutoImageProcessor.from_pretrained(
            name, revision=revision, backend="pil", **bounds)
        for key, size in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if key in bounds and getattr(self.image_processor.size, size) != bounds[key]:
                raise ValueError(f"{name}: the image processor ignored {key}={bounds[key]}")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{name}: the tokenizer has no chat template")
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_id = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        if None in (self.image_id, self.end_id) or self.tokenizer.unk_token_id in (self.image_id, self.end_id):
            raise ValueError(f"{name}: the tokenizer has no {IMAGE_TOKEN} or {END_OF_TURN}; a Qwen2-VL family model is needed")
        self.slots, self.longest = 0, sys.maxsize
        self.slot_id, self.missing_id = map(self._special, (SLOT_TOKEN, MISSING_TOKEN))
        self.pad_id = self.tokenizer.pad_token_id
        if self.pad_id is None:
            raise ValueError(f"{name}: the tokenizer has no padding token")
        plain = json.loads(self.tokenizer.backend_tokenizer.to_str())
        plain["added_tokens"] = []
        plain["post_processor"] = None
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._remember()

    def _special(self, token: str) -> int | None:
        return self.tokenizer.get_added_vocab().get(token)

    def _remember(self) -> None:
        self._template_ids = lru_cache(maxsize=4096)(self._template_ids)
        self._spelled = lru_cache(maxsize=65536)(self._spelled)

    def __getstate__(self) -> dict:
        """Without the caches, which cannot be pickled: workers that are spawned and not forked get a copy of the encoder."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_template_ids", "_spelled")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._remember()

    @property
    def pixel_bounds(self) -> dict[str, int]:
        return {"min": self.image_processor.size.shortest_edge, "max": self.image_processor.size.longest_edge}

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, in which nothing is a special token."""
        return self._spelled(str(text))[0]

    def _spelled(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Token ids of plain text and, for each, the (start, end) of its characters."""
        found = self._plain.encode(text, add_special_tokens=False)
        return tuple(found.ids), tuple(found.offsets)

    def _open(self, text: str) -> list[bool]:
        """Which of the text's tokens lie entirely in one of the ranges that it knows to be facts or question."""
        ranges = getattr(text, "open", ())
        return [any(low <= start and end <= high for low, high in ranges) for start, end in self._spelled(str(text))[1]]

    def _template_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, messages: list[dict], images: tuple[Image.Image, ...] = (), *, generate: bool = False,
               pixels: tuple[list[np.ndarray], list[np.ndarray]] | None = None) -> Encoded:
        """Encode a conversation.

        Args:
            messages: chat messages, content a string or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
            images: RGB pictures in the order of the image parts.
            generate: end with the opening of an assistant turn, for scoring or generating an answer.
            pixels: what `pixels` gave for these images, where several rows show them.

        Raises:
            ValueError: the number of pictures is not the number of image parts; there are slots, and no text of a user or no
                token for them.
        """
        texts: list[tuple[str, bool]] = []
        before: int | None = None           # the text that the slots stand before

        def mark(text: str, role: str) -> str:
            nonlocal before
            if before is None and role == "user":
                before = len(texts)
            texts.append((text, role == "assistant"))
            return f"\ue000{len(texts) - 1}\ue001"

        marked = []
        for message in messages:
            role, content = message["role"], message["content"]
            if isinstance(content, str):
                content = mark(content, role)
            else:
                content = [{"type": "text", "text": mark(part["text"], role)} if part["type"] == "text" else part
                           for part in content]
            marked.append({"role": role, "content": content})
        text = self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generate)

        if self.slots and None in (self.slot_id, before):
            raise ValueError(f"{self.slots} slots, but " + ("no user says a text to put them before" if before is None else
                                                            f"the tokenizer has no {SLOT_TOKEN}"))

        patches, grids = self.pixels(images) if pixels is None else pixels
        slots = iter([int(grid.prod()) // self.image_processor.merge_size ** 2 for grid in grids])
        ids: list[int] = []
        trained: list[bool] = []
        open: list[bool] = []
        closing = False                     # the next end-of-turn token closes an assistant turn
        for i, piece in enumerate(_MARK.split(text)):
            if i % 2:
                words, closing = texts[int(piece)]
                piece_ids = self.text_ids(words)
                if self.slots and int(piece) == before:
                    ids += [self.slot_id] * self.slots
                    trained += [False] * self.slots
                    open += [False] * self.slots
                ids += piece_ids
                trained += [closing] * len(piece_ids)
                open += self._open(words)
                continue
            for token in self._template_ids(piece):
                count = 1
                if token == self.image_id:
                    count = next(slots, 0)
                    if not count:
                        raise ValueError(f"{len(images)} pictures for more than {len(images)} image parts")
                ids += [token] * count
                trained += [closing and token == self.end_id] * count
                open += [False] * count
                closing = closing and token != self.end_id
        if next(slots, None) is not None:
            raise ValueError(f"{len(images)} pictures, but fewer image parts in the messages")
        return Encoded(np.asarray(ids, dtype=np.int64), np.asarray(trained, dtype=bool),
                       np.concatenate(patches) if patches else None, np.asarray(grids, dtype=np.int64) if grids else None,
                       np.asarray(open, dtype=bool))

    def pixels(self, images: tuple[Image.Image, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Patches (patches, 3 * 2 * 14 * 14) and grid (t, h, w) of each picture, equal to the image processor's own."""
        processor = self.image_processor
        factor = processor.patch_size * processor.merge_size
        patches, grids = [], []
        for image in images:
            size = smart_resize(image.height, image.width, factor, processor.size.shortest_edge, processor.size.longest_edge)
            if size == (image.height, image.width) and image.mode == "RGB":
                # Already on the grid: skip the processor's generic checks, which cost ten times the arithmetic.
                array = np.asarray(image, dtype=np.float32) * np.float32(processor.rescale_factor)
                array = (array - np.float32(processor.image_mean)) / np.float32(processor.image_std)
                flat, h, w = processor.patchify(array.transpose(2, 0, 1), processor.patch_size, processor.merge_size,
                                                processor.temporal_patch_size)
                patches.append(flat)
                grids.append(np.array([1, h, w]))
            else:
                out = processor([image], return_tensors="np")
                patches.append(out["pixel_values"])
                grids.append(out["image_grid_thw"][0])
        return patches, grids

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens that a picture of this size takes in the language tower."""
        processor = self.image_processor
        factor = processor.patch_size * processor.merge_size
        h, w = smart_resize(height, width, factor, processor.size.shortest_edge, processor.size.longest_edge)
        return h * w // factor ** 2

    def batch(self, rows: list[Encoded], *, side: str = "right") -> dict[str, torch.Tensor]:
        """Pad rows to one batch: input_ids, attention_mask, mm_token_type_ids (batch, tokens), pixel_values, image_grid_thw.

        mm_token_type_ids is 1 on image tokens. It is always there: without it the model silently falls back to
        one-dimensional positions.
        """
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            ids[i, place], mask[i, place] = row.ids, 1
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
                 "mm_token_type_ids": torch.from_numpy(((ids == self.image_id) & (mask == 1)).astype(np.int64))}
        if any(row.grid is not None for row in rows):
            batch["pixel_values"] = torch.from_numpy(np.concatenate([r.pixel_values for r in rows if r.grid is not None]))
            batch["image_grid_thw"] = torch.from_numpy(np.concatenate([r.grid for r in rows if r.grid is not None]))
        return batch
