"""Recipes: strict YAML with one level of `base`, read into frozen dataclasses.

Every key is a field below; an unknown key, a wrong type or a missing file is a RecipeError that names the place, before any
weight is loaded. `key=value` overrides come last and are recorded in the run folder with everything else.
"""

from collections.abc import Iterable
from dataclasses import asdict, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from training.balance.settings import Balance, Probe
from training.strict import STRICT, RecipeError, build, find_beside, merge, parse_override, read_yaml

TOWERS = ("vision", "merger", "language")
# TRL's loss types for answers
AnswerLoss = Literal["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
                     "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(config=STRICT, frozen=True)
class Model:
    name: str                                   # local folder or hub id
    revision: str | None = None
    adapter: str | None = None                  # a trained PEFT adapter to start from, {seed} being the recipe's; null: a fresh one
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    min_pixels: Count | None = None             # bounds on a picture's area; None keeps the model's own
    max_pixels: Count | None = None
    # The language tower's linear layers in 4 bits (nf4, double quantisation: QLoRA, arXiv 2305.14314) or 8; the vision tower, the
    # merger and the head stay as they are, and so does what is trained
    quantize: Literal["nf4", "int8"] | None = None
    checkpointing: bool = False                 # recompute activations of the language tower in the backward pass


@dataclass(config=STRICT, frozen=True)
class Data:
    mixture: str                                # a YAML file, looked for beside the recipe and in its parent folders
    workers: Size = 0                           # processes that render, decode and tokenise ahead; the order does not depend on it
    skip_bad: bool = False                      # leave bad rows out instead of stopping


@dataclass(config=STRICT, frozen=True)
class Rank:
    rank: Size                                  # 0 freezes the tower
    alpha: Amount | None = None                 # default: 2 * rank


@dataclass(config=STRICT, frozen=True)
class Lora:
    vision: Rank = field(default_factory=lambda: Rank(0))
    merger: Rank = field(default_factory=lambda: Rank(0))
    language: Rank = field(default_factory=lambda: Rank(16))
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    by_token: bool = False                      # the language tower has one A for image tokens and one for text tokens


@dataclass(config=STRICT, frozen=True)
class TowerRates:
    """Peak learning rate per tower. 0 freezes the tower."""
    vision: Amount
    merger: Amount
    language: Amount


@dataclass(config=STRICT, frozen=True)
class Optim:
    lr: TowerRates
    name: Literal["adamw", "adamw_8bit"] = "adamw"      # adamw_8bit: bitsandbytes', paged out of GPU memory where there is a GPU
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: Size = 0
    weight_decay: Amount = 0.0
    betas: Annotated[list[Amount], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    clip: Amount = 1.0                          # largest gradient norm; 0 does not clip


@dataclass(config=STRICT, frozen=True)
class CrossModalKL:
    """Adds coef * KL(teacher view || student view) of the same answers; see training.losses.cross_modal_kl."""
    coef: Amount = 1.0
    teacher: str = "both"
    student: str = "vision"
    estimator: Literal["k3", "forward", "full", "distill"] = "k3"
    clamp: Amount | None = None                 # of k3: 10 is what was published; its gradient is 0 beyond it
    answers: Literal["right", "all"] = "right"  # right: only those whose every token is the teacher's first choice
    drawn: list[str] | None = None              # only problems drawn in these views take part; null: all

    def __post_init__(self) -> None:
        if self.clamp is not None and self.estimator != "k3":
            raise ValueError(f"a clamp belongs to the estimator k3, not to {self.estimator}")


@dataclass(config=STRICT, frozen=True)
class Consistency:
    """Adds coef * Jensen-Shannon divergence of the same answers in the views `both` and `vision`."""
    coef: Amount = 1.0


@dataclass(config=STRICT, frozen=True)
class Loss:
    # tokens: long answers count more; rows: every answer counts once; evidence: a token counts by how much the picture changes
    # its probability, and at least evidence_floor
    weigh: Literal["tokens", "rows", "evidence"] = "tokens"
    evidence_floor: Annotated[float, Field(ge=0, le=1)] = 0.2
    cross_modal_kl: CrossModalKL | None = None
    consistency: Consistency | None = None

    def __post_init__(self) -> None:
        if self.evidence_floor != 0.2 and self.weigh != "evidence":
            raise ValueError("evidence_floor changes nothing without weigh: evidence")


@dataclass(config=STRICT, frozen=True)
class NoiseAware:
    """NaPO's term on answers given without looking (rejected_prior); see training.losses.gce and noise_aware_q."""
    weight: Amount = 1.0
    q: Literal["code", "paper"] | Annotated[float, Field(ge=0, le=1)] = "code"  # a number: fixed
    alpha: Amount = 0.5
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.9   # of the running mean of margins that q follows; 0: the batch's own


@dataclass(config=STRICT, frozen=True)
class SymMPO:
    """The terms of training.losses.sympmo; symmetric pairs are needed."""
    lam: Amount = 0.5
    gamma: Amount = 1e-4
    eta: Amount = 1.0


@dataclass(config=STRICT, frozen=True)
class Preference:
    """What pairs teach: one set of log-ratios, several terms, each with a weight; see training.preference.

    d = ln policy - ln reference of an answer, summed over its tokens, under its own picture, under the rejected one, or none.
    """
    beta: Annotated[float, Field(gt=0)] = 0.1
    answer: dict[AnswerLoss, Amount] = field(default_factory=lambda: {"sigmoid": 1.0})      # and their weights
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0                    # of TRL's robust and exo_pair
    conditional: Amount = 0.0                   # chosen under its own picture against chosen under the rejected one
    anchor: Amount = 0.0                        # chosen's reward above anchor_delta
    anchor_delta: float = 0.0
    attend: Amount = 0.0                        # chosen with its picture against chosen without any
    language_prior: Annotated[float, Field(ge=0, le=1)] = 0.0   # chosen without its picture, pushed down; unbounded, so at most 1
    svco: Amount = 0.0                          # attend and reject, for both answers of symmetric pairs
    noise_aware: NoiseAware | None = None
    sympmo: SymMPO | None = None
    negative: str = "own"                       # own: the pairs' rejected_images; or a spec of data_prep.negatives: crop:0.01-0.2
    reference: Literal["live", "ahead"] = "live"    # ahead: its log-probabilities are computed before training, and kept
    cache: str | None = None                    # folder of those; default: reference/ in the run's folder
    watch: bool = True                          # log what no term needs too: the chosen answer without picture, and under the rejected one

    def __post_init__(self) -> None:
        used = {name for name, weight in self.answer.items() if weight > 0}
        if self.cache is not None and self.reference == "live":
            raise ValueError("cache: keeps what reference: ahead computes, and changes nothing without it")
        if self.anchor_delta and not self.anchor:
            raise ValueError("anchor_delta: changes nothing without anchor")
        if self.label_smoothing and not used & {"robust", "exo_pair", "aot", "aot_unpaired"}:
            raise ValueError("label_smoothing: changes nothing but the answer terms robust, exo_pair, aot and aot_unpaired")


@dataclass(config=STRICT, frozen=True)
class Stage:
    """A part of the run. Unset keys are the recipe's."""
    share: Annotated[float, Field(gt=0, le=1)]  # of the optimizer steps; the shares of a recipe sum to 1
    mixture: str | None = None
    loss: Loss | None = None
    optimizer: Literal["carry", "restart"] = "carry"    # restart: the stage begins with fresh moments
    schedule: Literal["carry", "restart"] = "carry"     # restart: the stage begins a schedule of its own, warm-up included


@dataclass(config=STRICT, frozen=True)
class Save:
    every: Count = 100                          # optimizer steps between checkpoints
    keep: Count = 2                             # older ones are deleted


@dataclass(config=STRICT, frozen=True)
class Guard:
    """What happens when a step's loss or gradient is infinite or no number; see training.guards."""
    non_finite: Literal["stop", "skip"] = "stop"    # skip: the step is left out, counted and named
    skips: Count = 5                            # in a row; then it stops all the same


@dataclass(config=STRICT, frozen=True)
class Recipe:
    name: str
    model: Model
    data: Data
    optim: Optim
    steps: Count                                # optimizer steps
    batch: Count                                # conversations per optimizer step, over all ranks and accumulation
    micro_batch: Count                          # conversations per forward pass on one device
    seed: Size = 0
    run_dir: str | None = None                  # default: runs/<folder below recipes>/<name>-seed<seed>
    lora: Lora | None = field(default_factory=Lora)     # null trains every parameter of the towers with a learning rate
    loss: Loss = field(default_factory=Loss)
    preference: Preference | None = None        # null: supervised, on a mixture of problems; else on a mixture of pairs
    balance: Balance | None = None              # a method against the imbalance of modalities; see training.balance.settings
    stages: list[Stage] = field(default_factory=list)   # one after the other; empty: one stage of everything above
    probe: Probe | None = None                  # held-out problems whose gap and image gain are logged now and then
    guard: Guard = field(default_factory=Guard)
    save: Save = field(default_factory=Save)
    log_every: Count = 10                       # optimizer steps

    def __post_init__(self) -> None:
        if self.stages and abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
            raise ValueError(f"the shares of the stages sum to {sum(stage.share for stage in self.stages):.6g}; they must sum to 1")
        if self.stages and "restart" in (self.stages[0].optimizer, self.stages[0].schedule):
            raise ValueError("the first stage begins with a fresh optimizer and schedule anyway; it has nothing to restart")
        if any(start == end for start, end in pairwise(self.stage_starts)):
            raise ValueError(f"steps={self.steps} are too few for {len(self.stages)} stages: one would have no step")
        if self.batch % self.micro_batch:
            raise ValueError(f"batch={self.batch} is not a multiple of micro_batch={self.micro_batch}")
        if self.model.min_pixels and self.model.max_pixels and self.model.min_pixels > self.model.max_pixels:
            raise ValueError("model.min_pixels is larger than model.max_pixels")
        if self.optim.schedule == "constant" and self.optim.warmup_steps:
            raise ValueError("optim.warmup_steps: the schedule 'constant' has no warm-up; use constant_with_warmup")
        if self.preference is not None:
            if self.loss != Loss() or any(stage.loss is not None for stage in self.stages):
                raise ValueError("loss: is for mixtures of problems; with a preference, its terms are the loss")
            if self.lora is not None and self.lora.dropout:
                raise ValueError("lora.dropout: must be 0 with a preference, or policy and reference would differ by chance")
            if self.balance is not None and (reason := self.balance.not_for_pairs()):
                raise ValueError(f"balance: {self.balance.method} does not go with a preference: {reason}")
        if self.lora is not None and self.lora.by_token and self.model.adapter is None and not self.trains("language"):
            raise ValueError("lora.by_token: changes nothing while the language tower is frozen")
        if self.model.quantize is not None and (self.lora is None or self.lora.by_token):
            why = "a quantised weight cannot be trained" if self.lora is None else "lora.by_token is not made for quantised layers"
            raise ValueError(f"model.quantize: {why}")
        if self.lora is None and self.balance is not None and self.balance.modules() is not None:
            raise ValueError(f"balance: {self.balance.method} adds modules to the model, which are kept beside an adapter; needs lora")
        if self.model.adapter is not None and self.lora is None:
            raise ValueError("model.adapter: needs lora; null trains all weights")
        if not any(self.trains(tower) for tower in TOWERS):
            raise ValueError("nothing would be trained: every tower has learning rate 0 or LoRA rank 0")

    def trains(self, tower: str) -> bool:
        """Whether any parameter of the tower is trained."""
        return getattr(self.optim.lr, tower) > 0 and (self.lora is None or getattr(self.lora, tower).rank > 0)

    @property
    def active_balance(self) -> Balance | None:
        """The balance method, unless its strength is 0, which is the same as none."""
        return self.balance if self.balance is not None and self.balance.strength > 0 else None

    @property
    def stage_starts(self) -> list[int]:
        """The optimizer step at which each stage begins, and at last the number of steps."""
        shares = [stage.share for stage in self.stages] or [1.0]
        return [0, *(round(self.steps * done) for done in list(accumulate(shares))[:-1]), self.steps]

    def stage_mixture(self, number: int) -> str:
        return self.stages[number].mixture or self.data.mixture if self.stages else self.data.mixture

    def stage_loss(self, number: int) -> Loss:
        return self.stages[number].loss or self.loss if self.stages else self.loss

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML shows them."""
        return asdict(self)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, the base it names and `key=value` overrides.

    Raises:
        RecipeError: unknown key (with the nearest name), wrong type, missing file, two levels of base.
    """
    path = Path(path)
    values = read_yaml(path)
    layers: list[tuple[str | Path, dict]] = [(path, values)]
    if "base" in values:
        name = values.pop("base")
        base_path = path.parent / str(name)
        if not isinstance(name, str) or not base_path.is_file():
            raise RecipeError(f"{path}: base: no such file: {name}")
        base = read_yaml(base_path)
        if "base" in base:
            raise RecipeError(f"{path}: base: {base_path} has a base itself; a base stands alone")
        layers.insert(0, (base_path, base))
        values = merge(base, values)
    for text in overrides:
        keys, value = parse_override(text)
        for key in reversed(keys):
            value = {key: value}
        layers.append((f"override {text}", value))
        try:
            values = merge(values, value)
        except (IndexError, ValueError):
            raise RecipeError(f"override {text}: the recipe has no such entry in its list") from None
    recipe = build(Recipe, values, path, layers)

    def found(key: str, name: str) -> str:
        mixture = find_beside(name, path.resolve().parent)
        if mixture is None:
            raise RecipeError(f"{path}: {key}: no such file: {name}")
        return _short(mixture)

    values["data"] = {**values["data"], "mixture": found("data.mixture", recipe.data.mixture)}
    values["stages"] = [stage if recipe.stages[i].mixture is None else
                        {**stage, "mixture": found(f"stages.{i}.mixture", stage["mixture"])}
                        for i, stage in enumerate(values.get("stages", ()))]
    for holder, place, key in ((values, "", "probe"), (values.get("balance") or {}, "balance.", "probe"),
                               (values.get("balance") or {}, "balance.", "blend")):
        if holder.get(key) is not None:
            holder[key] = {**holder[key], "mixture": found(f"{place}{key}.mixture", holder[key]["mixture"])}
    if recipe.model.adapter is not None:
        values["model"] = {**values["model"], "adapter": recipe.model.adapter.replace("{seed}", str(recipe.seed))}
    if recipe.run_dir is None:
        values["run_dir"] = str(Path("runs") / _place(path.resolve().parent) / f"{recipe.name}-seed{recipe.seed}")
    return build(Recipe, values, path)


def load_pipeline(path: str | Path, overrides: Iterable[str] = ()) -> list[Recipe]:
    """The recipes of a pipeline file (`pipeline: [sft.yaml, preference.yaml]`), in their order; of a recipe, itself alone.

    A later recipe that does not say what adapter it starts from starts from the one before it. Overrides are for all of them.

    Raises:
        RecipeError: as load_recipe; the file holds other keys too, two recipes have one run_dir, or a later one continues what
            is no adapter.
    """
    path, overrides = Path(path), list(overrides)
    values = read_yaml(path)
    if "pipeline" not in values:
        return [load_recipe(path, overrides)]
    names = values["pipeline"]
    if set(values) != {"pipeline"} or not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise RecipeError(f"{path}: pipeline: must be a list of recipe files, and nothing else may stand beside it")
    recipes: list[Recipe] = []
    for name in names:
        if not (path.parent / name).is_file():
            raise RecipeError(f"{path}: pipeline: no such file: {name}")
        recipe = load_recipe(path.parent / name, overrides)
        if recipes and recipe.model.adapter is None:
            if recipes[-1].lora is None or recipes[-1].model.name != recipe.model.name:
                raise RecipeError(f"{path}: pipeline: {name} cannot start from {recipes[-1].name}, which leaves no adapter for its model")
            recipe = replace(recipe, model=replace(recipe.model, adapter=str(Path(recipes[-1].run_dir) / "adapter")))
        recipes.append(recipe)
    if len({recipe.run_dir for recipe in recipes}) < len(recipes):
        raise RecipeError(f"{path}: pipeline: two of its recipes write to one run_dir")
    return recipes


def _place(folder: Path) -> str:
    """The recipe's folder as seen from `recipes`: demo, qwen2_5_vl_3b/sft."""
    parts = folder.parts
    return str(Path(*parts[parts.index("recipes") + 1:])) if "recipes" in parts[:-1] else folder.name


def _short(path: Path) -> str:
    """Relative to the working folder where that is possible: what is recorded should not name a machine."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
