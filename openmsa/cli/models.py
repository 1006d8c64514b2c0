"""Models and tokenizers for the verbs; a checkpoint's faults are named before work starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openmsa.cli.door import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

M3 = "minimax_m3"  # how the model types of MiniMax-M3 begin
TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")  # how their names begin


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is none; choose auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


def check_name(name: str) -> None:
    """Refuse a path that holds no checkpoint; any other `owner/name` may be on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name} holds no config.json: it is not a checkpoint's folder")
        return
    if path.is_file():
        raise UsageError(f"{name} is a file; name the folder that holds its config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UsageError(f"there is no folder {name!r}")


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """A causal language model, dense or MSA, from a folder or the hub, ready to read; a MiniMax-M3
    comes enabled.

    Raises UsageError for a name that leads nowhere, ValueError for a checkpoint that lacks weights
    or holds NaN or infinity.
    """
    check_name(name)
    target = pick_device(device)
    import torch
    from transformers import AutoModelForCausalLM

    from openmsa import hf

    _prepare()
    model, told = _from_pretrained(
        AutoModelForCausalLM,
        name,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        output_loading_info=True,
    )
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights, {missing[0]} among them; "
            "the checkpoint is incomplete"
        )
    _check_finite(model, name)
    if model.config.model_type.startswith(M3):
        model = hf.enable(model)
    return model.to(target).eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the model.

    Raises OSError if there is none: transformers would make one up that knows no text.
    """
    check_name(name)
    if not has_tokenizer(name):
        raise OSError(
            f"{name} holds no tokenizer (no file {' or '.join(TOKENIZER_FILES)}...); copy into it "
            "the files tokenizer* of the model that it was trained from"
        )
    from transformers import AutoTokenizer

    _prepare()
    return _from_pretrained(AutoTokenizer, name)


def has_tokenizer(name: str) -> bool:
    """Whether a local checkpoint has a tokenizer beside it; a name on the hub is taken to."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return True
    return any(file.name.startswith(TOKENIZER_FILES) for file in path.iterdir())


def short_name(name: str) -> str:
    """The last part of a path or hub name, for tables and file names."""
    return Path(name.rstrip("/")).name or name


def _prepare() -> None:
    """Make MSA checkpoints known to transformers, and keep its chatter off the screen."""
    from transformers.utils import logging

    import openmsa.hf  # noqa: F401

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _from_pretrained(kind, name: str, **options):
    from safetensors import SafetensorError

    local = Path(name).expanduser()
    try:
        return kind.from_pretrained(local if local.is_dir() else name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        where = "" if local.is_dir() else ", which is no folder here,"
        raise OSError(f"cannot load {name}{where} as a {_what(kind)}: {reason}") from error


def _what(kind) -> str:
    return "tokenizer" if "Tokenizer" in kind.__name__ else "language model"


def _check_finite(model: PreTrainedModel, name: str) -> None:
    for parameter, weights in model.named_parameters():
        if not bool(weights.isfinite().all()):
            raise ValueError(
                f"{name}: {parameter} holds NaN or infinity; the checkpoint is damaged"
            )
