"""The caches that transformers makes for MiniMax-M3, continued in ours."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from openmsa.hf.cache import MSACacheLayer

INDEXED = "minimax_m3_sparse"


@torch.no_grad()
def hold_index(cache: Cache | None, layer: int, with_index: bool) -> None:
    """Exchange layer `layer` of a dynamic or static cache for ours, with all that it holds.

    A layer of another kind, and one that was filled without the index keys that it needs, is left
    to be refused by `msa_cache_layer`.
    """
    if not isinstance(cache, Cache):
        return
    make = getattr(cache, "layer_class_to_replicate", None)
    while make is not None and len(cache.layers) <= layer:
        cache.layers.append(make())
    found = cache.layers[layer] if layer < len(cache.layers) else None
    theirs = getattr(type(found), "_layer_type", None) == INDEXED
    if theirs or type(found) in (DynamicLayer, StaticLayer):
        cache.layers[layer] = _ours(found, with_index)


def _ours(found: CacheLayerMixin, with_index: bool) -> CacheLayerMixin:
    ours, length = MSACacheLayer(with_index=with_index), int(found.get_seq_length())
    if length == 0:
        return ours
    index_keys = getattr(found, "idx_keys", None)
    if with_index and index_keys is None:
        return found
    if with_index:
        ours.stage(index_keys[:, 0, :length])
    ours.update(found.keys[..., :length, :], found.values[..., :length, :])
    ours.take_index()
    return ours
