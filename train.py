"""Train a recipe.

    python train.py RECIPE [key=value ...] [--dry-run] [--resume [--allow-changes]]
    deepspeed train.py RECIPE --deepspeed ds_configs/zero2.json

No method lives here: a recipe names the mixture, the losses and the pace of each tower; training/ builds them.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from data_prep import libraries

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


OUT_OF_MEMORY = ("error: out of GPU memory. What helps, in this order: a smaller micro_batch (batch stays, and with it the result), "
                 "model.checkpointing=true, a smaller model.max_pixels, fewer turns in the mixture, --deepspeed ds_configs/zero2.json "
                 "on several GPUs; --dry-run estimates what a recipe needs")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description="Train a recipe.")
    parser.add_argument("recipe", help="a YAML file under recipes/, or a pipeline of several")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr.vision=1e-4; recorded in the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, on what, and stop")
    parser.add_argument("--resume", action="store_true", help="continue the run in run_dir, if there is one")
    parser.add_argument("--allow-changes", action="store_true", help="with --resume: the recipe or the data may have changed since the run "
                        "began; what changed, and at which step, is recorded")
    parser.add_argument("--deepspeed", metavar="JSON", help="a DeepSpeed configuration, see ds_configs/")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)     # launchers pass it
    return parser.parse_intermixed_args(argv)       # overrides may follow options


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    libraries.quiet()
    from data_prep.problem import ProblemError
    from training.config import RecipeError, load_pipeline

    try:
        recipes = load_pipeline(args.recipe, args.overrides)
        if args.allow_changes and not args.resume:
            raise RecipeError("--allow-changes: goes together with --resume; a run that begins has nothing that it could change")
        if args.deepspeed and not Path(args.deepspeed).is_file():
            raise RecipeError(f"--deepspeed: no such file: {args.deepspeed}")
        for recipe in recipes:
            libraries.offline_if_local(recipe.model.name)
            if args.dry_run:
                dry_run(recipe)
            else:
                train(recipe, resume=args.resume, allow_changes=args.allow_changes, deepspeed=args.deepspeed)
    except (RecipeError, ProblemError) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":      # torch's, which is not imported here
            raise SystemExit(OUT_OF_MEMORY) from error
        from training.run import file_trouble

        if (sentence := file_trouble(error)) is None:
            raise
        raise SystemExit(f"error: {sentence}") from error
    except KeyboardInterrupt:
        words = [args.recipe, *args.overrides, *(("--deepspeed", args.deepspeed) if args.deepspeed else ()), "--resume"]
        print(f"\nstopped; continue with: python train.py {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(130) from None


def dry_run(recipe) -> None:
    import yaml

    from training.collate import load_encoder
    from training.estimate import estimate_table
    from training.model import empty_base, prepare, tower_table
    from training.plan import Plan

    console = libraries.console()
    console.print(yaml.safe_dump(recipe.to_dict(), sort_keys=False), markup=False, highlight=False)
    encoder = load_encoder(recipe.model)
    plan = Plan(recipe)
    fresh = replace(recipe, model=replace(recipe.model, adapter=None))      # the one that it starts from need not be there yet
    model = prepare(empty_base(recipe.model), fresh, encoder)
    console.print(tower_table(model, recipe))
    for stage in plan.stages:
        console.print(stage.table(encoder))
    console.print(estimate_table(model, recipe, plan, encoder))


def train(recipe, *, resume: bool, allow_changes: bool = False, deepspeed: str | None = None) -> None:
    import torch
    import transformers
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    from training.build import arguments_of, build_trainer
    from training.callbacks import MarkComplete, Metrics, RestartOptimizer, step_of
    from training.collate import load_encoder
    from training.model import load_base, prepare, tower_table
    from training.plan import Plan
    from training.run import RunFolder
    from training.sharding import check_checkpoint, config_of, ranks_of
    from training.universal import universal, universal_settings

    if recipe.data.workers:     # by descriptors, a thread of a worker serves them, and complains in a traceback when all are stopped
        torch.multiprocessing.set_sharing_strategy("file_system")
    deepspeed = config_of(deepspeed)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    console = libraries.console(quiet=rank != 0)
    # Rank 0 decides; it may have begun the folder already.
    folder = RunFolder(recipe, resume=resume or rank > 0, allow_changes=allow_changes)
    if folder.finished:
        console.print(f"{folder.path} is finished: {recipe.steps} steps, {folder.info['seconds']:.0f} s")
        return
    run_dir = Path(recipe.run_dir)
    transformers.set_seed(recipe.seed)
    plan = Plan(recipe)
    encoder = load_encoder(recipe.model)
    hashes, checkpoint = plan.hashes | adapter_hash(recipe), folder.checkpoint
    folder.check_data(hashes)
    if checkpoint is not None:
        plan.check(checkpoint, step_of(checkpoint), changed=allow_changes)
        check_checkpoint(checkpoint, deepspeed, world_size)
    other_ranks = checkpoint is not None and ranks_of(checkpoint) not in (0, world_size)
    if other_ranks:
        deepspeed = universal_settings(deepspeed)
    arguments = arguments_of(recipe, world_size=world_size, deepspeed=deepspeed)
    model = prepare(load_base(recipe.model), recipe, encoder)
    console.print(tower_table(model, recipe))
    for stage in plan.stages:
        console.print(stage.table(encoder))
    if rank == 0:
        folder.start(hashes)
    metrics = Metrics(run_dir / "metrics.jsonl", recipe.batch)
    callbacks = [MarkComplete(recipe.save.keep, plan.save), RestartOptimizer(recipe), metrics]
    if rank == 0:
        callbacks.append(TensorBoardCallback(SummaryWriter(str(run_dir / "tensorboard"))))
    trainer = build_trainer(recipe, plan, encoder, model, arguments, callbacks)
    if recipe.preference is not None and recipe.preference.reference == "ahead":
        from training.reference import ahead_of_training, key_of

        cache = Path(recipe.preference.cache or run_dir / "reference")
        trainer.data_collator.reference = ahead_of_training(trainer, cache, key_of(recipe, plan, encoder, trainer.model))
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint}")
    with universal(checkpoint) if other_ranks else nullcontext(checkpoint) as begun:
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    kind = "model" if recipe.lora is None else "adapter"
    save(trainer, run_dir / kind)
    if rank == 0:
        if kind == "model":
            encoder.tokenizer.save_pretrained(run_dir / kind)
            encoder.image_processor.save_pretrained(run_dir / kind)
        folder.record(finished=True, seconds=round(metrics.seconds, 1), steps=recipe.steps)
        console.print(f"{run_dir / kind} is written: {recipe.steps} steps, {metrics.seconds:.0f} s")


def adapter_hash(recipe) -> dict[str, str]:
    """The adapter that a run starts from, as one of its parents."""
    from data_prep.provenance import weights_fingerprint

    adapter = recipe.model.adapter
    return {adapter: weights_fingerprint(adapter)} if adapter and Path(adapter).is_dir() else {}


def save(trainer, path: Path) -> None:
    """Write model or adapter beside its place, then move it there: a killed process leaves no half of one."""
    from modeling.adapters import save_extras

    part = path.with_name(path.name + ".part")
    if trainer.args.process_index == 0:
        shutil.rmtree(part, ignore_errors=True)
    trainer.save_model(str(part))
    if trainer.args.process_index == 0:
        for extra in ("training_args.bin", "README.md"):
            (part / extra).unlink(missing_ok=True)
        save_extras(trainer.accelerator.unwrap_model(trainer.model), part)
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
