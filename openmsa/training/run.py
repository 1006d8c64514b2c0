"""Run a recipe: each phase once, resumed where it was left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PrinterCallback

from openmsa.training.checkpoints import damage, last_whole_checkpoint, save_whole, write_json
from openmsa.training.data import Mixture
from openmsa.training.parallel import Processes, full_weights, join, same_everywhere
from openmsa.training.phases import Phase, Recipe
from openmsa.training.trainer import MSATrainer, Probe, training_arguments

Say = Callable[[str], None]
SHARED_WEIGHTS = "pytorch_model_fsdp.bin"  # accelerate's name for what FSDP resumes from


def train(
    recipe: Recipe,
    *,
    model,
    tokenizer,
    out: str | Path,
    probe: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    probe_every: int = 50,
    callbacks: tuple = (),
    say: Say = print,
    processes: Processes | None = None,
):
    """Train `model` by `recipe` in the folder `out` and return the trained model.

    Every phase has a folder `<number>-<name>` with its checkpoints and, when done, its model.
    Called again after an interruption, finished phases are loaded and the unfinished one goes on
    from its last whole checkpoint: the weights come out bit for bit as without the interruption.
    probe: measures the model every `probe_every` steps; what it returns is logged.
    processes: from openmsa.training.parallel.join, where several train together; the first of them
    says and writes. Left out, each holds the whole model.
    Raises ValueError if `out` holds another recipe, or if the model and a phase do not fit.
    """
    out = Path(out)
    processes = join() if processes is None else processes
    say = say if processes.first else _say_nothing
    _check(recipe, model, tokenizer, processes)
    processes.first_does(lambda: _claim(out, recipe, model, say))
    same_everywhere(model, processes)
    for number, phase in enumerate(recipe.phases):
        folder = out / f"{number}-{phase.name}"
        if processes.first_does(lambda folder=folder: _is_done(folder)):
            say(f"phase {phase.name}: already done")
            model = AutoModelForCausalLM.from_pretrained(folder / "model")
            continue
        model = _run_phase(
            recipe, number, model, tokenizer, folder, probe, probe_every, callbacks, say, processes
        )
    return model


def history(out: str | Path) -> list[dict]:
    """All logged lines of a run in their order, each with its phase, step and tokens seen."""
    out = Path(out)
    recipe = json.loads((out / "recipe.json").read_text())
    lines, before = [], 0
    for number, phase in enumerate(recipe["phases"]):
        per_step = phase["seq_len"] * phase["batch_size"] * phase["accumulate"]
        path = out / f"{number}-{phase['name']}" / "history.json"
        for line in json.loads(path.read_text()) if path.exists() else []:
            lines.append(
                {"phase": phase["name"], "tokens": before + line["step"] * per_step, **line}
            )
        before += per_step * phase["steps"]
    return lines


def _say_nothing(line: str) -> None:
    pass


def _is_done(folder: Path) -> bool:
    return (folder / "history.json").exists() and damage(folder / "model") is None


def _check(recipe: Recipe, model, tokenizer, processes: Processes) -> None:
    from openmsa.hf import is_converted, room_of

    limit = getattr(model.config, "max_position_embeddings", None)
    for phase in recipe.phases:
        processes.share_of(phase)
        if phase.attention != "dense" and not is_converted(model):
            raise ValueError(
                f"phase {phase.name!r} needs attention={phase.attention!r} but the model is dense; "
                "call openmsa.hf.convert on it first"
            )
        if is_converted(model):
            _check_mechanism(phase, room_of(model))
        if limit is not None and phase.seq_len > limit:
            raise ValueError(
                f"seq_len={phase.seq_len} of phase {phase.name!r} is longer than the model's "
                f"max_position_embeddings={limit}"
            )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, the model embeds "
            f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"weight {name} holds NaN or inf; load a sound checkpoint")


def _check_mechanism(phase: Phase, room) -> None:
    remedy = "see openmsa.training.fitted"
    if phase.attention not in room.PHASES:
        raise ValueError(
            f"phase {phase.name!r} needs attention={phase.attention!r}, which {room.NAME} lacks: "
            f"it has no index; {remedy}"
        )
    if phase.trained == "index" and not room.ADDED:
        raise ValueError(
            f"phase {phase.name!r} trains the index alone, but {room.NAME} adds nothing that could "
            f"be trained; {remedy}"
        )


def _claim(out: Path, recipe: Recipe, model, say: Say) -> None:
    """Make `out` this recipe's folder, or see that it already is."""
    path = out / "recipe.json"
    if path.exists():
        if json.loads(path.read_text()) != json.loads(json.dumps(recipe.to_dict())):
            raise ValueError(
                f"out={str(out)!r} holds a run of another recipe (see {path}); choose another"
            )
        say(f"resuming in {out}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r} is not empty and holds no run; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    _check_space(out, model)
    write_json(path, recipe.to_dict())


def _check_space(out: Path, model) -> None:
    """A run holds two checkpoints of weights and two Adam moments, a third while it is written."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    needed, free = 3 * 3 * weights + weights, shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"out={str(out)!r} has {free / 1e9:.1f} GB free, this run needs {needed / 1e9:.1f} GB; "
            "free space or choose another folder"
        )


def _run_phase(
    recipe, number, model, tokenizer, folder, probe, probe_every, callbacks, say, processes
):
    phase: Phase = recipe.phases[number]
    _prepare(model, phase)
    sequences = phase.steps * phase.batch_size * phase.accumulate
    dataset = Mixture(
        phase.data or recipe.data,
        tokenizer,
        seq_len=phase.seq_len,
        size=sequences,
        seed=f"{recipe.seed}/{number}",
    )
    checkpoint = _last_checkpoint(folder, processes, say)
    say(f"phase {phase.name}: {phase.steps} steps, {phase.tokens:,} tokens")
    observers = list(callbacks)
    if probe is not None:
        observers.append(Probe(probe, probe_every))
    use_cache = model.config.use_cache
    trainer = MSATrainer(
        model=model,
        args=training_arguments(recipe, phase, str(folder), processes),
        train_dataset=dataset,
        callbacks=observers,
        processes=processes,
    )
    for observer in observers:
        if isinstance(observer, Probe):
            observer.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # its lines are in the history
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache  # Trainer turns it off, and would save it so
    return _finish(trainer, tokenizer, folder)


def _last_checkpoint(folder: Path, processes: Processes, say: Say) -> Path | None:
    """Where the phase goes on. Raises ValueError if its weights were shared and are not now."""
    checkpoint, passed_over = processes.first_does(lambda: last_whole_checkpoint(folder))
    for line in passed_over:
        say(line)
    if checkpoint is not None:
        shared = (checkpoint / SHARED_WEIGHTS).exists()
        if shared != processes.shard:
            raise ValueError(
                f"{checkpoint} was written with shard={shared}; go on with shard={shared}, or "
                "remove it"
            )
    return checkpoint


def _prepare(model, phase: Phase) -> None:
    from openmsa.hf import added_parameters, freeze_backbone, is_converted, set_phase

    if is_converted(model):
        set_phase(model, phase.attention, index_loss_weight=phase.index_loss_weight)
        freeze_backbone(model, phase.trained == "index")
        if phase.attention == "dense":  # what was added has no part in it
            for _, parameter in added_parameters(model):
                parameter.requires_grad_(False)


def _finish(trainer: MSATrainer, tokenizer, folder: Path):
    """Save the phase and return its model; weights that were shared come back whole."""
    model, shared = trainer.accelerator.unwrap_model(trainer.model), full_weights(trainer)

    def write() -> None:
        save_whole(model, tokenizer, folder / "model", shared)
        write_json(folder / "history.json", trainer.state.log_history)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)

    trainer.processes.first_does(write)
    if shared is None:
        return _without_autocast(model)
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def _without_autocast(model):
    """The model as it was: accelerate puts autocast around its forward, and leaves it there."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    original = vars(inner).pop("_original_forward", None)
    if original is not None:
        del inner.forward
        if inner.forward != original:  # it had a forward of its own before
            inner.forward = original
    return model
