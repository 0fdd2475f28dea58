"""The plain training of the two branches, and the places where a method may change it."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.two_branches.task import MODALITIES, Branches, Outputs, Task, draw
from training.balance.lnln import generator

LR = {"sgd": 0.1, "adam": 5e-3}     # see rows.CANDIDATES
EVEN = dict.fromkeys(MODALITIES, 1.0)


class Diverged(ArithmeticError):
    """The loss is not finite; the weights are what they were when it was found."""


class Training:
    """One model, its data and its optimizer: what a method may touch.

    Everything that is drawn depends on the seed, and on the epoch where it changes; so all methods of a seed see the same data,
    begin at the same weights and take the same batches.

    Args:
        optimizer: sgd (momentum 0.9) or adam; lr: None is that of `LR`.
    """

    def __init__(self, method: "Method", seed: int, task: Task, *, optimizer: str, lr: float | None = None) -> None:
        self.seed, self.task, self.kind, self.lr = seed, task, optimizer, LR[optimizer] if lr is None else lr
        self.data, self.model, self.epoch, self.method = draw(seed, task), Branches(task, seed), 0, method
        parts = [*(self.model.encoders[one] for one in MODALITIES), torch.nn.ModuleList([self.model.joint, self.model.heads])]
        groups = [{"params": list(part.parameters())} for part in parts]
        self.optimizer = self.new_optimizer(groups, self.lr)
        self.passes = 0     # through the model in the step at hand
        self.diverged = False
        method.begin(self)

    def new_optimizer(self, params, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=0.9) if self.kind == "sgd" else torch.optim.Adam(params, lr=lr)

    def slow(self, factors: Mapping[str, float]) -> None:
        """Learning rates of the two encoders are the global one times these factors; that of the heads stays."""
        for group, one in zip(self.optimizer.param_groups, MODALITIES):
            group["lr"] = self.lr * factors[one]

    def scale(self, factors: Mapping[str, float]) -> None:
        """Gradients of the two encoders times these factors."""
        for one in MODALITIES:
            for param in self.model.encoders[one].parameters():
                param.grad.mul_(factors[one])

    def run_epoch(self) -> None:
        order = torch.from_numpy(generator((self.seed, self.epoch, "order")).permutation(self.task.train))
        image, text = self.method.inputs(self.epoch)
        for rows in order.split(self.task.batch):
            self.step(image[rows], text[rows], self.data.train.labels[rows])
        self.epoch += 1
        self.method.after_epoch()

    def step(self, image: Tensor, text: Tensor, labels: Tensor) -> None:
        self.passes = 0

        def closure() -> Tensor:
            self.passes += 1
            self.optimizer.zero_grad()
            out = self.model(image, text)
            loss = self.method.loss(out, image, text, labels)
            if not loss.isfinite():
                raise Diverged
            loss.backward()
            self.method.after_backward(out, labels)
            return loss

        self.optimizer.step(closure)


class Method:
    """Plain training: cross-entropy of the joint head."""

    def begin(self, run: Training) -> None:
        self.run = run

    def inputs(self, epoch: int) -> tuple[Tensor, Tensor]:
        """(image, text) of the whole training split, as this epoch shows them."""
        return self.run.data.train.image, self.run.data.train.text

    def loss(self, out: Outputs, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(out.joint, labels)

    def after_backward(self, out: Outputs, labels: Tensor) -> None:
        pass

    def after_epoch(self) -> None:
        pass


def train(method: Method, seed: int, task: Task, *, epochs: float = 1.0, **options) -> Training:
    """The whole training, of `epochs` times the task's epochs, or up to where it diverges; options as those of `Training`."""
    run = Training(method, seed, task, **options)
    try:
        while run.epoch < epochs * task.epochs:
            run.run_epoch()
    except Diverged:
        run.diverged = True
    return run
