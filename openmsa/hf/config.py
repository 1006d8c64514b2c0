"""config.json of a converted model: the fields of its base model, flat, and two more.

"model_type": "openmsa", "base_model_type": "qwen3", "openmsa": {"block_size": 128, ...}

The dict of any mechanism but MSA also says which: "openmsa": {"mechanism": "nsa", ...}
"""

from __future__ import annotations

from dataclasses import asdict, fields

from openmsa.hf.rooms import ROOMS, MSARoom, room_for

MODEL_TYPE = "openmsa"


def as_fields(config: object) -> dict:
    """The "openmsa" dict of config.json."""
    room = room_for(config)
    layers = None if config.layers is None else list(config.layers)
    name = {} if room.NAME == MSARoom.NAME else {"mechanism": room.NAME}
    return {**name, **asdict(config), "layers": layers}


def from_fields(model_config: dict):
    """The mechanism's config from the fields of a config.json: an MSAConfig where it names none.

    Raises ValueError for a missing "openmsa" dict, an unknown mechanism or key in it and values out
    of range.
    """
    stored = model_config.get("openmsa")
    name = stored.get("mechanism", MSARoom.NAME) if isinstance(stored, dict) else MSARoom.NAME
    if name not in tuple(ROOMS):
        raise ValueError(
            f'config.json: "openmsa" names the mechanism {name!r}, which this version does not '
            f"know; it knows {', '.join(ROOMS)}"
        )
    kind = ROOMS[name].CONFIG
    valid = [field.name for field in fields(kind)]
    if not isinstance(stored, dict):
        raise ValueError(
            f'config.json has no "openmsa" dict (found {stored!r}); expected the keys '
            f"{', '.join(valid)}; save the model again with save_pretrained"
        )
    numbers = {key: value for key, value in stored.items() if key != "mechanism"}
    unknown = [key for key in numbers if key not in valid]
    if unknown:
        raise ValueError(
            f'config.json: "openmsa" has the unknown key {unknown[0]!r}; valid keys: '
            f"{', '.join(valid)}"
        )
    layers = numbers.get("layers")
    return kind(**{**numbers, "layers": None if layers is None else tuple(layers)})


def sparse_layers(config: object, num_layers: int) -> list[int]:
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
