"""config.json of a converted model: the fields of its base model, flat, and two more.

"model_type": "openmsa", "base_model_type": "qwen3", "openmsa": {"block_size": 128, ...}
"""

from __future__ import annotations

from dataclasses import asdict, fields

from openmsa.mechanisms.msa import MSAConfig

MODEL_TYPE = "openmsa"


def as_fields(config: MSAConfig) -> dict:
    """The "openmsa" dict of config.json."""
    layers = None if config.layers is None else list(config.layers)
    return {**asdict(config), "layers": layers}


def from_fields(model_config: dict) -> MSAConfig:
    """MSAConfig from the fields of a config.json.

    Raises ValueError for a missing "openmsa" dict, an unknown key in it and values out of range.
    """
    stored = model_config.get("openmsa")
    valid = [field.name for field in fields(MSAConfig)]
    if not isinstance(stored, dict):
        raise ValueError(
            f'config.json has no "openmsa" dict (found {stored!r}); expected the keys '
            f"{', '.join(valid)}; save the model again with save_pretrained"
        )
    unknown = [key for key in stored if key not in valid]
    if unknown:
        raise ValueError(
            f'config.json: "openmsa" has the unknown key {unknown[0]!r}; valid keys: '
            f"{', '.join(valid)}"
        )
    layers = stored.get("layers")
    return MSAConfig(**{**stored, "layers": None if layers is None else tuple(layers)})


def sparse_layers(config: MSAConfig, num_layers: int) -> list[int]:
    """The numbers of the layers that become sparse. Raises ValueError for one the model lacks."""
    layers = list(range(num_layers)) if config.layers is None else list(config.layers)
    if not layers:
        raise ValueError("layers=() chooses no layer; leave it out for all of them")
    if layers[-1] >= num_layers:
        raise ValueError(
            f"layers names layer {layers[-1]}, but the model has {num_layers} layers, 0 to "
            f"{num_layers - 1}"
        )
    return layers
