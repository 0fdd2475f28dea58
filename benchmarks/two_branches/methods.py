"""The balance methods on two branches: each a small change of plain training, around the functions of training.balance.

With its strength at 0 every one is plain training, or its control, bit for bit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.two_branches.task import MODALITIES, Branches, Outputs, accuracy
from benchmarks.two_branches.training import EVEN, Method, Training, train
from training.balance import cggm, lnln, miles, mnl, ogm
from training.balance.msam import ModalitySAM
from training.balance.shapley import accuracy as hits
from training.balance.shapley import chance_corrected, probability, running_mean, shapley_two, shares


class Slow(Method):
    """The dominant branch by a fixed factor, on its gradient or its update: what modulation could do if it knew."""

    def __init__(self, *, factor: float = 0.1, act: str) -> None:
        self.factors, self.act = {**EVEN, "text": factor}, act

    def begin(self, run: Training) -> None:
        super().begin(run)
        if self.act == "update":
            run.slow(self.factors)

    def after_backward(self, out: Outputs, labels: Tensor) -> None:
        if self.act == "gradient":
            self.run.scale(self.factors)


class Unimodal(Method):
    """Cross-entropies of unimodal heads beside the joint one, each with a weight.

    detached: they train the heads alone, on features that they do not change.
    """

    def __init__(self, *, image: float = 1.0, text: float = 1.0, detached: bool = False) -> None:
        self.weights, self.detached = {"image": image, "text": text}, detached

    def heads(self, out: Outputs, *, detached: bool = False) -> dict[str, Tensor]:
        features = {one: getattr(out, one) for one in MODALITIES}
        return {one: self.run.model.heads[one](x.detach() if detached else x) for one, x in features.items()}

    def loss(self, out: Outputs, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        heads = self.heads(out, detached=self.detached)
        terms = {"joint": cross_entropy(out.joint, labels), **{one: cross_entropy(heads[one], labels) for one in MODALITIES}}
        return lnln.total_loss(terms, {"joint": 1.0, **self.weights})


class Separate(Unimodal):
    """Each encoder by its own head alone, the joint head on features that it cannot change: branches undisturbed."""

    def loss(self, out: Outputs, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        joint = self.run.model.joint(torch.cat([out.image, out.text], -1).detach())
        return super().loss(out._replace(joint=joint), image, text, labels)


class Miles(Unimodal):
    """MILES: the unimodal losses, and after each epoch the validation split says which branch is slowed down in the next."""

    def __init__(self, *, tau: float = 0.2, mu: float = 0.5, detached: bool = False) -> None:
        super().__init__(detached=detached)
        self.tau, self.mu = tau, mu

    @torch.no_grad()
    def after_epoch(self) -> None:
        split, classes = self.run.data.validation, self.run.task.classes
        out = self.run.model(split.image, split.text)
        values = {name: chance_corrected(accuracy(logits, split.labels), classes)
                  for name, logits in {"both": out.joint, **self.heads(out)}.items()}
        self.run.slow(miles.lr_factors(**values, tau=self.tau, mu=self.mu))


class Negative(Unimodal):
    """MNL: the unimodal losses and the guidance terms, after a share of the epochs with the cross-entropies alone."""

    def __init__(self, *, lam: float = 0.7, student_ce: bool, reduction: str, among: str = "all", warm_up: float = 0.0,
                 detached: bool = False) -> None:
        super().__init__(detached=detached)
        self.terms, self.warm_up = dict(lam=lam, student_ce=student_ce, reduction=reduction, among=among), warm_up

    def loss(self, out: Outputs, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        total = super().loss(out, image, text, labels)
        if self.run.epoch < self.warm_up * self.run.task.epochs:
            return total
        heads = self.heads(out)
        return total + mnl.negative_learning(heads["text"], heads["image"], out.joint, labels, **self.terms)


class Ogm(Method):
    """OGM-GE: the branch whose share of the joint logits is ahead is slowed down; `noise` adds the gradient's spread (GE)."""

    def __init__(self, *, alpha: float, act: str = "gradient", noise: bool = True) -> None:
        self.alpha, self.act, self.noise = alpha, act, noise

    def begin(self, run: Training) -> None:
        super().begin(run)
        self.random = torch.Generator().manual_seed(run.seed)

    def after_backward(self, out: Outputs, labels: Tensor) -> None:
        model, scores = self.run.model, {}
        with torch.no_grad():
            for one in MODALITIES:
                logits = getattr(out, one) @ model.half(one).T + model.joint.bias / 2
                scores[one] = probability(logits, labels).sum().item()
        found = ogm.coefficients(**scores, alpha=self.alpha)
        if self.act == "update":
            self.run.slow(found)
            return
        for one in MODALITIES:
            for param in model.encoders[one].parameters():
                param.grad.copy_(ogm.with_noise(param.grad, found[one], random=self.random) if self.noise
                                 else found[one] * param.grad)


class Cggm(Method):
    """CGGM: classifiers on detached features say how fast each branch improves, and that how far it moves and where.

    factor = 1 + strength (rho c - 1), on the gradient or on the update. The direction term compares the part of the joint head
    that reads a branch with that branch's classifier. decay: of a running mean of the probability of the right class, in place
    of the batch's accuracy. clip: norm to which all gradients are cut after modulation.
    """

    def __init__(self, *, rho: float = 1.3, lam: float = 0.2, guard: bool = True, direction: str = "analytic",
                 act: str = "gradient", decay: float | None = None, clip: float | None = None, strength: float = 1.0) -> None:
        self.settings = dict(rho=rho, lam=lam, guard=guard, direction=direction, act=act, decay=decay, clip=clip,
                             strength=strength)
        self.rho, self.lam, self.guard, self.direction, self.act = rho, lam, guard, direction, act
        self.decay, self.clip, self.strength = decay, clip, strength

    def begin(self, run: Training) -> None:
        super().begin(run)
        self.classifiers = Branches(run.task, run.seed + 1).heads
        # Half the model's rate, as the released scripts have it.
        self.optimizer = run.new_optimizer(self.classifiers.parameters(), run.lr / 2)
        self.past, self.table = [0.0, 0.0], []

    def loss(self, out: Outputs, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        own = {one: self.classifiers[one](getattr(out, one).detach()) for one in MODALITIES}
        self.optimizer.zero_grad()
        sum(cross_entropy(own[one], labels) for one in MODALITIES).backward()
        now = [(hits if self.decay is None else probability)(own[one], labels).mean().item() for one in MODALITIES]
        if self.decay is not None:
            now = running_mean(self.past, now, self.decay)
        self.now = self.coefficients(now)
        self.past = now
        loss = cross_entropy(out.joint, labels)
        if self.lam == 0:
            return loss
        term = cggm.direction_loss(torch.tensor(self.now), self.cosines(out, own, labels))
        return loss + self.lam * term

    def coefficients(self, now: list[float]) -> list[float]:
        """c of (image, text); `table` keeps them."""
        found = cggm.coefficients(now, self.past, guard=self.guard).tolist()
        self.table.append(found)
        return found

    def cosines(self, out: Outputs, own: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        if self.direction == "weight":
            pairs = [(self.run.model.half(one), self.classifiers[one].weight) for one in MODALITIES]
        else:
            pairs = [tuple(cggm.option_gradient(getattr(out, one), logits, labels) for logits in (out.joint, own[one]))
                     for one in MODALITIES]
        return torch.cat([cggm.direction_cosines(joint, [side], mode=self.direction) for joint, side in pairs])

    def after_backward(self, out: Outputs, labels: Tensor) -> None:
        factors = {one: 1 + self.strength * (self.rho * c - 1) for one, c in zip(MODALITIES, self.now)}
        (self.run.slow if self.act == "update" else self.run.scale)(factors)
        self.optimizer.step()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.run.model.parameters(), self.clip)


class Random(Cggm):
    """Coefficients that CGGM had on the same seed, in another order: the same numbers without the relation to the step."""

    def begin(self, run: Training) -> None:
        super().begin(run)
        measured = Cggm(**self.settings)
        train(measured, run.seed, run.task, optimizer=run.kind, lr=run.lr)
        table = torch.tensor(measured.table, dtype=torch.float64)
        self.drawn = ogm.shuffled(table, seed=(run.seed, "shuffled")).tolist()

    def coefficients(self, now: list[float]) -> list[float]:
        self.table.append(self.drawn[len(self.table) % len(self.drawn)])
        return self.table[-1]


class Sharpness(Method):
    """SAM with a fixed share of the perturbed gradient, or, without one, M-SAM: the larger Shapley share of batch accuracy."""

    def __init__(self, *, rho: float = 0.05, share: float | None = None) -> None:
        self.rho, self.share = rho, share

    def begin(self, run: Training) -> None:
        super().begin(run)
        run.optimizer = ModalitySAM(run.model.parameters(), run.optimizer, rho=self.rho,
                                    share=1.0 if self.share is None else self.share)

    def loss(self, out: Outputs, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        # The shares are those at the unperturbed weights: the first of a step's two passes.
        if self.share is None and self.run.passes == 1:
            with torch.no_grad():
                none, alone, other = (self.run.model(*views).joint for views in (
                    (torch.zeros_like(image), torch.zeros_like(text)), (image, torch.zeros_like(text)),
                    (torch.zeros_like(image), text)))
            v = [accuracy(logits, labels) for logits in (none, alone, other, out.joint)]
            self.run.optimizer.share = max(shares(shapley_two(*v)))
        return super().loss(out, image, text, labels)


class Dropout(Method):
    """Modality dropout: each row of an epoch may lack one of the two."""

    def __init__(self, *, image: float, text: float) -> None:
        self.chances = dict(image=image, text=text)

    def inputs(self, epoch: int) -> tuple[Tensor, Tensor]:
        image, text = super().inputs(epoch)
        shown = ogm.modality_dropout([(self.run.seed, epoch, row) for row in range(len(image))], **self.chances)
        return tuple(torch.where(shown[:, place, None], x, 0.0) for place, x in enumerate((image, text)))


class Corruption(Method):
    """LNLN, level 0: a random half of the samples loses a random share of its numbers, each modality by itself."""

    def __init__(self, *, chance: float = 0.5, highest: float = 1.0) -> None:
        self.rates = dict(chance=chance, highest=highest)

    def inputs(self, epoch: int) -> tuple[Tensor, Tensor]:
        found = []
        for name, x in zip(MODALITIES, super().inputs(epoch)):
            seed = (self.run.seed, epoch, name)
            rates = torch.tensor([lnln.corruption_rate(seed=(*seed, row), **self.rates) for row in range(len(x))])
            found.append(lnln.corrupt(x, rates, seed=seed, keep=None, missing=0.0))
        return tuple(found)
