"""Shapes of models: ready-made ones (shapes.json names their sources) and those of a config.json.

Weights of a layer, gated feed-forward of three matrices:

attention      d_model (h d + g (d + d_value)) + h d_value d_model
latent         d_model q_rank + q_rank h d + d_model (latent + rope) + latent h (d - rope + d_value)
attention        + h d_value d_model
dense layer    3 d_model ffn
expert layer   d_model experts + 3 d_model (experts expert_width + shared_width)
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

# Fields of a config.json that mean the same, in the order looked for.
KEYS = {
    "d_model": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "h": ("num_attention_heads",),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "expert_width": ("moe_intermediate_size", "intermediate_size"),
    "shared_width": ("shared_intermediate_size", "shared_expert_intermediate_size"),
    "d_nope": ("qk_nope_head_dim",),
    "rope": ("qk_rope_head_dim",),
    "d_value": ("v_head_dim",),
    "d_index": ("index_head_dim", "sparse_index_dim"),
    "dense_width": ("dense_intermediate_size", "intermediate_size"),
}
FULL, SLIDING = ("full_attention", "attention"), ("sliding", "chunked", "linear", "mamba", "conv")


@dataclass(frozen=True)
class Shape:
    """A decoder-only model. d_value, d_index 0: that of d. dense_attention_layers: never sparse.

    latent: channels that all heads share instead of keys and values (MLA); then `rope` of the d
    channels of a key are apart from it, and queries go through q_rank channels (0: they do not).
    kv_width: stored channels of a token's keys and values in a layer; 0: g (d + d_value).
    """

    name: str
    d_model: int
    layers: int
    h: int
    g: int
    d: int
    vocab: int
    ffn: int = 0
    moe_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    dense_attention_layers: int = 0
    d_value: int = 0
    d_index: int = 0
    latent: int = 0
    rope: int = 0
    q_rank: int = 0
    kv_width: int = 0
    tied: bool = False
    title: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "d_value", self.d_value or self.d)
        object.__setattr__(self, "d_index", self.d_index or self.d)
        for name in ("d_model", "layers", "h", "g", "d", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name} must be at least 1")
        if self.h % self.g:
            raise ValueError(f"{self.name}: h={self.h} heads do not divide into g={self.g} groups")
        object.__setattr__(self, "kv_width", self.kv_width or self.g * (self.d + self.d_value))
        if not 0 <= self.dense_attention_layers <= self.layers:
            raise ValueError(
                f"{self.name}: {self.dense_attention_layers} dense attention layers of "
                f"{self.layers}; give 0 to {self.layers}"
            )

    @property
    def r(self) -> int:
        return self.h // self.g

    @property
    def stored(self) -> Shape:
        """As the cache has it: latent attention is attention with one KV head, the latent, whose
        first channels are the values; any other is itself.
        """
        if not self.latent:
            return self
        width = self.latent + self.rope
        return replace(self, g=1, d=width, d_value=self.latent, kv_width=width)

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        out = self.h * self.d_value * self.d_model
        if not self.latent:
            return self.d_model * (self.h * self.d + self.g * (self.d + self.d_value)) + out
        q = self.h * self.d
        q = self.q_rank * (self.d_model + q) if self.q_rank else self.d_model * q
        kv = self.d_model * (self.latent + self.rope)
        return q + kv + self.latent * self.h * (self.d - self.rope + self.d_value) + out

    @property
    def head_weights(self) -> int:
        """Of the map from the last layer to the vocabulary."""
        return self.d_model * self.vocab

    def ffn_weights(self, tokens: float | None = None) -> float:
        """Of all layers; tokens: those that at least one of so many tokens meets.

        Tokens are taken to choose their experts evenly and apart from each other.
        """
        met = self.experts
        if tokens is not None and self.experts:
            met = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)
        experts = met * self.expert_width + self.shared_width
        moe = self.d_model * self.experts + 3 * self.d_model * experts
        return (self.layers - self.moe_layers) * 3 * self.d_model * self.ffn + self.moe_layers * moe

    @property
    def total_weights(self) -> int:
        embeddings = self.head_weights * (1 if self.tied else 2)
        return self.layers * self.attention_weights + round(self.ffn_weights()) + embeddings


def shapes() -> dict[str, Shape]:
    """The ready-made shapes by name."""
    told = json.loads((Path(__file__).parent / "shapes.json").read_text(encoding="utf-8"))
    return {name: Shape(name, **values) for name, values in told["shapes"].items()}


def find(name: str) -> Shape:
    """A ready-made shape, or that of a config.json (the file, or the folder that holds it)."""
    known = shapes()
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return from_config(path)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"there is no shape and no config.json {name!r}; {hint}")


def from_config(path: Path) -> Shape:
    """The shape of a transformers config.json of a decoder-only language model."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no json: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config.json: it must hold a mapping")
    config = {**config, **(config.get("text_config") or {})}
    config = {**(config.get("sparse_attention_config") or {}), **config}
    layers, h = _number(config, "layers", path), _number(config, "h", path)
    d_model = _number(config, "d_model", path)
    values = {
        "d_model": d_model,
        "layers": layers,
        "h": h,
        **_heads(config, d_model, h, path),
        "vocab": _number(config, "vocab", path),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "dense_attention_layers": _dense_attention(config, layers, path),
        **_feed_forward(config, layers, path),
    }
    name = path.parent.name if path.name == "config.json" else path.stem
    return Shape(name or str(path), title=name, source=str(path), **values)


def from_fields(kind: type, name: str, values: Any, where: str) -> Any:
    """A dataclass of facts from one entry of a json file, with what is wrong in it named."""
    names = [f.name for f in fields(kind) if f.name != "name"]
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {name} must be a mapping with the keys {', '.join(names)}")
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{where}: {name} has the unknown key {unknown[0]!r}; keys: {names}")
    try:
        return kind(name, **values)
    except TypeError as error:
        raise ValueError(f"{where}: {name}: {str(error).partition(') ')[2] or error}") from None


def _number(config: dict, name: str, path: Path) -> int:
    for key in KEYS[name]:
        if isinstance(config.get(key), int):
            return config[key]
    raise ValueError(f"{path} lacks {' or '.join(KEYS[name])}; it must be a decoder's config.json")


def _optional(config: dict, name: str) -> int:
    return next((config[key] for key in KEYS[name] if isinstance(config.get(key), int)), 0)


def _heads(config: dict, d_model: int, h: int, path: Path) -> dict[str, int]:
    index = {"d_index": _optional(config, "d_index")}
    if not config.get("kv_lora_rank"):
        d = config.get("head_dim") or d_model // h
        return {"g": config.get("num_key_value_heads") or h, "d": d, **index}
    rope = _number(config, "rope", path)
    return {
        "g": h,
        "d": _number(config, "d_nope", path) + rope,
        "d_value": _number(config, "d_value", path),
        "latent": config["kv_lora_rank"],
        "rope": rope,
        "q_rank": config.get("q_lora_rank") or 0,
        **index,
    }


def _feed_forward(config: dict, layers: int, path: Path) -> dict[str, int]:
    experts = _optional(config, "experts")
    if experts < 2:
        return {"ffn": _number(config, "dense_width", path)}
    width = _number(config, "expert_width", path)
    shared = _optional(config, "shared_width") or width * (config.get("n_shared_experts") or 0)
    return {
        "ffn": _optional(config, "dense_width"),
        "moe_layers": _expert_layers(config, layers),
        "experts": experts,
        "experts_per_token": _number(config, "experts_per_token", path),
        "expert_width": width,
        "shared_width": shared,
    }


def _expert_layers(config: dict, layers: int) -> int:
    """Layers of experts, by whichever of transformers' ways of saying so the file has."""
    if kinds := config.get("mlp_layer_types"):
        return sum(kind == "sparse" for kind in kinds)
    if isinstance(often := config.get("moe_layer_freq"), list):
        return sum(map(bool, often))
    dense = set(config.get("mlp_only_layers") or ())
    first = config.get("first_k_dense_replace") or 0
    step = config.get("decoder_sparse_step") or 1
    return sum(i >= first and i not in dense and (i + 1) % step == 0 for i in range(layers))


def _dense_attention(config: dict, layers: int, path: Path) -> int:
    """Layers that stay dense where the others are sparse already; 0 for a dense model."""
    if isinstance(ours := config.get("openmsa"), dict):
        return layers - len(ours["layers"]) if ours.get("layers") is not None else 0
    if often := config.get("sparse_attention_freq"):
        return sum(not flag for flag in often)
    kinds = config.get("layer_types") or []
    for kind in kinds:
        if any(word in kind for word in SLIDING):
            raise ValueError(f"{path}: layers of the kind {kind!r} are not counted here")
    full = sum(kind in FULL for kind in kinds)
    return full if full < len(kinds) else 0
