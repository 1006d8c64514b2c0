"""Mechanisms without parameters: nothing is added to a layer, q, k and v are all that is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from openmsa.hf import checks
from openmsa.hf.room import Attended, Budget, Room
from openmsa.mechanisms import infllm2, moba, window
from openmsa.ops.pooled_selection import mean_pool


@dataclass(frozen=True)
class PlainRoom(Room):
    """ATTENTION: the one call of the mechanism, which takes the config by that name."""

    ATTENTION: ClassVar[Callable[..., Attended]]

    def check(self, model, attention, init) -> None:
        """Raises ValueError for a layer that attends within a window, with a soft cap or sinks."""
        checks.can_attend(model, attention)

    def attend(self, attention, tensors, *, with_index_loss, **how) -> Attended:
        return type(self).ATTENTION(**tensors.named(), config=self.config, **how)


class MeansRoom(PlainRoom):
    """Blocks are chosen by means of the keys of windows."""

    def pool(self, attention, keys):
        kernel, stride = self.windows
        return {"k_pooled": mean_pool(keys["k"], kernel=kernel, stride=stride)[0]}


class WindowRoom(PlainRoom):
    """A sliding window with sinks; the cache keeps all keys, as random blocks may ask for any."""

    NAME, CONFIG, PHASES = "window", window.WindowConfig, window.PHASES
    ATTENTION = staticmethod(window.windowed_attention)

    @property
    def budget(self) -> Budget | None:
        config = self.config
        if config.global_blocks == config.random_blocks == 0:
            return None
        forced = (config.local_blocks, config.first_blocks)
        return Budget(config.block_size, sum(forced) + config.random_blocks, *forced)


class MoBARoom(MeansRoom):
    """Blocks by their mean key, for every query head."""

    NAME, CONFIG, PHASES = "moba", moba.MoBAConfig, moba.PHASES
    ATTENTION = staticmethod(moba.moba_attention)

    @property
    def windows(self) -> tuple[int, int]:
        return self.config.block_size, self.config.block_size

    @property
    def budget(self) -> Budget:
        return Budget(self.config.block_size, self.config.top_k, local_blocks=1)


class InfLLM2Room(MeansRoom):
    """Blocks by their pooled keys, for every KV head; dense while a sequence is short."""

    NAME, CONFIG, PHASES = "infllm2", infllm2.InfLLM2Config, infllm2.PHASES
    ATTENTION = staticmethod(infllm2.infllm2_attention)

    @property
    def windows(self) -> tuple[int, int]:
        return self.config.kernel, self.config.stride

    def check_context(self) -> None:
        """Raises ValueError: a part of a sequence is shorter than the sequence."""
        if self.config.dense_below:
            raise ValueError(
                f"dense_below={self.config.dense_below} goes by the length of a whole sequence, "
                "which a shared context does not show; convert with dense_below=0"
            )

    @property
    def budget(self) -> Budget:
        config = self.config
        forced = (config.local_blocks, config.sink_blocks)
        return Budget(config.block_size, config.top_k, *forced, config.dense_below)
