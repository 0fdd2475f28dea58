"""The rows of the comparison: every method with its optimizer, its settings and where they come from."""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from statistics import fmean, median
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.two_branches import methods as of
from benchmarks.two_branches import task as of_task
from benchmarks.two_branches import training as of_training
from benchmarks.two_branches.task import Branches, Task, accuracy, best_possible, draw, measure
from benchmarks.two_branches.training import LR, Method, Training, train
from training.balance import cggm, lnln, miles, mnl, msam, ogm, shapley

TUNING_SEEDS = (100, 101, 102)      # never reported
TIMED_EPOCHS = 3
EMA = 0.95
# What a row depends on: these modules and functions, wherever the functions stand.
CODE = (of_task, of_training, of, cggm.coefficients, cggm.direction_loss, cggm.direction_cosines, cggm.cosine,
        cggm.option_gradient, lnln.generator, lnln.corrupt, lnln.dropped, lnln.replace, lnln.corruption_rate, lnln.total_loss,
        miles.lr_factors, mnl.negative_learning, mnl.teachers, mnl.guidance, mnl.strongest_wrong, msam.ModalitySAM,
        msam.perturbation, msam.blend, ogm.coefficients, ogm.with_noise, ogm.modality_dropout, ogm.shuffled, shapley)


class Entry(NamedTuple):
    """One row."""

    optimizer: str                      # sgd or adam; the row is compared with plain training under the same one
    idea: str
    kind: Callable[..., Method] = Method
    settings: dict[str, Any] = {}
    source: str = ""                    # of the settings
    control: str | None = None          # what the row is compared with beside plain
    epochs: float = 1.0                 # times the task's

    @property
    def plain(self) -> str:
        return "plain" if self.optimizer == "sgd" else "plain-adam"


CGGM = "paper and released scripts (rho 1.3, lam 0.2)"
GUARDED = f"{CGGM}; the guard is an addition"
TUNED = "validation"
METHODS = {
    "plain": Entry("sgd", "joint cross-entropy alone"),
    "plain-long": Entry("sgd", "the same with twice the steps", epochs=2.0),
    "slow-gradient": Entry("sgd", "text gradients x 0.1", of.Slow, {"act": "gradient"}, "fixed"),
    "ogm-ge": Entry("sgd", "OGM-GE", of.Ogm, {"alpha": 0.3}, TUNED),
    "ogm": Entry("sgd", "OGM without the noise", of.Ogm, {"alpha": 0.3, "noise": False}, "as ogm-ge", "ogm-ge"),
    "cggm": Entry("sgd", "CGGM, guarded, analytic direction", of.Cggm, {}, GUARDED, "cggm-random"),
    "cggm-weight": Entry("sgd", "direction between weights, as released", of.Cggm, {"direction": "weight"}, GUARDED, "cggm"),
    "cggm-stale": Entry("sgd", "no direction gradient: magnitude alone", of.Cggm, {"direction": "stale"}, GUARDED, "cggm"),
    "cggm-released": Entry("sgd", "no guard, weights, norm cut to 0.8", of.Cggm,
                           {"guard": False, "direction": "weight", "clip": 0.8}, CGGM, "cggm"),
    "cggm-random": Entry("sgd", "CGGM's coefficients in another order", of.Random, {}, "as cggm"),
    "sam": Entry("sgd", "SAM, share 1", of.Sharpness, {"rho": 0.2, "share": 1.0}, TUNED, "plain-long"),
    "msam": Entry("sgd", "M-SAM, share by Shapley per batch", of.Sharpness, {"rho": 0.2}, "as sam", "sam"),
    "plain-adam": Entry("adam", "joint cross-entropy alone"),
    "plain-long-adam": Entry("adam", "the same with twice the steps", epochs=2.0),
    "slow-gradient-adam": Entry("adam", "text gradients x 0.1, which Adam undoes", of.Slow, {"act": "gradient"}, "fixed"),
    "slow-update-adam": Entry("adam", "text updates x 0.1", of.Slow, {"act": "update"}, "fixed", "slow-gradient-adam"),
    "separate": Entry("adam", "each encoder by its own loss alone", of.Separate),
    "unimodal": Entry("adam", "both unimodal losses", of.Unimodal, {}, "weights 1, as MILES and MNL", "separate"),
    "unimodal-image": Entry("adam", "the image's unimodal loss alone", of.Unimodal, {"text": 0.0}, "fixed", "unimodal"),
    "miles": Entry("adam", "MILES: unimodal losses and learning rates", of.Miles, {"tau": 0.2, "mu": 0.5},
                   "paper (LUMA)", "unimodal"),
    "miles-rates": Entry("adam", "its learning rates alone: unimodal losses train their heads only", of.Miles,
                         {"tau": 0.2, "mu": 0.5, "detached": True}, "paper (LUMA)"),
    "mnl-code": Entry("adam", "MNL as released", of.Negative, {"lam": 0.7, "student_ce": True, "reduction": "elements"},
                      "released code", "unimodal"),
    "mnl-paper": Entry("adam", "MNL as in the paper, two stages", of.Negative,
                       {"lam": 0.7, "student_ce": False, "reduction": "batch", "warm_up": 0.2},
                       "paper; lam of the code; length of the first stage fixed here", "unimodal"),
    "mnl-guidance": Entry("adam", "the paper's guidance alone: unimodal losses train their heads only", of.Negative,
                          {"lam": 0.7, "student_ce": False, "reduction": "batch", "warm_up": 0.2, "detached": True},
                          "as mnl-paper"),
    "mnl-among-wrong": Entry("adam", "guidance alone, among the wrong classes (ours)", of.Negative,
                             {"lam": 0.7, "student_ce": False, "reduction": "batch", "warm_up": 0.2, "detached": True,
                              "among": "wrong"}, "as mnl-paper", "mnl-guidance"),
    "ogm-update": Entry("adam", "OGM on the update", of.Ogm, {"alpha": 1.0, "act": "update"}, TUNED),
    "cggm-update": Entry("adam", "CGGM on the update, running mean of p(right)", of.Cggm, {"act": "update", "decay": EMA},
                         f"{GUARDED}; decay fixed here", "cggm-random-update"),
    "cggm-random-update": Entry("adam", "its coefficients in another order", of.Random, {"act": "update", "decay": EMA},
                                "as cggm-update"),
    "cggm-released-adam": Entry("adam", "CGGM as released: on the gradient", of.Cggm,
                                {"guard": False, "direction": "weight", "clip": 0.8}, CGGM, "cggm-update"),
    "dropout": Entry("adam", "modality dropout", of.Dropout, {"image": 0.2, "text": 0.2}, TUNED),
    "lnln": Entry("adam", "LNLN level 0: corruption", of.Corruption, {"chance": 0.5, "highest": 1.0}, "paper", "dropout"),
}

# Tried on the validation split with seeds of their own: the row, the setting (lr or settings of the method), the values.
CANDIDATES = {
    "lr sgd": ("plain", [{"lr": value} for value in (0.03, 0.1, 0.2, 0.3, 0.5)]),
    "lr adam": ("plain-adam", [{"lr": value} for value in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)]),
    "ogm-ge": ("ogm-ge", [{"alpha": value} for value in (0.1, 0.3, 1.0, 3.0)]),
    "ogm-update": ("ogm-update", [{"alpha": value} for value in (0.1, 0.3, 1.0, 3.0)]),
    "sam": ("sam", [{"rho": value} for value in (0.05, 0.1, 0.2, 0.5)]),
    "dropout": ("dropout", [{"image": value, "text": value} for value in (0.1, 0.2, 0.3, 0.4)]),
}


def row(name: str, seed: int, task: Task) -> dict[str, Any]:
    """Train and measure one method with one seed; `time_ratio` is CPU seconds per step over those of plain training."""
    entry = METHODS[name]
    run = train(entry.kind(**entry.settings), seed, task, optimizer=entry.optimizer, epochs=entry.epochs)
    found = measure(run.model, run.data, seed)
    found["corrupted_mean"] = fmean(found["corrupted"])
    # In turn with plain training, epoch by epoch, so that both meet the same machine.
    other, ratios = Training(Method(), seed, task, optimizer=entry.optimizer), []
    for _ in range(0 if run.diverged else TIMED_EPOCHS):
        spent = []
        for each in (other, run):
            begin = process_time()
            each.run_epoch()
            spent.append(process_time() - begin)
        ratios.append(spent[1] / spent[0])
    return {"method": name, "seed": seed, "fingerprint": fingerprint(name, task), "diverged": run.diverged, **found,
            "time_ratio": median(ratios) if ratios else None}


def tried(what: str, task: Task) -> list[dict[str, Any]]:
    """Validation accuracy of each candidate, mean over `TUNING_SEEDS`, and what is used."""
    name, candidates = CANDIDATES[what]
    entry, rows = METHODS[name], []
    for candidate in candidates:
        settings = {key: value for key, value in candidate.items() if key != "lr"}
        values = []
        for seed in TUNING_SEEDS:
            method = entry.kind(**{**entry.settings, **settings})
            run = train(method, seed, task, optimizer=entry.optimizer, lr=candidate.get("lr"))
            split = run.data.validation
            with torch.no_grad():
                values.append(accuracy(run.model(split.image, split.text).joint, split.labels))
        rows.append({**candidate, "validation": fmean(values), "used": used(name, candidate)})
    return rows


def used(name: str, candidate: dict[str, float]) -> bool:
    """Whether a row has these settings."""
    has = {"lr": LR[METHODS[name].optimizer], **METHODS[name].settings}
    return all(has[key] == value for key, value in candidate.items())


def reference(seed: int, task: Task) -> dict[str, dict[str, float]]:
    """What the numbers stand between: the best rule that there is, and encoders that were never trained."""
    data = draw(seed, task)
    bare = measure(Branches(task, seed), data, seed)
    return {"best_possible": best_possible(data.test, data.vectors, task),
            "untrained": {key: bare[key] for key in ("weak", "dominant")}}


def fingerprint(name: str, task: Task) -> str:
    """Of everything that a row depends on: its entry, the task, and the code that trains and measures."""
    entry = METHODS[name]
    settings = (entry.optimizer, LR, entry.kind.__name__, entry.settings, entry.epochs, asdict(task))
    return sha256("\0".join([repr((*settings, torch.__version__, np.__version__)), *_sources()]).encode()).hexdigest()


@cache
def _sources() -> list[str]:
    return [inspect.getsource(one) for one in CODE]
