"""The `balance` section of recipes: one dataclass per method, told apart by `method`.

`strength: 0` switches any of them off, to the last bit; between 0 and 1 the method acts in proportion. What a method needs beside
the drawn view of a problem is `views(step)`: names of unimodal branches and whether a gradient flows through them.
"""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from training.strict import STRICT

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Metric = Literal["probability", "accuracy"]         # of the right option, less what guessing gives; see training.balance.views
SIDES = ("image", "text")
# name of a branch -> whether a gradient flows through it; None: only its batch is needed, nothing of it is seen in every pass
Views = dict[str, bool | None]


@dataclass(config=STRICT, frozen=True)
class Probe:
    """Problems that are not trained on, asked now and then with the picture alone, the words alone, neither, and both."""
    mixture: str                                # a YAML file, found as data.mixture is
    items: Count = 500                          # conversations, the same ones every time
    every: Count = 20                           # optimizer steps


@dataclass(config=STRICT, frozen=True)
class Common:
    strength: Share = 1.0
    # What stands for the picture alone: dropped leaves its options and instruction, as no question tells nothing of the answer;
    # kept leaves the question too, so that the two branches differ in who carries the facts.
    question: Literal["dropped", "kept"] = "dropped"

    def views(self, step: int) -> Views:
        """The branches that are needed at an optimizer step, counted from 0."""
        return {}

    def modules(self) -> dict[str, Any] | None:
        """Settings of modules that the method adds to the model (modeling.mender); None when it adds none."""
        return None

    def not_for_pairs(self) -> str | None:
        """Why the method cannot be combined with a preference, whose pairs have no unimodal branches; None when it can."""
        return "it acts on branches of problems, which pairs do not have"


@dataclass(config=STRICT, frozen=True)
class Measuring(Common):
    """Methods that follow how well each branch does."""
    measure: Literal["batch", "probe"] = "batch"    # on the batch that is trained on, or on held-out problems
    every: Count = 10                               # optimizer steps between measurements on the batch
    decay: Decay = 0.9                              # of the running mean of what is measured on batches
    metric: Metric = "probability"
    probe: Probe | None = None

    def __post_init__(self) -> None:
        if (self.measure == "probe") != (self.probe is not None):
            raise ValueError("measure: probe needs a probe, and a probe is not used without it")

    def not_for_pairs(self) -> str | None:
        return None if self.measure == "probe" else "its branches are measured on batches of problems; use measure: probe"

    def due(self, step: int) -> bool:
        """Whether branches are measured on the batch of this step."""
        return self.measure == "batch" and step % self.every == 0


@dataclass(config=STRICT, frozen=True)
class Miles(Common):
    """MILES: the modality that is learned faster by itself gets mu times the learning rate; see training.balance.miles."""
    probe: Probe = None                         # type: ignore[assignment]
    method: Literal["miles"] = "miles"
    tau: Amount = 0.2
    mu: Share = 0.5
    metric: Metric = "accuracy"
    unimodal_ce: Amount = 0.0                   # weight of each branch's own cross-entropy; the paper's sum of losses is 1

    def __post_init__(self) -> None:
        if self.probe is None:
            raise ValueError("probe: is missing; MILES measures on held-out problems")

    def views(self, step: int) -> Views:
        return dict.fromkeys(SIDES, True) if self.unimodal_ce else {}

    def not_for_pairs(self) -> str | None:
        return "unimodal_ce is a loss on problems" if self.unimodal_ce else None


@dataclass(config=STRICT, frozen=True)
class Direction:
    """CGGM's L_gm; see training.balance.cggm.direction_cosines."""
    lam: Amount = 0.1
    # The released code compares weights of output layers: here there is one, and it is frozen.
    mode: Literal["analytic", "stale"] = "analytic"


@dataclass(config=STRICT, frozen=True)
class Cggm(Measuring):
    """CGGM: a modality moves rho times the share of the improvement that the other one made; see training.balance.cggm."""
    method: Literal["cggm"] = "cggm"
    rho: Amount = 1.3
    guard: bool = True                          # off: coefficients as released, without bounds
    direction: Direction | None = None

    def views(self, step: int) -> Views:
        return dict.fromkeys(SIDES, False) if self.due(step) or self.direction is not None else {}

    def not_for_pairs(self) -> str | None:
        return "direction is a loss on problems" if self.direction is not None else super().not_for_pairs()


@dataclass(config=STRICT, frozen=True)
class Mnl(Common):
    """MNL: the surer modality tells the other what the answer is not; see training.balance.mnl.

    profile: question_answering, where an answer without the picture is mostly prior and one without the question a guess, has no
    cross-entropy of the branches, and guides among the wrong options alone, because guidance over all of them lowers the right one,
    and nothing would raise it again; either_side, where each is a fair predictor, has both as in the paper. The next two keys
    decide it one by one.
    """
    method: Literal["mnl"] = "mnl"
    profile: Literal["question_answering", "either_side"] = "question_answering"
    unimodal_ce: Amount | None = None           # null: 0 or 1, as the profile says
    among: Literal["all", "wrong"] | None = None    # null: wrong or all, as the profile says
    student_ce: bool = False                    # the released code's additional positive term
    lam: Amount = 0.7
    reduction: Literal["elements", "batch"] = "elements"    # as released: lam counts lam / options; batch: as in the paper
    warmup_steps: Annotated[int, Field(ge=0)] = 0           # without guidance
    top: Annotated[int, Field(ge=2)] = 50       # the teacher's likeliest first tokens are the options of an open answer

    @property
    def own(self) -> float:
        """Weight of the branches' cross-entropies."""
        return self.unimodal_ce if self.unimodal_ce is not None else float(self.profile == "either_side")

    @property
    def options(self) -> str:
        """The options that the student's probabilities are over."""
        return self.among or ("all" if self.profile == "either_side" else "wrong")

    def views(self, step: int) -> Views:
        return dict.fromkeys(SIDES, True) if step >= self.warmup_steps or self.own else {}


@dataclass(config=STRICT, frozen=True)
class Msam(Measuring):
    """M-SAM: a step of sharpness-aware minimisation, by as much as one modality dominates; see training.balance.msam."""
    method: Literal["msam"] = "msam"
    every: Count = 20
    rho: Amount = 0.05                          # radius of the perturbation, in units of the weights
    p: Literal[2, "inf"] = 2
    share: Literal["shapley"] | Share = "shapley"   # a number is a fixed share; 1 is plain SAM
    # all: every trained weight is perturbed; tower: those of the dominant modality; view: all, along the gradient of the dominant
    # branch's own loss
    scope: Literal["all", "tower", "view"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share != "shapley" and (self.measure == "probe" or self.scope != "all"):
            raise ValueError(f"share: {self.share:g} is fixed, so nothing is measured and no modality dominates: measure and "
                             "scope change nothing, or mean nothing, with it")

    def views(self, step: int) -> Views:
        measured = dict.fromkeys(("none", *SIDES), False) if self.share == "shapley" and self.due(step) else {}
        return (dict.fromkeys(SIDES) if self.scope == "view" else {}) | measured

    def not_for_pairs(self) -> str | None:
        if self.scope == "view":
            return "scope: view is the loss of a branch of problems"
        return None if self.share != "shapley" else super().not_for_pairs()


@dataclass(config=STRICT, frozen=True)
class Corruption:
    """The rate of one modality of one conversation: U(0, highest) with probability `chance`, else 0."""
    chance: Share = 0.5
    highest: Share = 1.0


@dataclass(config=STRICT, frozen=True)
class LnlnWeights:
    """Of the terms of training.balance.lnln.total_loss beside the task's own."""
    completeness: Amount = 0.9
    adversary: Amount = 0.8
    reconstruction: Amount = 0.1


@dataclass(config=STRICT, frozen=True)
class Lnln(Common):
    """LNLN: learn from corrupted inputs and mend what is missing of the words by the picture; see training.balance.lnln.

    level: 0 corrupts; 1 also estimates how complete the words are, and reconstructs; 2 also mends them, against a discriminator.
    """
    method: Literal["lnln"] = "lnln"
    level: Literal[0, 1, 2] = 2
    text: Corruption = field(default_factory=Corruption)
    image: Corruption = field(default_factory=Corruption)
    weights: LnlnWeights = field(default_factory=LnlnWeights)
    grl_on_proxy: bool = False                  # the gradient is reversed on the proxy, as released, not at the discriminator
    rate: Amount = 10.0                         # learning rate of the new modules, in units of the language tower's

    def modules(self) -> dict[str, Any] | None:
        return {"mends": self.level == 2, "grl_on_proxy": self.grl_on_proxy} if self.level else None


@dataclass(config=STRICT, frozen=True)
class OgmGe(Measuring):
    """OGM-GE: the modality with the larger score is slowed by 1 - tanh(alpha ratio); see training.balance.ogm."""
    method: Literal["ogm_ge"] = "ogm_ge"
    alpha: Amount = 0.1
    noise: bool = True                          # the GE: noise of each gradient's own spread

    def views(self, step: int) -> Views:
        return dict.fromkeys(SIDES, False) if self.due(step) else {}


@dataclass(config=STRICT, frozen=True)
class ModalityDropout(Common):
    """Some conversations are shown without their picture, others without their words; see training.balance.ogm."""
    method: Literal["modality_dropout"] = "modality_dropout"
    image: Share = 0.15                         # chance that the picture is missing
    text: Share = 0.15                          # chance that facts and question are

    def __post_init__(self) -> None:
        if self.image + self.text > 1:
            raise ValueError("image and text are chances of two things that exclude each other, and sum to more than 1")


@dataclass(config=STRICT, frozen=True)
class UnimodalLosses(Common):
    """Each branch's own cross-entropy is added: greedily, with fixed weights, or as Gradient-Blend weighs them.

    See training.balance.blend.
    """
    method: Literal["unimodal_losses"] = "unimodal_losses"
    image: Amount = 1.0
    text: Amount = 1.0
    blend: Probe | None = None                  # Gradient-Blend: weights from how each branch overfits, measured here

    def __post_init__(self) -> None:
        if self.blend is not None and (self.image, self.text) != (1.0, 1.0):
            raise ValueError("image and text: are weights that a blend decides itself")

    @property
    def probe(self) -> Probe | None:
        return self.blend

    def views(self, step: int) -> Views:
        return {side: True for side in SIDES if self.blend is not None or getattr(self, side)}


@dataclass(config=STRICT, frozen=True)
class RandomFactors(Common):
    """The factors that a finished run of another method used, in another order: the control of every modulation."""
    of: str = ""                                # folder of that run, {seed} being the recipe's
    method: Literal["random_factors"] = "random_factors"
    every: Count = 10                           # optimizer steps that one of them holds for

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of: is missing; it names the folder of the run whose factors are shuffled")

    def not_for_pairs(self) -> str | None:
        return None


Balance = Annotated[Miles | Cggm | Mnl | Msam | Lnln | OgmGe | ModalityDropout | UnimodalLosses | RandomFactors,
                    Field(discriminator="method")]
