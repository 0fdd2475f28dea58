"""What the tests train under DeepSpeed, and the tables of it in ds_configs/README.md.

    python -m tests.deepspeed_runs [--check]      writes the tables; --check says what is out of date instead
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from training.balance.methods import check
from training.config import Recipe, RecipeError, load_recipe
from training.sharding import refusal, rewrite, settings_of, stage_of

from .conftest import merged

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "ds_configs" / "README.md"
CONFIGS = ("zero1", "zero2", "zero3", "zero3_offload")
LAUNCHERS = ("torchrun", "deepspeed", "accelerate", "python")

FACTORS = "factors"     # of a finished run, written beside the probe's problems
BRANCHES = {"both": 0.5, "vision": 0.5}     # a balance method's views
ANSWER = {"answer": {"sigmoid": 1.0, "sft": 0.5}}
PICTURE = {"conditional": 1.0, "anchor": 1.0}


class What(NamedTuple):
    """A recipe of the tests.

    Args:
        shown: its row in the table.
        views: of its problems; None: it learns from preference pairs.
        changes: what it has beside tests.conftest.recipe_file's values.
        data: which problems: "mixed" (text alone, one picture, two pictures, short and long answers), "twins"; or pairs.
    """
    shown: str
    views: dict[str, float] | None
    changes: dict[str, Any]
    data: str = "twins"


MIXED = {"both": 0.3, "vision": 0.4, "text": 0.3}


def balanced(method: str, **section: Any) -> What:
    return What(f"`balance: {method}`", BRANCHES, {"balance": {"method": method, **section}})


RUNS: dict[str, What] = {
    "supervised": What("supervised, LoRA on all towers", MIXED, {}, "mixed"),
    "checkpointing": What("the same with `model.checkpointing`", MIXED, {"model": {"checkpointing": True}}, "mixed"),
    "language": What("supervised, LoRA on the language tower alone", MIXED,
                     {"optim": {"lr": {"vision": 0.0, "merger": 0.0}}}, "mixed"),
    "all_weights": What("supervised, all weights (`lora: null`)", MIXED, {"lora": None, "optim": {"weight_decay": 0.1}}, "mixed"),
    "by_token": What("LoRA by token type (`lora.by_token`)", MIXED, {"lora": {"by_token": True}}, "mixed"),
    "quantised": What("QLoRA (`model.quantize: nf4`)", MIXED, {"model": {"quantize": "nf4"}}, "mixed"),
    "moments": What("moments in 8 bits (`optim.name: adamw_8bit`)", MIXED, {"optim": {"name": "adamw_8bit"}}, "mixed"),
    "cross_modal_kl": What("`loss.cross_modal_kl`", {"vision": 0.4, "text": 0.6},
                           {"loss": {"cross_modal_kl": {"coef": 1.0, "answers": "all"}}}, "mixed"),
    "consistency": What("`loss.consistency`", BRANCHES, {"loss": {"consistency": {"coef": 1.0}}}),
    "evidence": What("`loss.weigh: evidence`", BRANCHES, {"loss": {"weigh": "evidence"}}),
    "stages": What("stages, each with a loss of its own (`weigh: rows`, further kinds of `cross_modal_kl`), one with a fresh optimizer",
                   {"vision": 0.4, "text": 0.6}, {"steps": 4, "stages": [
                       {"share": 0.25, "loss": {"weigh": "rows"}},
                       *({"share": 0.25, "optimizer": restart, "loss": {"cross_modal_kl": {"estimator": kind, "answers": "all"}}}
                         for kind, restart in (("forward", "carry"), ("full", "restart"), ("distill", "carry")))]}, "mixed"),
    "gap_probe": What("the gap on the way (`probe`)", BRANCHES, {"probe": {"every": 2, "items": 6}}),
    "skip": What("`guard.non_finite: skip`", BRANCHES, {"guard": {"non_finite": "skip"}}),
    "dpo": What("preferences: DPO with sft", None, {"preference": ANSWER}),
    "mdpo": What("preferences: answers and pictures (mDPO)", None, {"preference": PICTURE}, "pairs with and without pictures"),
    "answers": What("preferences: TRL's other losses on answers", None, {"preference": {"label_smoothing": 0.1, "answer": dict.fromkeys(
        ("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
         "discopop", "sigmoid_norm"), 0.1)}}),
    "made": What("preferences: pictures made on the way (`negative: crop`), `attend`, `language_prior`", None,
                 {"preference": {"answer": {}, "conditional": 1.0, "attend": 0.5, "language_prior": 0.1, "negative": "crop:0.01-0.2"}},
                 "pairs with and without pictures"),
    "symmetric": What("preferences: `svco`, `sympmo`, `noise_aware`", None,
                      {"preference": {"svco": 0.5, "sympmo": {}, "noise_aware": {"weight": 0.5}}}),
    "ahead": What("preferences: `reference: ahead`", None, {"preference": {**ANSWER, "reference": "ahead"}}),
    "dpo_all_weights": What("preferences, all weights", None, {"preference": ANSWER, "lora": None}),
    "miles": balanced("miles", probe={"every": 2, "items": 6}),
    "cggm": balanced("cggm", every=2, direction={"lam": 0.1}),
    "mnl": balanced("mnl"),
    "msam": balanced("msam", rho=0.05, every=2),
    "ogm_ge": balanced("ogm_ge", alpha=0.1),
    "unimodal_losses": balanced("unimodal_losses"),
    "modality_dropout": balanced("modality_dropout", image=0.3, text=0.3),
    "random_factors": balanced("random_factors", of=FACTORS, every=1),
    "corruption": What("`balance: lnln`, level 0", BRANCHES, {"balance": {"method": "lnln", "level": 0}}),
    "estimated": What("`balance: lnln`, level 1", BRANCHES, {"balance": {"method": "lnln", "level": 1}}),
    "lnln": What("`balance: lnln`, level 2", BRANCHES, {"balance": {"method": "lnln", "level": 2}}),
}


class Case(NamedTuple):
    """One launched run: two ranks on a CPU (one for plain python)."""
    launcher: str
    config: str
    what: str


FAST = [Case("torchrun", config, what) for config, several in (
    ("zero2", ("supervised", "mdpo", "miles")), ("zero3", ("supervised", "mdpo"))) for what in several]
# These are also interrupted half-way and continued.
CUT = [Case("torchrun", config, what) for config, several in (
    ("zero1", ("lnln", "estimated")), ("zero2", ("supervised", "lnln", "estimated")), ("zero3", ("supervised",))) for what in several]


def slow() -> list[Case]:
    """Every other run that is not refused, and the other launchers."""
    cases = [Case("torchrun", config, what) for config in CONFIGS for what in RUNS if refused(what, config) is None]
    cases += [Case(launcher, config, "supervised") for launcher in LAUNCHERS for config in CONFIGS]
    return [case for case in dict.fromkeys(cases) if case not in FAST]


def changes_of(what: str, probe: Path) -> dict[str, Any]:
    """A run's changes, with its probe's problems, and the folder beside them of a finished run that used some factors."""
    changes = {key: dict(value) if isinstance(value, dict) else value for key, value in RUNS[what].changes.items()}
    for section in (changes, changes.get("balance", {})):
        if "probe" in section:
            section["probe"] = {**section["probe"], "mixture": str(probe)}
        if section.get("of") == FACTORS:
            section["of"] = str(probe.parent / FACTORS)
            (probe.parent / FACTORS).mkdir(exist_ok=True)
            rows = [{"balance/factor_image": 1.0, "balance/factor_text": 0.5}, {"balance/factor_image": 0.25, "balance/factor_text": 1.0}]
            (probe.parent / FACTORS / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return changes


def recipe_of(what: str, folder: Path) -> Recipe:
    """A run's recipe, without its data; its files are written into the folder."""
    rank, rate, run = {"rank": 4}, 1e-3, RUNS[what]
    data = {"pairs": "pairs.jsonl", "rate": 1.0} if run.views is None else {"problems": "problems.jsonl", "views": run.views}
    values = {"name": what, "model": {"name": "model"}, "data": {"mixture": "mixture.yaml"}, "run_dir": "run", "steps": 2, "batch": 4,
              "micro_batch": 1, "lora": {"vision": rank, "merger": rank, "language": rank},
              "optim": {"lr": {"vision": rate, "merger": rate, "language": rate}}}
    mixture, recipe = folder / "mixture.yaml", folder / "recipe.yaml"
    mixture.write_text(yaml.safe_dump({"sources": {"demo": data}}), encoding="utf-8")
    recipe.write_text(yaml.safe_dump(merged(values, changes_of(what, mixture))), encoding="utf-8")
    return load_recipe(recipe)


@cache
def refused(what: str, config: str) -> str | None:
    """Why a run is refused, in the words that a user reads; None when it is not."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = recipe_of(what, Path(folder))
        try:
            check(loaded, deepspeed=True)
        except RecipeError as error:
            return str(error)
    return refusal(loaded, stage_of(settings_of(ROOT / "ds_configs" / f"{config}.json")))


def table() -> list[str]:
    """Lines of Markdown: what, by configuration; then the launchers; then the reasons."""
    tested, reasons = {*FAST, *slow()}, []
    lines = ["| recipe | " + " | ".join(f"`{config}.json`" for config in CONFIGS) + " |", "|---|" + "---|" * len(CONFIGS)]
    for what, run in RUNS.items():
        cells = []
        for config in CONFIGS:
            reason = refused(what, config)
            if reason is not None:
                if reason not in reasons:
                    reasons.append(reason)
                cells.append(f"refused ({reasons.index(reason) + 1})")
            else:
                cells.append("tested" if Case("torchrun", config, what) in tested else "not tested")
        lines.append(f"| {run.shown} | " + " | ".join(cells) + " |")
    lines += ["", "Refused, before anything is loaded, with these words:", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    lines += ["", "| launcher, with the first recipe | " + " | ".join(f"`{config}.json`" for config in CONFIGS) + " |",
              "|---|" + "---|" * len(CONFIGS)]
    for launcher in LAUNCHERS:
        cells = ["tested" if Case(launcher, config, "supervised") in tested else "not tested" for config in CONFIGS]
        lines.append(f"| `{launcher}` | " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.deepspeed_runs", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    rewrite(DOCUMENT, "runs under DeepSpeed", table(), check=args.check)


if __name__ == "__main__":
    main()
