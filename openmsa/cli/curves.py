"""What a training run logged, as a table and as curves."""

from __future__ import annotations

from pathlib import Path

from openmsa.cli.console import table
from openmsa.evaluation.plain import write_json

KL = "kl/"
RECALL = ("score_recall", "captured_mass")


def report(lines: list[dict], recipe) -> None:
    """Print where every phase ended."""
    rows = []
    for phase in recipe.phases:
        own = [line for line in lines if line["phase"] == phase.name]
        kls = [value for key, value in _last(own, KL).items() if key.startswith(KL)]
        recalls = [_last(own, name).get(name, "-") for name in RECALL]
        kl = sum(kls) / len(kls) if kls else "-"
        loss = _last(own, "lm_loss").get("lm_loss", _last(own, "loss").get("loss", "-"))
        rows.append([phase.name, phase.steps, f"{phase.tokens:,}", loss, kl, *recalls])
    recalls = [name.replace("_", " ") for name in RECALL]
    columns = ("phase", "steps", "tokens", "loss", "KL", *recalls)
    table(f"Trained by {recipe.name}", columns, rows)


def draw_curves(lines: list[dict], folder: Path) -> None:
    """Write the log as json, and the curves of losses and recall as svg and png."""
    from openmsa.evaluation import canvas, figures

    write_json(folder / "history.json", lines)
    if any("loss" in line for line in lines):
        canvas.save(figures.training_curves(lines), folder / "losses")
    if any(RECALL[0] in line for line in lines):
        canvas.save(figures.recall_curves(lines), folder / "recall")


def _last(lines: list[dict], prefix: str) -> dict:
    """The last line that has a key beginning like this."""
    for line in reversed(lines):
        if any(key.startswith(prefix) for key in line):
            return line
    return {}
