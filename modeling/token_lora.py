"""LoRA whose down-projection depends on the type of a token: one A for image tokens, one for text tokens, one B for both.

    y = W x + scaling * B A_text x      at text tokens
    y = W x + scaling * B A_image x     at image tokens

After MokA (Wei et al., arXiv 2506.05191), without its attention between the low-rank features. The language tower then has
weights that image tokens alone train and weights that text tokens alone train, so that the pace of a modality can be set inside
it.

The types come from the input ids. A hook on the model turns them into a mask, which travels as a keyword argument through the
language model into the attention of each decoder layer, where another hook hands it to the layer's linear modules.
Checkpointing keeps a layer's keyword arguments and runs the attention's hooks again, so that each recomputation sees the tokens
of its own pass.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

IMAGE_TOKENS = "image_tokens"       # the mask's name on its way
Modality = Literal["image", "text", "shared"]


def modality_of(name: str, by_token: bool) -> Modality:
    """The modality that a trained parameter belongs to, by its name.

    Vision tower and merger see pictures alone. The language tower counts as text, unless its adapter is `by_token`: then image
    tokens alone train lora_A_image, text tokens alone lora_A, and both train the rest.
    """
    if re.search(r"(^|\.)mender\.", name):
        return "shared"
    if re.search(r"(^|\.)(visual|lora_A_image)\.", name):
        return "image"
    return "text" if not by_token or ".lora_A." in name else "shared"


class TokenTypes:
    """Which tokens of the running forward pass are image tokens: (rows, tokens) bool, or None where that is not known.

    The linear modules of a decoder layer share one.
    """

    def __init__(self) -> None:
        self.image: Tensor | None = None


class TokenLinear(Linear):
    """PEFT's LoRA of a linear module, with a second A for image tokens in `lora_A_image`, by adapter name.

    Both A see every token and the mask picks one of the results, so that both have a gradient, of exact zeros where there are
    no tokens of their type: ranks with and without pictures can add up their gradients.

    Raises:
        ValueError: on a forward pass without token types, a merge, rows of different adapters, or a variant of LoRA.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_A_image")
    token_types: TokenTypes | None = None       # set by `connect`

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if not hasattr(self, "lora_A_image"):
            self.lora_A_image = nn.ModuleDict()
        self.lora_A_image[adapter_name] = _down(self.in_features, r, kwargs.get("target_name", ""))
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if adapter_name in self.lora_variant or not isinstance(config.init_lora_weights, bool):
            raise ValueError(f"adapter {adapter_name}: LoRA by token type has no variants (DoRA and the like) and no other "
                             "initial weights than PEFT's default")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("LoRA by token type has one adapter for all rows; adapter_names is not supported")
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            text, image = self.lora_A[name], self.lora_A_image[name]
            seen = self.lora_dropout[name](self._cast_input_dtype(x, text.weight.dtype))
            down = torch.where(self._image_tokens(x)[..., None], image(seen), text(seen))
            result = result + self.lora_B[name](down) * self.scaling[name]
        return result.to(dtype)

    def _image_tokens(self, x: Tensor) -> Tensor:
        image = self.token_types.image if self.token_types is not None else None
        if image is None:
            raise ValueError("LoRA by token type: the types of the tokens are not known; the model must be called with "
                             "input_ids, not with inputs_embeds alone")
        if image.shape != x.shape[:-1]:
            raise ValueError(f"LoRA by token type: types are known for {tuple(image.shape)} tokens, but there are "
                             f"{tuple(x.shape[:-1])}")
        return image

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_merge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        refuse_merge()


def refuse_merge() -> None:
    raise ValueError("LoRA by token type cannot be merged: it changes a weight in one way for image tokens and in another for "
                     "text tokens")


def _down(width: int, rank: int, name: str) -> nn.Linear:
    """A down-projection with PEFT's initial distribution. Its numbers depend on torch's seed and the module's name alone, and
    the global generator stays where it is."""
    layer = nn.utils.skip_init(nn.Linear, width, rank, bias=False)
    if not layer.weight.is_meta:        # as where PEFT makes room for weights to be loaded
        digest = hashlib.sha256(f"{torch.initial_seed()} {name} image".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
    return layer


@dataclass
class TokenLoraConfig(LoraConfig):
    """A LoRA configuration that makes TokenLinear of the language tower's linear modules, and PEFT's own of all others.

    The field is written to adapter_config.json, where PEFT itself does not know it and warns.
    """

    token_lora: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Linear: _layer})


def _layer(target: nn.Module, adapter_name: str, *, config: LoraConfig, target_name: str, **kwargs: Any) -> TokenLinear | None:
    """Called by PEFT for each linear module; None leaves it to PEFT."""
    if re.search(r"(^|\.)language_model\.", target_name):
        return TokenLinear(target, adapter_name, config=config, target_name=target_name, **kwargs)
    return None


def has_token_lora(model: nn.Module) -> bool:
    return any(isinstance(module, TokenLinear) for module in model.modules())


def connect(model: PeftModel) -> PeftModel:
    """Tell the TokenLinear modules of a Qwen2.5-VL with an adapter the types of their tokens, and refuse to merge them.

    Called once, after the first adapter is there; adapters that are added later share the modules.
    """
    inner = model.get_base_model().model
    language = inner.language_model
    if not hasattr(language, "token_types"):
        language.token_types = TokenTypes()
        inner.register_forward_pre_hook(_read_types, with_kwargs=True)
        language.register_forward_pre_hook(_send_types, with_kwargs=True)
    for layer in language.layers:
        if not hasattr(layer.self_attn, "token_types"):
            layer.self_attn.token_types = TokenTypes()
            # The attention is the first to run in a layer, and inside of what checkpointing repeats; the layer's hooks are not.
            layer.self_attn.register_forward_pre_hook(_receive_types, with_kwargs=True)
        for module in layer.modules():
            if isinstance(module, TokenLinear):
                module.token_types = layer.self_attn.token_types
    # PEFT would have merged the vision tower before it came to the first TokenLinear.
    model.base_model._check_merge_allowed = refuse_merge
    return model


def _read_types(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Of Qwen2_5_VLModel. In generation with a cache, the ids are those of the new tokens alone, as the hidden states are."""
    ids = args[0] if args else kwargs.get("input_ids")
    pictures = (model.config.image_token_id, model.config.video_token_id)
    model.language_model.token_types.image = None if ids is None else is_any(ids, pictures)


def is_any(ids: Tensor, wanted: Collection[int]) -> Tensor:
    """Where `ids` is one of `wanted`: bool, of the same shape."""
    return torch.stack([ids == one for one in wanted]).any(0)


def _send_types(language: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Of the language model, which passes what it does not know on to its decoder layers."""
    image, language.token_types.image = language.token_types.image, None
    return args, {IMAGE_TOKENS: image, **kwargs}


def _receive_types(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = dict(kwargs)
    attention.token_types.image = kwargs.pop(IMAGE_TOKENS, None)
    return args, kwargs
