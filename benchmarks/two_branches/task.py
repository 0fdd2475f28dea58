"""A small classification task with a dominant and a weak modality, the late-fusion model for it, and what is measured of it.

The class shows in the text as a direction, which a linear model reads at once, and in the image as one of several axes of
unknown sign, of which a linear model sees nothing: the weak branch has to learn which axes mean the same, whatever the sign. In
some samples only one of the two carries the class, and the other one is noise.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from training.balance.lnln import corrupt, generator
from training.balance.shapley import shapley_two, shares

MODALITIES = ("image", "text")
RATES = tuple(round(0.1 * i, 1) for i in range(10))     # of corruption at test time, as LNLN measures it


@dataclass(frozen=True)
class Task:
    """Sizes are counts; signals are lengths of a class's vector in units of the noise's standard deviation per dimension."""

    classes: int = 6
    width: int = 48             # dimensions of either modality
    axes: int = 4               # per class in the image; a sample shows one of them, with one of two signs
    text_signal: float = 3.5
    image_signal: float = 4.5
    both: float = 0.7           # share of the samples in which both modalities carry the class
    text: float = 0.2           # in which the text alone does; in the rest the image alone
    train: int = 2048
    validation: int = 512
    test: int = 2048
    hidden: int = 64            # units of an encoder's hidden layer
    features: int = 32          # that an encoder gives to the joint head
    batch: int = 64
    epochs: int = 24


class Split(NamedTuple):
    image: Tensor       # (rows, width)
    text: Tensor        # (rows, width)
    labels: Tensor      # (rows,)


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split
    vectors: dict[str, np.ndarray]      # modality -> (classes, vectors, width): one direction, or the axes, of each class


@lru_cache(maxsize=4)
def draw(seed: int, task: Task) -> Data:
    """The data of one seed: vectors of the classes, then the three splits, each from random numbers of its own."""
    vectors = {}
    for name, count, signal in (("image", task.axes, task.image_signal), ("text", 1, task.text_signal)):
        rotation, _ = np.linalg.qr(generator((seed, "vectors", name)).standard_normal((task.width, task.width)))
        vectors[name] = signal * rotation[:task.classes * count].reshape(task.classes, count, task.width)
    splits = [_split(seed, name, getattr(task, name), vectors, task) for name in ("train", "validation", "test")]
    return Data(*splits, vectors)


def _split(seed: int, name: str, rows: int, vectors: dict[str, np.ndarray], task: Task) -> Split:
    random = generator((seed, "samples", name))
    labels = random.integers(0, task.classes, rows)
    carried = random.random(rows)
    shown = {"image": (carried < task.both) | (carried >= task.both + task.text), "text": carried < task.both + task.text}
    axis, sign = random.integers(0, task.axes, rows), random.choice([-1.0, 1.0], rows)
    signal = {"image": sign[:, None] * vectors["image"][labels, axis], "text": vectors["text"][labels, 0]}
    found = {one: random.standard_normal((rows, task.width)) + shown[one][:, None] * signal[one] for one in MODALITIES}
    return Split(*(torch.from_numpy(found[one]).float() for one in MODALITIES), torch.from_numpy(labels))


def best_possible(split: Split, vectors: dict[str, np.ndarray], task: Task) -> dict[str, float]:
    """Accuracy of the best rule there is, which knows how the data were made: from both modalities and from each alone."""
    log_odds = {}       # of class c against noise, (rows, classes): log N(x; m, 1) - log N(x; 0, 1) = x m - m^2 / 2
    for one, x in (("image", split.image), ("text", split.text)):
        reach, length = np.einsum("rd,cvd->rcv", x.double().numpy(), vectors[one]), (vectors[one] ** 2).sum(-1) / 2
        each = (reach if one == "text" else np.logaddexp(reach, -reach) - np.log(2)) - length
        log_odds[one] = np.logaddexp.reduce(each, -1) - np.log(each.shape[-1])
    image, text = (np.exp(log_odds[one]) for one in MODALITIES)
    only_image = 1 - task.both - task.text
    scores = {"joint": task.both * image * text + task.text * text + only_image * image,
              "image": image, "text": text}     # alone: what carries nothing adds the same to every class
    return {name: float((score.argmax(1) == split.labels.numpy()).mean()) for name, score in scores.items()}


class Outputs(NamedTuple):
    image: Tensor       # (rows, features) of the image's encoder
    text: Tensor        # (rows, features) of the text's
    joint: Tensor       # (rows, classes) logits of the joint head


class Branches(nn.Module):
    """An encoder per modality, a linear joint head on both, and a linear head per modality for the methods that ask for one."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoders = nn.ModuleDict({one: nn.Sequential(
                nn.Linear(task.width, task.hidden), nn.ReLU(), nn.Linear(task.hidden, task.features), nn.ReLU())
                for one in MODALITIES})
            self.joint = nn.Linear(2 * task.features, task.classes)
            self.heads = nn.ModuleDict({one: nn.Linear(task.features, task.classes) for one in MODALITIES})

    def forward(self, image: Tensor, text: Tensor) -> Outputs:
        found = [self.encoders[one](x) for one, x in zip(MODALITIES, (image, text))]
        return Outputs(*found, self.joint(torch.cat(found, -1)))

    def half(self, modality: str) -> Tensor:
        """(classes, features) of the joint head's weight, the part that reads one modality."""
        return self.joint.weight.chunk(2, -1)[MODALITIES.index(modality)]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, decay: float = 1e-3) -> float:
    """Accuracy on test features of a linear classifier fitted to the training features, the encoder being frozen.

    Features are centred and scaled by the training set; the fit is that of a convex loss (cross-entropy + decay / 2 |W|^2), so
    it does not depend on where it begins. Features that are not finite, of a training that diverged, count as 0.

    Args:
        train, test: (rows, features); labels: (rows,).
    """
    train, test = (torch.nan_to_num(x.detach().double(), posinf=0.0, neginf=0.0) for x in (train, test))
    mean, spread = train.mean(0), train.std(0)
    scale = torch.where(spread > 1e-8, 1 / spread.clamp(min=1e-8), 0.0)
    train, test = (train - mean) * scale, (test - mean) * scale
    classes = int(train_labels.max()) + 1
    weight = torch.zeros(classes, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        fit.zero_grad()
        loss = nn.functional.cross_entropy(train @ weight.T + bias, train_labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    fit.step(closure)
    return accuracy(test @ weight.T + bias, test_labels)


@torch.no_grad()
def measure(model: Branches, data: Data, seed: int) -> dict[str, float | list[float]]:
    """What a trained model is worth on the test split.

    `joint`: accuracy. `weak`, `dominant`: of a probe on the features of the image's and of the text's encoder. `image_only`,
    `text_only`: of the joint model where the other modality is replaced by its mean over the training split. `image_share`: of
    the image in the Shapley values of the joint accuracy. `corrupted`: joint accuracy per rate of `RATES`, both corrupted.
    """
    train, test = data.train, data.test
    features, kept = model(train.image, train.text), model(test.image, test.text)
    found = {"joint": accuracy(kept.joint, test.labels)}
    for name, one in (("weak", "image"), ("dominant", "text")):
        with torch.enable_grad():
            found[name] = probe(getattr(features, one), train.labels, getattr(kept, one), test.labels)
    image, text = train.image.mean(0).expand_as(test.image), train.text.mean(0).expand_as(test.text)
    found["image_only"] = accuracy(model(test.image, text).joint, test.labels)
    found["text_only"] = accuracy(model(image, test.text).joint, test.labels)
    none = accuracy(model(image, text).joint, test.labels)
    found["image_share"] = shares(shapley_two(none, found["image_only"], found["text_only"], found["joint"]))[0]
    found["corrupted"] = []
    for rate in RATES:
        seen = [corrupt(getattr(test, one), rate, seed=(seed, "test", one), keep=None, missing=0.0) for one in MODALITIES]
        found["corrupted"].append(accuracy(model(*seen).joint, test.labels))
    return found
