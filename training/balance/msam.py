"""M-SAM (arXiv 2510.24919), modality-aware sharpness-aware minimisation, as a wrapper around any optimizer.

No code was released. As others describe the method, with nu the Shapley shares of the modalities and d the dominant one: eps
climbs along the gradient of L_d = nu_d l, and the step is grad L_d(theta + eps) + grad L_s(theta) with L_s = (1 - nu_d) l. nu_d
cancels in eps, so the step is nu_d g(theta + eps) + (1 - nu_d) g(theta): what counts is how much one modality dominates, not
which. nu_d = 1 is SAM (arXiv 2010.01412), nu_d = 0 the base optimizer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training.balance.hook import Groups, Measured, World
from training.balance.settings import SIDES, Msam
from training.balance.shapley import shapley_two, shares


def blend(g0: Tensor, g1: Tensor, share: float) -> Tensor:
    """share * g1 + (1 - share) * g0: gradients at the weights (g0) and at the perturbed weights (g1), of one shape."""
    return share * g1 + (1 - share) * g0


def perturbation(gradients: list[Tensor], rhos: list[float], p: float) -> list[Tensor]:
    """The step of length rho that raises the loss most to first order (arXiv 2010.01412, eq. 2).

    p = 2: rho g / (||g||_2 + 1e-12), the norm over all gradients together. p = infinity: rho sign(g).

    Args:
        gradients: of any shapes and devices.
        rhos: one per gradient.
    """
    if p == math.inf:
        return [rho * gradient.sign() for gradient, rho in zip(gradients, rhos)]
    wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(gradients, wide)]
    norm = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms])) + 1e-12
    return [gradient * (rho / norm).to(gradient.device) for gradient, rho in zip(gradients, rhos)]


class ModalitySAM(torch.optim.Optimizer):
    """The two-point step around a base optimizer. rho = 0 or share = 0 is the base optimizer, bit for bit and at its cost.

    Groups, state and checkpoints are the base optimizer's own, so schedulers may hold either of the two. Weights are put back
    from a copy: subtracting eps would not give back the same bits. The gradients that the base optimizer sees are the blended
    ones, and stay in place after the step.

    A loop that cannot hand over its passes as a closure calls `keep`, `perturb`, its second pass (gradients cleared before),
    `restore`, clips, and then steps the base optimizer. Both passes must see the same rows of the whole optimizer step: all its
    micro-batches, with gradients averaged over ranks, before `keep`.

    Args:
        params: parameters to perturb, or groups of them as dicts with "params" and, if it is not `rho`, "rho"; a subset of the
            base optimizer's, such as one tower's. Frozen ones are left out. `groups` holds them, and their "rho" may be
            reassigned between steps.
        base_optimizer: an instance. It updates its parameters with blended gradients, perturbed or not.
        rho: radius of the perturbation, >= 0, in units of the weights. Weights in half precision may be too coarse for it.
        p: norm of the ball, 2 or infinity.
        share: nu_d in [0, 1]; may be reassigned between steps.

    Raises:
        ValueError: an argument out of range, no parameter, one given twice, or one that the base optimizer does not have.
    """

    def __init__(self, params: Iterable, base_optimizer: torch.optim.Optimizer, *, rho: float, p: float = 2,
                 share: float = 1.0) -> None:
        # Without Optimizer.__init__, which would set up groups and state of its own.
        if p not in (2, math.inf):
            raise ValueError(f"p must be 2 or infinity, not {p}")
        self.base, self.p, self.share = base_optimizer, p, share
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        self.groups = [{"rho": rho, **group, "params": [param for param in group["params"] if param.requires_grad]}
                       for group in groups]
        perturbed = [id(param) for group in self.groups for param in group["params"]]
        known = {id(param) for param in self._updated()}
        if not perturbed:
            raise ValueError("no parameter to perturb")
        if len(set(perturbed)) < len(perturbed):
            raise ValueError("a parameter is to be perturbed twice")
        if strange := sum(param not in known for param in perturbed):
            raise ValueError(f"{strange} of the {len(perturbed)} parameters to perturb are not in the base optimizer")
        self._first: list[Tensor | None] | None = None
        self._weights: list[tuple[Tensor, Tensor]] | None = None
        self._check()

    @property
    def active(self) -> bool:
        """Whether a step needs the second pass. Raises ValueError when rho or share are out of range."""
        self._check()
        return self.share > 0 and any(group["rho"] > 0 for group in self.groups)

    def step(self, closure: Callable[[], Tensor | float] | None = None, dominant: Callable[[], object] | None = None):
        """One step; the closure clears gradients, runs forward and backward, and returns the loss.

        It is called at the weights and at the perturbed weights, with the same state of torch's random generators, so that
        dropout is the same in both; afterwards they stand as after one call. When a pass raises, weights are as before.

        Args:
            closure: may be left out only where no second pass is needed.
            dominant: the closure of another loss L_d, such as that of the dominant modality's view alone. It then gives both
                eps and the gradient at the perturbed weights, `closure` only that at the weights: three passes.

        Returns:
            What the closure returned at the unperturbed weights.
        """
        if not self.active:
            return self.base.step(closure) if closure is not None else self.base.step()
        if closure is None:
            raise ValueError("the two-point step needs a closure that clears gradients, runs forward and backward")
        with torch.enable_grad():
            noise = self._noise()
            loss = closure()
            self.keep()
            if dominant is not None:
                with self._replayed(noise):
                    dominant()
            self.perturb()
            try:
                with self._replayed(noise):
                    (dominant or closure)()
            except BaseException:
                self.undo()
                raise
        self.restore()
        self.base.step()
        return loss

    def keep(self) -> None:
        """Remember the gradients as those at the unperturbed weights."""
        # Copies: gradients may be views of buffers that the next backward writes to.
        self._first = [None if param.grad is None else param.grad.detach().clone() for param in self._updated()]

    @torch.no_grad()
    def perturb(self) -> None:
        """Move the weights up along their gradients; those without a gradient stay.

        Raises:
            RuntimeError: the weights are perturbed already.
        """
        if self._weights is not None:
            raise RuntimeError("the weights are perturbed already; restore() comes first")
        moved = [(param, float(group["rho"])) for group in self.groups for param in group["params"]
                 if group["rho"] > 0 and param.grad is not None]
        self._weights = [(param, param.detach().clone()) for param, _ in moved]
        if moved:
            steps = perturbation([param.grad for param, _ in moved], [rho for _, rho in moved], self.p)
            for (param, _), eps in zip(moved, steps):
                param.add_(eps)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back and blend the gradients; one that is missing in a pass counts as 0, in both as missing.

        Raises:
            RuntimeError: `keep` and `perturb` have not been called.
        """
        if self._weights is None or self._first is None:
            raise RuntimeError("nothing to restore; keep() and perturb() come first")
        self._put_back()
        first, self._first, share = self._first, None, float(self.share)
        if share == 1:
            return
        for param, g0 in zip(self._updated(), first, strict=True):
            if param.grad is None and g0 is not None:
                param.grad = blend(g0, torch.zeros_like(g0), share)
            elif param.grad is not None and (g0 is not None or share > 0):
                # Into the same tensor, which may be a view of a communication buffer.
                param.grad.copy_(blend(torch.zeros_like(param.grad) if g0 is None else g0, param.grad, share))
            else:
                param.grad = None

    def undo(self) -> None:
        """Put the weights back when the second pass failed."""
        if self._weights is not None:
            self._put_back()

    def _put_back(self) -> None:
        with torch.no_grad():
            for param, weight in self._weights:
                param.copy_(weight)
        self._weights = None

    def _updated(self) -> Iterator[Tensor]:
        return (param for group in self.base.param_groups for param in group["params"])

    def _check(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of the dominant modality must lie between 0 and 1, not {self.share}")
        for group in self.groups:
            if not 0 <= group["rho"] < math.inf:
                raise ValueError(f"rho must be finite and not negative, not {group['rho']}")

    # -- random numbers of both passes -------------------------------------------------------------

    def _noise(self) -> dict[torch.device | None, Tensor]:
        devices = {param.device for param in self._updated() if param.is_cuda}
        return {None: torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in devices}

    @contextmanager
    def _replayed(self, noise: dict[torch.device | None, Tensor]) -> Iterator[None]:
        now = self._noise()
        _set_noise(noise)
        try:
            yield
        finally:
            _set_noise(now)

    # -- the base optimizer's own ------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict]:
        return self.base.param_groups

    @property
    def state(self) -> dict:
        return self.base.state

    @property
    def defaults(self) -> dict:
        return self.base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.base.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict) -> None:
        """To the base optimizer; the group is updated, not perturbed."""
        self.base.add_param_group(param_group)


def _set_noise(noise: dict[torch.device | None, Tensor]) -> None:
    for device, state in noise.items():
        torch.set_rng_state(state) if device is None else torch.cuda.set_rng_state(state, device)


class MsamMethod(Measured):
    """M-SAM on the adapters of one model. Until the first measurement, which is in the first step, shares are equal.

    Shares come from branches in place of zeroed inputs. The gradients at the weights are those of the whole optimizer step, over
    micro-batches and ranks; the second pass goes over the same micro-batches with the same random numbers, and clipping sees the
    blended gradients.
    """

    settings: Msam
    replays = True
    changes_gradients = True
    branches = ("none", *SIDES, "both")

    def __init__(self, settings: Msam, world: World) -> None:
        super().__init__(settings, world)
        self.shares = dict.fromkeys(SIDES, 0.5)
        self._sam: ModalitySAM | None = None

    def measured(self, values: dict[str, float]) -> None:
        image, text = shapley_two(*(values[branch] for branch in self.branches))
        self.shares = shares({"image": image, "text": text})

    def on_gradients(self, groups: Groups, again: Callable[[str | None], None]) -> None:
        dominant = max(self.shares, key=self.shares.get)
        share = self.shares[dominant] if self.settings.share == "shapley" else self.settings.share
        if self._sam is None:
            perturbed = [{"params": group["params"]} for group in groups]
            self._sam = ModalitySAM(perturbed, self.world.optimizer(), rho=self.settings.rho,
                                    p=math.inf if self.settings.p == "inf" else self.settings.p)
        sam = self._sam
        sam.share = self.strength * share
        if self.settings.share == "shapley":
            self.shown |= {f"share_{side}": one for side, one in self.shares.items()}
        if self.settings.scope == "tower":
            for mine, group in zip(sam.groups, groups):
                mine["rho"] = self.settings.rho if group["modality"] == dominant else 0.0
        if not sam.active:
            return
        branch = dominant if self.settings.scope == "view" else None
        sam.keep()
        if branch is not None:
            again(branch)
        sam.perturb()
        try:
            again(branch)
        except BaseException:
            sam.undo()
            raise
        sam.restore()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "shares": self.shares}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.shares = dict(state["shares"])
