"""TRL's DPOTrainer on pairs whose sides differ in their pictures. No term lives here: training.preference puts them together."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from training.collate import IGNORED
from training.collate_pairs import PairCollator
from training.config import Recipe, RecipeError
from training.model import add_answer_logits, add_shared_pictures, picture_features, unwrap
from training.preference import CHOSEN, REJECTED, NoisePace, Side, answer_terms, combine, report
from training.sharding import gathers
from training.trainers import RecipeTrainer, arguments

REFERENCE = "ref"           # TRL's name for the frozen copy of an adapter that training began with
STATE = "preference.json"   # in checkpoints: what the terms remember


def dpo_arguments(recipe: Recipe, run_dir: Path, **where: Any) -> DPOConfig:
    """The recipe in TRL's words. ValueError: the batch cannot be divided over the ranks, or TRL refuses a value."""
    terms = answer_terms(recipe.preference) or {"sigmoid": 1.0}
    return DPOConfig(**arguments(recipe, run_dir, **where), beta=recipe.preference.beta, loss_type=list(terms),
                     loss_weights=list(terms.values()), label_smoothing=recipe.preference.label_smoothing)


@contextmanager
def as_reference(model: PeftModel) -> Iterator[None]:
    """The adapter that training began with, or none where it began with a fresh one; afterwards everything is as it was, which
    PEFT's own switching does not promise: it makes every weight of the adapter trainable."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = model.active_adapter
    try:
        if REFERENCE in model.peft_config:
            model.set_adapter(REFERENCE)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        model.set_adapter(before)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


class VisionDPOTrainer(RecipeTrainer, DPOTrainer):
    """DPOTrainer whose pairs have a rejected picture, an answer without a picture, or a language prior beside the rejected answer.

    All sides of a micro-batch are rows of one forward pass, in which every distinct picture is encoded once. TRL computes its own
    terms (`preference.answer`) from those log-probabilities; the loss is the mean over pairs.

    Args:
        model: what training.model.prepare gives. When it starts from a trained adapter (`model.adapter`), that is the reference.
        reference: the reference model when all weights are trained; else the adapter is switched off or back.

    Raises:
        RecipeError: several ranks, and a pair has no rejected answer.
    """

    def __init__(self, model, recipe: Recipe, collator: PairCollator, args: DPOConfig, callbacks: list[TrainerCallback] = (),
                 reference=None) -> None:
        self.recipe, self.preference = recipe, recipe.preference
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Policy and reference see the same picture features when nothing that makes them is trained. (Under ZeRO-3 each makes its
        # own, in its pass, where all ranks make some.)
        self.shared_features = not (recipe.trains("vision") or recipe.trains("merger") or gathers(args))
        draws = Dataset.from_dict({"draw": range(len(collator.plan))})
        with self._adapter_as_it_is(model):
            super().__init__(model=model, ref_model=reference, args=args, data_collator=collator, train_dataset=draws,
                             processing_class=collator.encoder.tokenizer, callbacks=list(callbacks))
        if isinstance(model, PeftModel):
            if recipe.model.adapter is None:
                model.delete_adapter(REFERENCE)         # of a fresh adapter: the same as none
            model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
        add_answer_logits(unwrap(model))        # a balance method's probe reads them
        add_shared_pictures(unwrap(model))
        if reference is not None:
            add_shared_pictures(self.accelerator.unwrap_model(self.ref_model))
        self.precompute_ref_logps = True        # TRL is to take the reference's log-probabilities from the batch, where we put them
        self.pace = None if self.preference.noise_aware is None else NoisePace(self.preference.noise_aware)
        self._sums: dict[str, Tensor] = {}      # since the last log: (sum, number) over pairs
        if self.accelerator.num_processes > 1 and answer_terms(self.preference):
            for stage in collator.plan.stages:
                for pairs in stage.mixture.pairs.values():
                    for pair in pairs:
                        if pair.rejected is None:
                            raise RecipeError(f"preference.answer: {pair.id} has no rejected answer, which several ranks cannot skip")
        self.set_up_balance()
        self.set_up_guards()
        self._quiet()

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset                          # of numbers of draws

    def _compute_loss(self, model, inputs, return_outputs):
        learn, places = inputs["learn"], inputs["places"]["learn"]
        features = self._features(learn)
        if (ahead := inputs.get("reference")) is None:
            reference = self.reference_log_probs(learn, features)
        out = self._look(model, learn, features)
        sums = out.log_probs.float().sum(1)
        counts = (learn["labels"] != IGNORED).sum(1)
        there = {side: rows >= 0 for side, rows in places.items()}
        rows = {side: rows.clamp(min=0) for side, rows in places.items()}
        before = {side: (ahead[side].to(sums) if ahead is not None else reference[rows[side]]) for side in places}
        d = {side: sums[rows[side]] - before[side] for side in places}
        lengths = {side: counts[rows[side]] for side in places}
        loss, shown = combine(self.preference, d, there, lengths, self.pace)
        if answer_terms(self.preference) and (able := there[CHOSEN] & there[REJECTED]).any():
            both = torch.cat([rows[CHOSEN][able], rows[REJECTED][able]])
            loss = loss + self._answer_terms(learn, out, both, before[CHOSEN][able], before[REJECTED][able]) * able.sum() / len(able)
        self._count({**shown, **report(self.preference, d, there, lengths)})
        self._watch(inputs, d, there, lengths)
        hardness = inputs["hardness"]
        self._count({"hardness": (hardness.nan_to_num(0.0).sum(), (~hardness.isnan()).sum())})
        self.before_optimizer_step()
        return (loss, out) if return_outputs else loss

    def _answer_terms(self, batch: dict, out: Any, rows: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        """TRL's own loss and metrics, from rows that were computed already.

        Args:
            rows: (2 * pairs,) first those of the chosen, then those of the rejected answers.
            chosen, rejected: (pairs,) log-probabilities under the reference.
        """
        labels = batch["labels"][rows]
        longest = int(batch["attention_mask"][rows].sum(1).max())       # other sides may be longer
        computed = SimpleNamespace(**{name: getattr(out, name)[rows][:, :longest - 1]
                                      for name in ("log_probs", "entropy", "mean_logits", "is_top1")})
        inputs = {"input_ids": batch["input_ids"][rows][:, :longest], "attention_mask": batch["attention_mask"][rows][:, :longest],
                  "completion_mask": (labels != IGNORED).long()[:, :longest], "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return super()._compute_loss(lambda **_: computed, inputs, False)

    def _watch(self, inputs: dict, d: dict[Side, Tensor], there: dict[Side, Tensor], lengths: dict[Side, Tensor]) -> None:
        """Log the sides that no term needs, without a gradient."""
        batch, places = inputs.get("watch"), inputs["places"].get("watch")
        if not places:
            return
        ahead = inputs.get("reference")
        sums = reference = torch.zeros(1, device=self.args.device)
        if not batch and gathers(self.args):
            batch = inputs["learn"]     # others may run the model
        if batch:       # else no pair here has such a side; what is logged has the same names on every rank all the same
            with torch.no_grad():
                features = self._features(batch)
                sums = self._look(self.model, batch, features).log_probs.float().sum(1)
                reference = self.reference_log_probs(batch, features) if ahead is None else None
        more = {}
        for side, rows in places.items():
            place = rows.clamp(min=0)
            more[side] = sums[place] - (reference[place] if ahead is None else ahead[side].to(sums))
            there = {**there, side: rows >= 0}
            lengths = {**lengths, side: lengths[CHOSEN]}
        shown = report(self.preference, {CHOSEN: d[CHOSEN], **more}, there, lengths)
        self._count({name: value for name, value in shown.items() if any(str(side) in name for side in more)
                     or name in ("margin/picture", "margin/blind")})

    def _features(self, batch: dict) -> tuple[Tensor, ...] | None:
        """The pictures' features where policy and reference share them; None: each makes its own."""
        if not self.shared_features or "pixel_values" not in batch:
            return None
        with torch.no_grad():
            return picture_features(unwrap(self.model), batch["pixel_values"], batch["image_grid_thw"])

    def _look(self, model, batch: dict, features: tuple[Tensor, ...] | None) -> Any:
        """What TRL's fused head gives for the labels of every row."""
        blank = self._blank(batch, torch.is_grad_enabled() and not self.shared_features)
        return model(**batch, features=features, blank=blank, use_cache=False, fused_lm_head=True)

    def reference_log_probs(self, batch: dict, features: tuple[Tensor, ...] | None = None) -> Tensor:
        """(rows,) log-probabilities of the answers under the reference, summed over their tokens. No gradient."""
        with (torch.no_grad(), self.accelerator.autocast(),
              disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)):
            if self.ref_model is not None:
                return self._look(self.ref_model, batch, None).log_probs.float().sum(1)
            with as_reference(self.accelerator.unwrap_model(self.model)):
                return self._look(self.model, batch, features).log_probs.float().sum(1)

    def get_batch_samples(self, *args, **kwargs):
        self._margin = self.pace and self.pace.mean     # that the step begins with
        return super().get_batch_samples(*args, **kwargs)

    def _replay(self, *args, **kwargs) -> None:
        """Passes that are repeated begin as the first ones did, and leave no trace in what is logged and remembered."""
        sums, metrics, margin = dict(self._sums), copy.deepcopy(self._metrics), self.pace and self.pace.mean
        if self.pace is not None:
            self.pace.mean = self._margin
        super()._replay(*args, **kwargs)
        self._sums, self._metrics = sums, metrics
        if self.pace is not None:
            self.pace.mean = margin

    def _count(self, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, number) in sums.items():
            value = torch.stack([total.detach().float(), number.float()])
            self._sums[name] = self._sums.get(name, 0) + value

    def counted(self) -> dict[str, float]:
        """Means over the pairs that have what is counted."""
        names = sorted(self._sums)              # the same on every rank
        sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum").tolist()
        self._sums = {}
        return {name: total / number for name, (total, number) in zip(names, sums) if number}

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self.pace is not None and self.pace.mean is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).write_text(json.dumps({"noise_margin": float(self.pace.mean)}), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.pace is not None and (path := Path(checkpoint) / STATE).exists():
            self.pace.mean = torch.tensor(json.loads(path.read_text(encoding="utf-8"))["noise_margin"], device=self.args.device)
