"""Thin subclasses of TRL's trainers. No method lives here: batches carry views and weights, losses are pure functions."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from modeling.adapters import load_mender, save_extras
from training.balanced import Balanced
from training.guards import Guarded
from training.collate import IGNORED, Collator, answer_numbers
from training.config import Recipe
from training.model import add_answer_logits, add_shared_pictures, parameter_groups, unwrap
from training.objective import Answers
from training.pace import scheduler, set_rates
from training.sharding import gathers, settings_of, stage_of


def arguments(recipe: Recipe, run_dir: Path, *, world_size: int = 1, deepspeed: str | dict | None = None) -> dict[str, Any]:
    """The recipe in the words that all of TRL's trainers share.

    Raises:
        ValueError: the batch cannot be divided over the ranks.
    """
    if recipe.batch % (recipe.micro_batch * world_size):
        raise ValueError(f"batch={recipe.batch} is not a multiple of micro_batch={recipe.micro_batch} x {world_size} ranks")
    cuda = torch.cuda.is_available()
    stage = 0 if deepspeed is None else stage_of(settings_of(deepspeed))
    return dict(
        output_dir=str(run_dir / "checkpoints"), seed=recipe.seed, data_seed=recipe.seed,
        max_steps=recipe.steps, per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch // world_size,
        learning_rate=max(recipe.optim.lr.vision, recipe.optim.lr.merger, recipe.optim.lr.language),
        lr_scheduler_type=recipe.optim.schedule, warmup_steps=recipe.optim.warmup_steps,
        weight_decay=recipe.optim.weight_decay, adam_beta1=recipe.optim.betas[0], adam_beta2=recipe.optim.betas[1],
        max_grad_norm=recipe.optim.clip,
        optim="adamw_torch" if recipe.optim.name == "adamw" else "paged_adamw_8bit" if cuda else "adamw_bnb_8bit",
        # On a CPU, TRL's defaults mean bf16 autocast and checkpointing, both slower than doing without.
        use_cpu=not cuda, bf16=cuda and recipe.model.dtype == "bfloat16",
        gradient_checkpointing=recipe.model.checkpointing,
        # TRL forces the same under ZeRO-3, whose gathering LoRA's other kind of checkpointing does not see.
        gradient_checkpointing_kwargs={"use_reentrant": stage == 3 and recipe.lora is not None} if recipe.model.checkpointing else None,
        ddp_find_unused_parameters=False,
        max_length=None, remove_unused_columns=False,
        # The order is the mixture's: draw n is row n, for any number of ranks and workers, and a resumed run skips by index.
        train_sampling_strategy="sequential", dataloader_num_workers=recipe.data.workers,
        dataloader_persistent_workers=recipe.data.workers > 0, dataloader_pin_memory=cuda,
        save_strategy="steps", save_steps=recipe.save.every,
        logging_steps=recipe.log_every, logging_first_step=True, logging_nan_inf_filter=False,
        report_to=[], disable_tqdm=True, deepspeed=deepspeed)


def sft_arguments(recipe: Recipe, run_dir: Path, **where: Any) -> SFTConfig:
    """See `arguments`."""
    return SFTConfig(**arguments(recipe, run_dir, **where), dataset_kwargs={"skip_prepare_dataset": True})


class RecipeTrainer(Guarded, Balanced):
    """What our trainers change about TRL's: a learning rate per tower, the recipe's schedule, sums that are logged as means.

    `recipe` is set before TRL's own __init__ runs.
    """

    recipe: Recipe
    _by_recipe = False          # whether the optimizer's groups are those of training.model.parameter_groups

    @staticmethod
    @contextmanager
    def _adapter_as_it_is(model: nn.Module) -> Iterator[None]:
        """TRL rounds the adapter of a quantised model to bfloat16, in which an update a thousand times smaller than its weight is
        lost. Here it stays what it was."""
        kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        yield
        for parameter, data in kept:
            parameter.data = data.to(parameter.device)

    def _quiet(self) -> None:
        self.remove_callback(PrinterCallback)       # the progress bar and metrics.jsonl say the same

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(parameter_groups(self.model, self.recipe), **kwargs)
            self._by_recipe = True
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            self.lr_scheduler = scheduler(self.recipe, optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """A checkpoint of all weights has the names of the hub's files, which the trainer would compare with the module's, find
        nothing in common, and continue from the weights it started with."""
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if hasattr(unwrap(self.model), "mender"):
                load_mender(self.model, resume_from_checkpoint)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and the step are the checkpoint's; rates, weight decay and betas are the recipe's, which may have been changed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._by_recipe:
            pace = self.lr_scheduler
            while hasattr(pace, "scheduler"):
                pace = pace.scheduler           # inside accelerate's wrapper
            set_rates(self._bare_optimizer(), pace, parameter_groups(self.model, self.recipe), self.recipe.optim.betas)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            save_extras(self.accelerator.unwrap_model(self.model), Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _blank(self, batch: dict, learns: bool) -> bool:
        """Whether this rank, without a picture, is to encode a blank one because others may have some.

        It must give the vision tower a gradient, of zeros, or they would wait for it (DDP) or add up buckets of different lengths
        (DeepSpeed, which even on one rank takes an earlier gradient where the last micro-batch has none). Under ZeRO-3 it must run
        that tower whether there is a gradient or not.
        """
        return self._several and "pixel_values" not in batch and (learns or gathers(self.args))

    @property
    def _several(self) -> bool:
        """Whether ranks, or DeepSpeed, rely on every pass making the same gradients in the same order."""
        return self.accelerator.num_processes > 1 or self.is_deepspeed_enabled

    def look_at(self, model, batch: dict, learns: bool, full: bool) -> Answers:
        """The answers' tokens of a batch as the model sees them, with a gradient where it `learns`."""
        labels = batch["labels"]
        trained = labels[:, 1:] != IGNORED
        batch = {key: value for key, value in batch.items() if key != "loss_weight"}
        with nullcontext() if learns else torch.no_grad():
            batch["blank"] = self._blank(batch, learns)
            if self._several:       # pictures before words, as where there is a blank one
                batch["pictures"] = torch.arange(len(batch.get("image_grid_thw", ())), device=self.args.device)
            if full:
                outputs = model(**batch, use_cache=False, answer_logits=True)
                logps = outputs.logits.float().log_softmax(-1)
                wanted = labels[:, 1:][trained]
                found = Answers(logps.gather(1, wanted[:, None])[:, 0], logps.argmax(-1) == wanted,
                                -(logps.exp() * logps).sum(-1).detach(), logps, outputs.hidden_states[0])
            else:
                outputs = model(**batch, use_cache=False, fused_lm_head=True)
                found = Answers(outputs.log_probs[trained], outputs.is_top1[trained].bool(),
                                outputs.entropy[trained].detach(), None)
        return found

    def counted(self) -> dict[str, float]:
        """What was counted since the last log, over all ranks; then forgotten."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs.pop("learning_rate", None) is not None:
            logs.update(self._rates | self.counted() | self.balance_shown() | self.guard_shown())
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        """Called between the optimizer's step and the schedule's: the rates that the step was made with."""
        several = {group["tower"] for group in self.optimizer.param_groups if group.get("modality") == "shared"}
        self._rates = {f"lr_{group['tower']}" + (f"_{group['modality']}" if group["tower"] in several else ""): group["lr"]
                       for group in self.optimizer.param_groups}
        return super()._get_learning_rate()

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL writes a card into every checkpoint; ours belongs to the finished run."""


class VisionSFTTrainer(RecipeTrainer, SFTTrainer):
    """SFTTrainer whose batches come from a mixture, with a float weight per token and a learning rate per tower.

    The loss of an optimizer step is the weighted sum over all its micro-batches and ranks, divided by the weight of the whole
    step. (Stock TRL averages the means of micro-batches for this model class, which counts short answers more.)
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model, recipe: Recipe, collator: Collator, args: SFTConfig, callbacks: list[TrainerCallback] = ()) -> None:
        self.recipe = recipe
        draws = Dataset.from_dict({"draw": range(len(collator.plan))})
        with self._adapter_as_it_is(model):
            super().__init__(model=model, args=args, data_collator=collator, train_dataset=draws,
                             processing_class=collator.encoder.tokenizer, callbacks=list(callbacks))
        add_answer_logits(unwrap(self.model))
        add_shared_pictures(unwrap(self.model))
        self._counted: dict[str, torch.Tensor] = {}     # since the last log: sums over trained tokens, and their number
        self._tokens: torch.Tensor | None = None        # trained tokens of the optimizer step, over micro-batches and ranks
        self._answers: torch.Tensor | None = None       # likewise
        self.set_up_balance()
        self.set_up_guards()
        self._quiet()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        sums = sum(torch.stack([batch["loss_weight"][:, 1:].sum(), (batch["labels"][:, 1:] != IGNORED).sum(),
                                batch["labels"].new_tensor(len(batch.get("at", ())))]) for batch in batch_samples).to(device)
        total, self._tokens, self._answers = self.accelerator.gather(sums[None]).sum(0)
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        del inputs["draws"]
        objective = self.data_collator.objectives[inputs.pop("stage")]
        drawn = inputs.pop("views")
        method = {name: inputs.pop(name) for name in ("branches", "at", "token", "extras") if name in inputs}
        if self._only is not None:
            return self.branch_loss(model, method, num_items_in_batch) * self.accelerator.num_processes
        batches = {**inputs.pop("roles"), None: inputs}
        trained = inputs["labels"][:, 1:] != IGNORED
        weight = inputs["loss_weight"][:, 1:][trained]
        looks: dict[str | None, Answers] = {}

        def look(role: str | None, learns: bool, full: bool) -> Answers:
            if role is None and self.balance is not None:
                self.balance.begin(method.get("extras", {}))
                full = full or bool(method["branches"])
            looks[role] = self.look_at(model, batches[role], learns, full)
            return looks[role]

        count = weight.new_tensor(len(weight))
        # Outside an optimizer step (an evaluation loop) the batch stands alone.
        total, tokens = (weight.sum(), count) if num_items_in_batch is None else (num_items_in_batch, self._tokens)
        view = drawn[trained.nonzero()[:, 0]]
        loss, shown = objective(look, weight, answer_numbers(inputs["labels"]), view, total, tokens)
        main = looks[None]
        if self.balance is not None:
            answers = len(method.get("at", ())) if num_items_in_batch is None else self._answers
            more = self.balance_loss(model, {**method, "labels": inputs["labels"]}, main, answers)
            loss = loss if more is None else loss + more
            self.before_optimizer_step()
        if not self._again:
            self._count({"tokens": count, "token_accuracy": main.right.sum(), "entropy": main.entropy.sum(), **shown})
        # Ranks average their gradients, while the totals are those of all ranks.
        loss = loss * self.accelerator.num_processes
        return (loss, main) if return_outputs else loss

    def _count(self, sums: dict[str, torch.Tensor]) -> None:
        for name, value in sums.items():
            self._counted[name] = self._counted.get(name, 0) + value.detach().float()

    def counted(self) -> dict[str, float]:
        """Means over trained tokens."""
        names = sorted(self._counted)       # the same on every rank, as all are in the same stage
        sums = dict(zip(names, self.accelerator.reduce(torch.stack([self._counted[name] for name in names]), reduction="sum").tolist()))
        self._counted = {}
        tokens = max(sums.pop("tokens"), 1)
        return {name: value / tokens for name, value in sums.items()}
