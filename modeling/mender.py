"""Mending what is missing of the words by the picture: the modules of LNLN (arXiv 2409.20012) inside Qwen2.5-VL.

Before the first words of a prompt stand `slots` placeholder tokens, in whose embeddings the model reads

    h_d = (1 - w) h_proxy + w h_text

w in [0, 1] is an estimate of how complete the words are, h_text what learned queries read in the words, h_proxy what others
read in the picture. The paper works on features of d = 128 in front of its fusion; here they are as narrow (`inner`), and are
mapped to the embedding's width. Its hyper-modality layers are left out: a language model that attends to picture and words does
their work.

A hook on the model fills the slots of whatever input has them, the same in training, scoring and generation, and leaves every
other input alone to the last bit. What the losses need (training.balance.lnln.losses) is in `Mender.seen`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class Settings:
    """Of a mender: what its weights do not say. Plain JSON values."""
    width: int                      # of the model's embeddings
    slot_id: int                    # the placeholder token
    end_id: int                     # ends a turn
    image_id: int                   # stands where image tokens are
    inner: int = 128                # width of the mender's own features
    slots: int = 8
    heads: int = 4
    layers: int = 2                 # of the estimate of completeness
    scale: float = 0.02             # of what the slots are given, in units of the model's embeddings
    mends: bool = True              # False: the slots keep the placeholder's embedding, and w and the rest are only learned
    grl_on_proxy: bool = False      # see `mend`
    seed: int = 0                   # of the initial weights

    def __post_init__(self) -> None:
        for name in ("width", "inner", "slots", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"mender: {name}: must be at least 1, not {getattr(self, name)}")
        if self.inner % self.heads:
            raise ValueError(f"mender: inner: {self.inner} is not a multiple of heads, {self.heads}")


def settings_for(config: PretrainedConfig, *, slot_id: int, end_id: int, **changes: Any) -> dict[str, Any]:
    """Settings that fit a model, for `attach`.

    Args:
        config: of a Qwen2.5-VL.
        slot_id, end_id: of the encoder: the placeholder token, and the token that ends a turn.
        changes: other fields of Settings.
    """
    text = config.text_config
    fitting = {"width": text.hidden_size, "inner": min(text.hidden_size, Settings.inner), "image_id": config.image_token_id,
               "scale": text.initializer_range}
    return asdict(Settings(**{**fitting, "slot_id": slot_id, "end_id": end_id, **changes}))


# -- formulas --------------------------------------------------------------------------------------


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """x itself; its gradient is turned round and multiplied by `strength`. The paper's strength is 1."""
    return _Reverse.apply(x, strength)


def mixed(proxy: Tensor, dominant: Tensor, completeness: Tensor) -> Tensor:
    """h_d = (1 - w) h_p + w h_l: as much of the proxy as is missing of the dominant modality.

    Args:
        proxy, dominant: (rows, tokens, width).
        completeness: w in [0, 1], (rows,) or (rows, 1).
    """
    w = completeness.reshape(len(proxy), *[1] * (proxy.ndim - 1))
    return (1 - w) * proxy + w * dominant


def mend(proxy: Tensor, dominant: Tensor, completeness: Tensor, *, grl_on_proxy: bool = False) -> tuple[Tensor, Tensor]:
    """(h_d, what the discriminator sees of it), the same values with different gradients.

    The gradient is reversed at the discriminator's input, as in the paper. grl_on_proxy: on the proxy before the mixture, as
    released; every loss then reaches the proxy reversed, the task's too, and the discriminator's reaches the dominant feature
    unreversed.
    """
    if grl_on_proxy:
        found = mixed(reverse_gradient(proxy), dominant, completeness)
        return found, found
    found = mixed(proxy, dominant, completeness)
    return found, reverse_gradient(found)


# -- modules ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer layer in which `x` attends to `keys`.

    It has linear modules of its own and not torch's MultiheadAttention, which reads weights past their modules, while ZeRO-3
    gathers a weight when its module runs.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = perceptron(width, 2 * width, width)

    def forward(self, x: Tensor, keys: Tensor, shown: Tensor) -> Tensor:
        """x: (rows, tokens, width); keys: (rows, others, width); shown: (rows, others) bool, at least one of each row."""
        normed = self.before(keys)
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for one in (self.query(self.before(x)), self.key(normed), self.value(normed)))
        found = scaled_dot_product_attention(q, k, v, attn_mask=shown[:, None, None])
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


def perceptron(width: int, inner: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, out))


class Reader(nn.Module):
    """Learned queries that read features: (rows, slots, inner), of the queries alone where there is nothing to read."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(settings.slots, settings.inner))
        self.block = Block(settings.inner, settings.heads)

    def forward(self, features: Tensor, shown: Tensor) -> Tensor:
        x = self.queries.expand(len(features), -1, -1)
        return self.block(x, torch.cat([x, features], 1), torch.cat([shown.new_ones(x.shape[:2]), shown], 1))


class Estimator(nn.Module):
    """w: (rows,) in [0, 1], from a token h_cc among the words' features."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.h_cc = nn.Parameter(0.02 * torch.randn(settings.inner))
        self.blocks = nn.ModuleList(Block(settings.inner, settings.heads) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.inner)
        self.head = perceptron(settings.inner, settings.inner, 1)

    def forward(self, features: Tensor, shown: Tensor) -> Tensor:
        x = torch.cat([self.h_cc.expand(len(features), 1, -1), features], 1)
        shown = torch.cat([shown.new_ones(len(shown), 1), shown], 1)
        for block in self.blocks:
            x = block(x, x, shown)
        return self.head(self.norm(x[:, 0])).sigmoid()[:, 0]


class Reconstruction(nn.Module):
    """Features of corrupted inputs to those of complete ones: at first the features themselves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), perceptron(width, inner, width)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@dataclass
class Seen:
    """What one forward pass saw of corrupted rows and of the same rows complete. Targets have no gradient.

    Attributes:
        w: (rows,), the estimate of completeness.
        scores, is_mended: (2 * rows * slots, 2) and (2 * rows * slots,): the discriminator's scores of mended tokens, then of
            those that the complete words give.
        text: h_text, (rows, slots, inner), reconstructed and of the complete words.
        image: features of the pictures, (image tokens, width), reconstructed and of the complete ones; None without pictures.
    """
    w: Tensor
    scores: Tensor
    is_mended: Tensor
    text: tuple[Tensor, Tensor]
    image: tuple[Tensor, Tensor] | None


class Mender(nn.Module):
    """See the module.

    The slots start at the placeholder's own embedding, because what is added to it is a linear map of h_d that starts at zero:
    vectors of a size that the model knows, which at first say nothing of the row. A zero vector would be no such vector.

    Attributes:
        settings: as `attach` takes them.
        complete: (input_ids, pixel_values or None) of the same rows, not corrupted. Set before a forward pass, which takes it.
        seen: of the last forward pass that had `complete`.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings: dict[str, Any] = asdict(settings)
        self.slots, self.slot_id = settings.slots, settings.slot_id
        self.complete: tuple[Tensor, Tensor | None] | None = None
        self.seen: Seen | None = None
        width, inner = settings.width, settings.inner
        self.text_in, self.image_in = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner)) for _ in range(2))
        self.estimator = Estimator(settings)
        self.text_reader, self.image_reader = Reader(settings), Reader(settings)
        self.out = nn.Linear(inner, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.discriminator = perceptron(inner, inner, 2)
        self.text_reconstruction, self.image_reconstruction = Reconstruction(inner, inner), Reconstruction(width, inner)

    def forward(self, ids: Tensor, embeddings: Tensor, pictures: Tensor,
                complete: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What is added to the embeddings of the slots.

        In training every parameter takes part, if need be with a gradient of 0: ranks wait for the same parameters.

        Args:
            ids: (rows, tokens), each row with its slots.
            embeddings: (rows, tokens, width).
            pictures: (image tokens, width), features of the pictures of all rows, one after the other.
            complete: embeddings and pictures of the rows before they were corrupted; then `seen` is set.

        Returns:
            (rows, slots, width).
        """
        kind = self.out.weight.dtype
        words = self._words(ids)
        text, said = padded(embeddings[words].to(kind), words.sum(1).tolist())
        image, shown = padded(pictures.to(kind), (ids == self.settings["image_id"]).sum(1).tolist())
        features = self.text_in(text)
        w, dominant = self.estimator(features, said), self.text_reader(features, said)
        proxy = self.image_reader(self.image_in(image), shown)
        mended, judged = mend(proxy, dominant, w, grl_on_proxy=self.settings["grl_on_proxy"])
        found = self.settings["scale"] * self.out(mended)
        if complete is not None or torch.is_grad_enabled():
            scores, text_again, image_again = (self.discriminator(judged), self.text_reconstruction(dominant),
                                               self.image_reconstruction(image))
        if complete is not None:
            with torch.no_grad():
                whole = self.text_reader(self.text_in(padded(complete[0][words].to(kind), words.sum(1).tolist())[0]), said)
            scores_whole = self.discriminator(whole)
            self.seen = Seen(
                w, torch.cat([scores, scores_whole]).flatten(0, 1),
                torch.arange(2, device=ids.device).repeat_interleave(len(ids) * self.slots) == 0,
                (text_again, whole), (image_again[shown], complete[1].to(kind)) if len(pictures) else None)
        if torch.is_grad_enabled():
            found = found + 0 * (scores.sum() + text_again.sum() + image_again.sum() + w.sum())
        return found if self.settings["mends"] else 0 * found

    def _words(self, ids: Tensor) -> Tensor:
        """(rows, tokens) bool: the text of the turn that the slots stand in, after them."""
        place = torch.arange(ids.shape[1], device=ids.device)
        after = place >= (ids == self.slot_id).int().argmax(1, keepdim=True) + self.slots
        ended = ((ids == self.settings["end_id"]) & after).cumsum(1) > 0
        return after & ~ended & (ids != self.settings["image_id"])


def padded(flat: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(features, width) in rows of `counts` each: (rows, longest + 1, width), and where they are, (rows, longest + 1) bool.

    The last place is always empty, so that modules run, and have a gradient, where there is nothing to read.
    """
    rows = pad_sequence([pad(row, (0, 0, 0, 1)) for row in flat.split(list(counts))], batch_first=True)
    return rows, torch.arange(rows.shape[1], device=flat.device) < torch.tensor(counts, device=flat.device)[:, None]


# -- in the model ----------------------------------------------------------------------------------


def attach(base: nn.Module, settings: dict[str, Any]) -> Mender:
    """Give a Qwen2_5_VLForConditionalGeneration a mender, as `base.mender`, in float32 and trainable.

    PEFT freezes what is not its own: attach it after the LoRA, or set requires_grad again. The initial weights depend on the
    settings alone, and no random number is taken from elsewhere.

    Args:
        settings: see `settings_for`.

    Raises:
        ValueError: unknown or missing settings, a width that is not the model's, or a model that has a mender.
    """
    try:
        checked = Settings(**settings)
    except TypeError as error:
        raise ValueError(f"mender: {str(error).removeprefix('Settings.__init__() ')}") from None
    if checked.width != (width := base.config.text_config.hidden_size):
        raise ValueError(f"mender: width: {checked.width}, but the model's embeddings have {width}; was it made for another?")
    if hasattr(base, "mender"):
        raise ValueError("mender: the model has one")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checked.seed)
        mender = Mender(checked)
    base.mender = mender.to(base.device, torch.float32)
    vars(base.model)["mender"] = mender     # for the hook, and not one of its modules: a parameter has one name
    base.model.register_forward_pre_hook(_fill, with_kwargs=True)
    return mender


def _fill(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Of Qwen2_5_VLModel: inputs with slots get embeddings in which they are filled, and pictures that are encoded already.

    Raises:
        ValueError: rows with other numbers of slots, or complete rows that are not those of the batch.
    """
    ids, mender = args[0] if args else kwargs.get("input_ids"), model.mender
    if ids is None or not (places := ids == mender.slot_id).any():
        return None
    if (places.sum(1) != mender.slots).any():
        raise ValueError(f"mender: rows with {sorted(set(places.sum(1).tolist()))} slots, but every row has {mender.slots}")
    grid, pixels = kwargs.get("image_grid_thw"), kwargs.get("pixel_values")
    embed = model.get_input_embeddings()
    embeddings = embed(ids) if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    encoded = dict(kwargs.get("mm_encoder_outputs") or {})
    if encoded.get("image") is None and pixels is not None:
        encoded["image"] = BaseModelOutputWithPooling(pooler_output=model.get_image_features(pixels, grid).pooler_output)
    if encoded.get("image") is not None:
        pictures = _joined(encoded["image"].pooler_output)
    else:
        pictures = embeddings.new_zeros(0, embeddings.shape[-1])
    complete, mender.complete = mender.complete, None
    if complete is not None:
        whole_ids, whole_pixels = complete
        if whole_ids.shape != ids.shape or ((whole_ids == mender.slot_id) != places).any():
            raise ValueError(f"mender: complete rows of shape {tuple(whole_ids.shape)} are not those of the batch, "
                             f"{tuple(ids.shape)}, or have their slots elsewhere")
        with torch.no_grad():
            whole = pictures[:0]
            if whole_pixels is not None:
                whole = _joined(model.get_image_features(whole_pixels, grid).pooler_output)
            if len(whole) != len(pictures):
                raise ValueError(f"mender: complete pictures of {len(whole)} image tokens, {len(pictures)} in the batch")
            complete = embed(whole_ids), whole
    added = mender(ids, embeddings, pictures, complete)
    filled = (embeddings[places].unflatten(0, added.shape[:2]) + added).to(embeddings.dtype)
    kwargs = {**kwargs, "inputs_embeds": embeddings.masked_scatter(places[..., None], filled)}
    if encoded:
        kwargs |= {"pixel_values": None, "mm_encoder_outputs": encoded}
    return args, kwargs


def _joined(features: Tensor | Sequence[Tensor]) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(tuple(features))
