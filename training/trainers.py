"""Thin subclasses of TRL's trainers. No method lives here: batches carry views and weights, losses are pure functions."""

import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from training.collate import Collator
from training.config import Recipe
from training.losses import weighted_nll
from training.model import parameter_groups

COMPLETE = "complete"       # a file that is written last into a checkpoint: without it, a checkpoint is not one


def sft_arguments(recipe: Recipe, run_dir: Path, *, world_size: int = 1, deepspeed: str | None = None) -> SFTConfig:
    """The recipe in TRL's words.

    Raises:
        ValueError: the batch cannot be divided over the ranks.
    """
    if recipe.batch % (recipe.micro_batch * world_size):
        raise ValueError(f"batch={recipe.batch} is not a multiple of micro_batch={recipe.micro_batch} x {world_size} ranks")
    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(run_dir / "checkpoints"), seed=recipe.seed, data_seed=recipe.seed,
        max_steps=recipe.steps, per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch // world_size,
        learning_rate=max(recipe.optim.lr.vision, recipe.optim.lr.merger, recipe.optim.lr.language),
        lr_scheduler_type=recipe.optim.schedule, warmup_steps=recipe.optim.warmup_steps,
        weight_decay=recipe.optim.weight_decay, adam_beta1=recipe.optim.betas[0], adam_beta2=recipe.optim.betas[1],
        max_grad_norm=recipe.optim.clip, optim="adamw_torch",
        # On a CPU, TRL's defaults mean bf16 autocast and checkpointing, both slower than doing without.
        use_cpu=not cuda, bf16=cuda and recipe.model.dtype == "bfloat16",
        gradient_checkpointing=recipe.model.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.model.checkpointing else None,
        ddp_find_unused_parameters=world_size > 1 and not deepspeed,    # a text-only batch leaves the vision tower without gradients
        max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        # The order is the mixture's: draw n is row n, for any number of ranks and workers, and a resumed run skips by index.
        train_sampling_strategy="sequential", dataloader_num_workers=recipe.data.workers,
        dataloader_persistent_workers=recipe.data.workers > 0, dataloader_pin_memory=cuda,
        save_strategy="steps", save_steps=recipe.save.every, save_total_limit=recipe.save.keep,
        logging_steps=recipe.log_every, logging_first_step=True, logging_nan_inf_filter=False,
        report_to=["tensorboard"], disable_tqdm=True, deepspeed=deepspeed)


class VisionSFTTrainer(SFTTrainer):
    """SFTTrainer whose batches come from a mixture, with a float weight per token and a learning rate per tower.

    The loss of an optimizer step is the weighted sum over all its micro-batches and ranks, divided by the weight of the whole
    step. (Stock TRL averages the means of micro-batches for this model class, which counts short answers more.)
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model, recipe: Recipe, collator: Collator, args: SFTConfig, callbacks: list[TrainerCallback] = ()) -> None:
        self.recipe = recipe
        draws = Dataset.from_dict({"draw": range(len(collator.mixture))})
        super().__init__(model=model, args=args, data_collator=collator, train_dataset=draws,
                         processing_class=collator.encoder.tokenizer, callbacks=list(callbacks))
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(parameter_groups(self.model, self.recipe), **kwargs)
        return self.optimizer

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        total = torch.stack([batch["loss_weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(total).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = inputs.pop("loss_weight")[:, 1:]
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        total = weight.sum() if num_items_in_batch is None else num_items_in_batch
        # Ranks average their gradients, while the total is that of all ranks.
        loss = weighted_nll(outputs.log_probs, weight, total) * self.accelerator.num_processes
        mode = "train" if self.model.training else "eval"
        trained = outputs.label_mask.sum().clamp(min=1)
        self._metrics[mode]["token_accuracy"].append((outputs.is_top1.sum() / trained).item())
        self._metrics[mode]["entropy"].append((outputs.entropy.detach().sum() / trained).item())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            logs.pop("learning_rate")
            for group in self.optimizer.param_groups:
                logs[f"lr_{group['tower']}"] = group["lr"]
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL writes a card into every checkpoint; ours belongs to the finished run."""


class MarkComplete(TrainerCallback):
    """Writes the mark of a whole checkpoint, after everything else in it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class Metrics(TrainerCallback):
    """metrics.jsonl (one JSON object per logged step) and a progress bar with loss and examples per second."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._bar = None
        if not state.is_world_process_zero:
            return
        from tqdm import tqdm

        # Lines logged after the checkpoint that a run continues from are logged again.
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(f"{line}\n" for line in kept))
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.path.parent.name, unit="step", mininterval=2)
        self._start = (time.perf_counter(), state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self._bar is None or "loss" not in logs:
            return
        seconds, steps = time.perf_counter() - self._start[0], state.global_step - self._start[1]
        rate = steps * self.batch / seconds
        self._bar.set_postfix(loss=f"{logs['loss']:.3f}", examples_per_s=f"{rate:.1f}")
        row = {"step": state.global_step, **logs, "examples_per_s": round(rate, 2)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.close()


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [mark.parent for mark in (run_dir / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
