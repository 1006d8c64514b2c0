"""`transformers.Trainer` with the index loss in its log, and sequences in their order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from openmsa.hf import has_index, msa_layers
from openmsa.training.checkpoints import seal
from openmsa.training.parallel import Processes, context_loader, join, not_finite
from openmsa.training.phases import Phase, Recipe


def training_arguments(
    recipe: Recipe, phase: Phase, folder: str, processes: Processes
) -> TrainingArguments:
    """The arguments of one phase for one of the processes; a GPU is used where there is one."""
    batch_size, accumulate = processes.share_of(phase)
    if processes.shard:
        more = _shard_arguments(phase.checkpoint_activations)
    else:
        more = _recompute_arguments() if phase.checkpoint_activations else {}
    return TrainingArguments(
        output_dir=folder,
        max_steps=phase.steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
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
        **more,
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


def _shard_arguments(checkpoint_activations: bool) -> dict:
    """FSDP2, a unit for every decoder layer; its own checkpointing gathers a layer only once."""
    how = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "activation_checkpointing": checkpoint_activations,
    }
    return {"fsdp": True, "fsdp_config": how}


class MSATrainer(Trainer):
    """Adds the language model loss and the KL of every layer to the log.

    The loss itself needs no change here: a converted model returns the whole of it (see
    `openmsa.hf`), scaled right under accumulation and over several processes because each
    micro-batch is told how many query tokens the whole step holds, in all processes.
    """

    def __init__(self, *args, processes: Processes | None = None, **kwargs):
        self.processes = join() if processes is None else processes
        super().__init__(*args, **kwargs)
        self._index_loss = None
        self._lm_loss = 0.0
        self._passes = 0

    def create_accelerator_and_postprocess(self):
        plain = getattr(self.args, "fsdp_plugin_args", None)
        if plain is not None and self.args.bf16:
            plain["mixed_precision_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if plain is not None and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate offers FSDP on accelerators only, but none of its code needs one.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**plain)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled != self.processes.shard:
            raise ValueError(
                f"shard={self.processes.shard} contradicts what accelerate was told of FSDP; leave "
                "it out of that config and ask for it by shard=True (openmsa train --shard)"
            )

    def get_train_dataloader(self):
        if self.processes.context == 1:
            return super().get_train_dataloader()
        size = self.args.per_device_train_batch_size
        return context_loader(self.train_dataset, size, self.processes)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if has_index(self.model):
            rows = torch.tensor(sum(_real_tokens(batch) for batch in batches), device=device)
            rows = int(self.processes.total(rows))
            batches = [{**batch, "index_rows_in_batch": rows} for batch in batches]
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training and "index_loss" in outputs:
            share = _real_tokens(inputs) / inputs["index_rows_in_batch"]
            per_layer = outputs["index_loss"].detach() * share
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
            sums = torch.cat([self._lm_loss[None].to(self._index_loss), self._index_loss])
            lm_loss, *per_layer = (self.processes.total(sums) / steps).tolist()
            names = [f"kl/layer_{n}" for n in msa_layers(self.model)]
            logs = {**logs, "lm_loss": lm_loss, **dict(zip(names, per_layer, strict=True))}
            self._index_loss, self._lm_loss, self._passes = None, 0.0, 0
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        if (name := not_finite(self.model, self.processes)) is not None:
            raise ValueError(f"weight {name} became NaN or inf; lower learning_rate")
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.processes.first:
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
    if "context" in batch:
        return batch["context"].num_queries
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()
