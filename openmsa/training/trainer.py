"""`transformers.Trainer` with the index loss in its log, and sequences in their order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from openmsa.hf import is_msa, msa_layers
from openmsa.training.checkpoints import seal
from openmsa.training.phases import Phase, Recipe


def training_arguments(recipe: Recipe, phase: Phase, folder: str) -> TrainingArguments:
    """The arguments of one phase; a GPU is used where there is one."""
    recompute = _recompute_arguments() if phase.checkpoint_activations else {}
    return TrainingArguments(
        output_dir=folder,
        max_steps=phase.steps,
        per_device_train_batch_size=phase.batch_size,
        gradient_accumulation_steps=phase.accumulate,
        learning_rate=phase.learning_rate,
        **_schedule(phase),
        weight_decay=phase.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=recipe.precision == "bf16" or (recipe.precision == "auto" and fast_bf16()),
        torch_compile=recipe.compile,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_every,
        save_total_limit=2,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        remove_unused_columns=False,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=["tensorboard"],
        **recompute,
    )


def _schedule(phase: Phase) -> dict:
    """Warm up, then stay, or fall along a cosine or a line to `decay_to` of the learning rate."""
    common = {"warmup_steps": phase.warmup_steps}
    if phase.schedule == "constant":
        return {"lr_scheduler_type": "constant_with_warmup", **common}
    if phase.schedule == "cosine":
        least = {"min_lr_rate": phase.decay_to}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": least, **common}
    line = {
        "num_decay_steps": max(1, phase.steps - phase.warmup_steps),
        "decay_type": "linear",
        "min_lr_ratio": phase.decay_to,
    }
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": line, **common}


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 faster than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _recompute_arguments() -> dict:
    """Checkpointed activations, under the name that this version of transformers gives them.

    Non-reentrant only: the reentrant kind runs layers without gradients, and the KL would be lost.
    """
    known = {field.name for field in fields(TrainingArguments)}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if name in known:
            return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    raise ValueError("checkpoint_activations=True: this transformers has no checkpointing argument")


class MSATrainer(Trainer):
    """Adds the language model loss and the KL of every layer to the log.

    The loss itself needs no change here: a converted model returns the whole of it (see
    `openmsa.hf`), scaled right under accumulation because each micro-batch is told how many query
    tokens the whole step holds.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._index_loss = None
        self._lm_loss = 0.0
        self._passes = 0

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if is_msa(self.model):
            rows = sum(_real_tokens(batch) for batch in batches)
            batches = [{**batch, "index_rows_in_batch": rows} for batch in batches]
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training and "index_loss" in outputs:
            per_layer = outputs["index_loss"].detach()
            self._index_loss = (
                per_layer if self._index_loss is None else self._index_loss + per_layer
            )
            self._lm_loss += outputs["lm_loss"].detach()
            self._passes += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if not math.isfinite(float(logs.get("loss", 0.0))):
            raise ValueError(
                f"the loss became {logs['loss']} at step {self.state.global_step}; lower "
                "learning_rate and run again: it goes on from the last checkpoint"
            )
        if "loss" in logs and self._passes:
            steps = self._passes / self.args.gradient_accumulation_steps
            logs = {**logs, "lm_loss": float(self._lm_loss / steps)}
            layers = msa_layers(self.model)
            per_layer = (self._index_loss / self._passes).tolist()
            logs |= {f"kl/layer_{n}": kl for n, kl in zip(layers, per_layer, strict=True)}
            self._index_loss, self._lm_loss, self._passes = None, 0.0, 0
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"weight {name} became NaN or inf; lower learning_rate")
        super()._save_checkpoint(*args, **kwargs)
        seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


class Probe(TrainerCallback):
    """Calls `measure(model)` every so many steps and puts what it returns into the log."""

    def __init__(self, measure: Callable[[torch.nn.Module], dict[str, float]], every: int):
        self.measure, self.every, self.trainer = measure, every, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step in (1, args.max_steps):
            wanted = control.should_log
            self.trainer.log(measured(model, self.measure))
            control.should_log = wanted  # logging takes the step's own request for a log away


def measured(model: torch.nn.Module, measure: Callable[[torch.nn.Module], dict]) -> dict:
    """Run `measure` in evaluation mode, without gradients and without touching random states."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        result = measure(model)
    model.train(was_training)
    return result


def _real_tokens(batch: dict) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()
