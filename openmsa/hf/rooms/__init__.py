"""Every mechanism that a dense model can be converted to, by its name."""

from __future__ import annotations

from openmsa.hf.room import Room
from openmsa.hf.rooms.dsa import DSARoom
from openmsa.hf.rooms.msa import MSARoom
from openmsa.hf.rooms.nsa import NSARoom
from openmsa.hf.rooms.plain import InfLLM2Room, MoBARoom, WindowRoom

_EVERY = (MSARoom, NSARoom, MoBARoom, InfLLM2Room, DSARoom, WindowRoom)
ROOMS: dict[str, type[Room]] = {room.NAME: room for room in _EVERY}


def room_for(config: object) -> Room:
    """The room of a mechanism's config. Raises ValueError for anything else."""
    for room in _EVERY:
        if type(config) is room.CONFIG:
            return room(config)
    others = ", ".join(room.CONFIG.__name__ for room in _EVERY if room is not MSARoom)
    raise ValueError(
        f"config must be an openmsa.MSAConfig, got {type(config).__name__}; or the config of "
        f"another mechanism: {others}"
    )
