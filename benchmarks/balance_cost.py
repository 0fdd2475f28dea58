"""What each balance method costs: seconds of an optimizer step, as a ratio to plain training in the same run.

    python -m benchmarks.balance_cost --out results/balance/cost.json [--recipes recipes/demo/*.yaml] [--steps 20] [--repeats 5]

Blocks of steps alternate: plain, A, plain, B, ... plain, all of it --repeats times. A block is a training of its own, built as
train.py builds it and stopped after its steps: weights, data and batches are the same in all. It is timed from the end of its
warm-up to the end of its last step, so it holds as many loadings of a batch as it has steps, and neither the loading of the
model nor a checkpoint.

A block has --steps steps, or the next larger number in which what a method does every so many steps (a probe, a measurement on
the batch) happens as often as in a long run: 24 for a probe every 24 steps and --steps 20. Plain blocks are as long as the
longest, and are compared over the steps that the method's block has, which are on the same batches.

The ratio of one block is that of its seconds to the mean of the plain blocks before and after it; reported are the median over
the repeats, and the smallest and the largest. The row of plain is each plain block against the plain ones next to it: what
differs from 1 there is the machine. On a CPU seconds are those of the process on the processor, which other programs lengthen
less; on a GPU they are those of the clock on the wall.
"""

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from data_prep import libraries
from data_prep.problem import ProblemError
from data_prep.provenance import file_sha256, parents, weights_fingerprint, write_json
from eval.parents import place, rounded
from training.balance.settings import SIDES, Common, RandomFactors
from training.config import Recipe, RecipeError, load_recipe
from training.strict import read_yaml

if TYPE_CHECKING:
    from training.plan import Plan

PLAIN = Path("recipes/demo/plain.yaml")
WARMUP = 2              # steps of a block before the clock starts: memory, optimizer state, the probe of the first step
Stamps = Mapping[int, float]    # steps since the warm-up -> seconds


class Entry(NamedTuple):
    path: Path
    recipe: Recipe
    steps: int          # that are timed


class Block(NamedTuple):
    path: Path          # of the recipe
    stamps: Stamps

    def seconds(self, steps: int) -> float:
        return self.stamps[steps] - self.stamps[0]


class Clock:
    """Of a trainer: the time at the end of the warm-up and of `steps` after it. Training stops at the last of them.

    Only there does it wait for the device: between them the next batch may be made while the device computes.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        import torch

        self.wanted, self.wait = {0, *steps}, torch.cuda.is_available()
        self.stamps: dict[int, float] = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        step = state.global_step - WARMUP
        if step in self.wanted:
            if self.wait:
                import torch

                torch.cuda.synchronize()
            self.stamps[step] = time.perf_counter() if self.wait else time.process_time()
        if step >= max(self.wanted):
            control.should_training_stop = True


def block_steps(balance: Common | None, steps: int) -> int:
    """The smallest number of steps, at least `steps`, that holds whole periods of what the method does only now and then."""
    probe = getattr(balance, "probe", None)
    own = 1 if getattr(balance, "measure", None) == "probe" else getattr(balance, "every", 1)
    period = math.lcm(own, probe.every if probe is not None else 1)
    return period * math.ceil(steps / period)


def find(plain: Path, paths: Sequence[Path], steps: int) -> list[Entry]:
    """The plain recipe, and those whose base it is or that have a `balance` section.

    One that differs from plain in its model, its data or its batch is left out, and a line on stderr says so: its ratio would
    not be the price of a method.

    Raises:
        RecipeError: a recipe cannot be read, plain has a method itself, or nothing is found.
    """
    base = load_recipe(plain)
    if base.active_balance is not None:
        raise RecipeError(f"{plain}: balance: the recipe that others are compared with has a method itself")
    entries = []
    for path in paths:
        values = read_yaml(path)
        based = "base" in values and (path.parent / str(values["base"])).resolve() == plain.resolve()
        if path.resolve() == plain.resolve() or not (based or "balance" in values):
            continue
        recipe = load_recipe(path)
        other = [key for key in ("model", "data", "batch", "micro_batch", "seed") if getattr(recipe, key) != getattr(base, key)]
        if other:
            print(f"{path}: left out, differs from {plain} in {', '.join(other)}", file=sys.stderr)
            continue
        entries.append(Entry(path, recipe, block_steps(recipe.active_balance, steps)))
    if not entries:
        raise RecipeError(f"{plain.parent}: no recipe to compare has {plain.name} as its base or a balance section")
    return [Entry(plain, base, max(entry.steps for entry in entries)), *entries]


def shortened(entry: Entry, folder: Path) -> Recipe:
    """The recipe of one block. folder: for what it writes, and for the finished run whose factors random_factors shuffles."""
    # One step more than is trained, so that the last one also loads a batch ahead and the end, which is saved, is not reached.
    steps = WARMUP + entry.steps + 1
    overrides = [f"steps={steps}", f"save.every={steps}", f"run_dir={folder / 'run'}"]
    if isinstance(entry.recipe.balance, RandomFactors):
        rows = [{f"balance/factor_{side}": factor for side in SIDES} for factor in (0.8, 1.2)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        overrides.append(f"balance.of={folder}")
    if getattr(entry.recipe.balance, "warmup_steps", 0):
        overrides.append("balance.warmup_steps=0")      # steps without the method are not what it costs
    return load_recipe(entry.path, overrides)


def train_block(recipe: Recipe, plan: "Plan", steps: Iterable[int]) -> dict[int, float]:
    """Train the warm-up and the largest of `steps`; the time after each of them, and after 0."""
    import transformers

    from training.build import arguments_of, build_trainer
    from training.collate import load_encoder
    from training.model import load_base, prepare

    class Timed(Clock, transformers.TrainerCallback):
        """A callback of the library, which main() must not have imported before it knows whether the model is on a hub."""

    gc.collect()            # what the last block left, which else would be collected in the middle of this one
    transformers.set_seed(recipe.seed)
    clock = Timed(steps)
    encoder = load_encoder(recipe.model)        # with empty caches, as a training begins
    model = prepare(load_base(recipe.model), recipe, encoder)
    build_trainer(recipe, plan, encoder, model, arguments_of(recipe), [clock]).train()
    return clock.stamps


def alternating(entries: Sequence[Entry], repeats: int) -> list[Entry]:
    """plain, A, plain, B, ... plain. The first entry is plain."""
    plain, *methods = entries
    return [plain, *(one for _ in range(repeats) for method in methods for one in (method, plain))]


def measure(entries: Sequence[Entry], repeats: int, folder: Path) -> tuple[list[Block], dict[str, str]]:
    """All blocks in their order, and the SHA-256 of every data file by its name. Runs write nothing outside `folder`."""
    from training.plan import Plan

    recipes, plans = {}, {}
    for number, entry in enumerate(tqdm(entries, desc="reading data", unit="recipe")):
        own = folder / str(number)
        own.mkdir()
        recipes[entry.path] = shortened(entry, own)
        plans[entry.path] = Plan(recipes[entry.path])
    lengths = sorted({entry.steps for entry in entries})
    order, blocks = alternating(entries, repeats), []
    gc.freeze()             # the problems of all plans, which else would be gone through before each block
    try:
        with tqdm(total=len(entries) + len(order), desc="balance cost", unit="block") as bar:
            # Once around before anything is timed: what cannot be trained is found at once, and files are in memory.
            for number, entry in enumerate([*entries, *order]):
                bar.set_postfix_str(entry.recipe.name)
                timed = number >= len(entries)
                steps = [one for one in lengths if one <= entry.steps] if timed else [0]
                stamps = train_block(recipes[entry.path], plans[entry.path], steps)
                if timed:
                    blocks.append(Block(entry.path, stamps))
                bar.update()
    finally:
        gc.unfreeze()
    return blocks, {place(name): one for plan in plans.values() for name, one in plan.hashes.items()}


def ratios(blocks: Sequence[Block], entry: Entry, plain: Path) -> list[float]:
    """Of every block of a recipe: its seconds over the mean of the plain blocks next to it, two places away for plain."""
    reach = 2 if entry.path == plain else 1
    found = []
    for number, block in enumerate(blocks):
        if block.path == entry.path:
            near = [blocks[i] for i in (number - reach, number + reach) if 0 <= i < len(blocks)]
            found.append(block.seconds(entry.steps) / fmean(one.seconds(entry.steps) for one in near))
    return found


def summarise(blocks: Sequence[Block], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row per recipe, plain first."""
    rows = []
    for entry in entries:
        found = ratios(blocks, entry, entries[0].path)
        seconds = [block.seconds(entry.steps) / entry.steps for block in blocks if block.path == entry.path]
        rows.append({
            "recipe": place(str(entry.path)), "name": entry.recipe.name, "recipe_sha256": file_sha256(entry.path),
            "method": entry.recipe.balance and entry.recipe.balance.method, "step_s": median(seconds), "ratio": median(found),
            "ratio_low": min(found), "ratio_high": max(found), "steps": entry.steps, "repeats": len(found)})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table("recipe", "method", "seconds per step", "ratio to plain", "smallest", "largest", "blocks x steps",
                  title="Cost of an optimizer step", title_justify="left")
    for row in rows:
        ratio = [f"{row[key]:.2f}" for key in ("ratio", "ratio_low", "ratio_high")]
        shown.add_row(escape(row["name"]), row["method"] or "-", f"{row['step_s']:.3f}", *ratio,
                      f"{row['repeats']} x {row['steps']}")
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--plain", type=Path, default=PLAIN, help="what the others are compared with (default: %(default)s)")
    parser.add_argument("--recipes", type=Path, nargs="+", metavar="YAML", help="default: all in the folder of --plain")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a block, at least (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each method (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.steps, args.repeats) < 1:
        parser.error("--steps and --repeats must be at least 1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")        # as train.py does
    libraries.quiet()
    try:
        entries = find(args.plain, args.recipes or sorted(args.plain.parent.glob("*.yaml")), args.steps)
        libraries.offline_if_local(entries[0].recipe.model.name)
        import torch
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()      # of every model that is loaded, across ours
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            blocks, data = measure(entries, args.repeats, Path(folder))
        base, rows = entries[0].recipe, summarise(blocks, entries)
        model = base.model.name
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        write_json(args.out, rounded({
            **parents(), "device": device, "clock": "wall time" if torch.cuda.is_available() else "processor time",
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "seed": base.seed, "batch": base.batch,
            "micro_batch": base.micro_batch, "data_sha256": data, "model": place(model),
            "model_sha256": weights_fingerprint(model) if Path(model).is_dir() else None, "recipes": rows}))
    except (RecipeError, ProblemError) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    except KeyboardInterrupt:
        print("\nstopped; nothing is written", file=sys.stderr)
        raise SystemExit(130) from None
    libraries.console().print(table(rows))
    print(f"wrote {args.out.as_posix()}", file=sys.stderr)


if __name__ == "__main__":
    main()
