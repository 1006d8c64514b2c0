"""Which models can be converted: what cannot is refused by name, before anything is touched."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from openmsa.hf.classes import rotation_of
from openmsa.hf.derive import pairs_of

PROBE = "openmsa_probe"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HANDED = {"dropout", "scaling", "sliding_window", "is_causal", "msa_probe"}


def causal_lm(model: nn.Module) -> None:
    """Raises ValueError unless `model` is a causal language model of transformers, unwrapped."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is a {kind}, not a transformers model; pass the model itself, not a wrapper of "
            "it (merge adapters first)"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    known = known if isinstance(known, (tuple, list)) else (known,)
    if type(model) not in known[:1]:
        raise ValueError(
            f"model is a {kind}; only the causal language models that AutoModelForCausalLM makes "
            "can be converted"
        )
    if not model._supports_attention_backend:
        raise ValueError(
            f"{kind} does not choose its attention function by transformers' AttentionInterface"
        )
    if hasattr(model.config, "index_n_heads"):
        raise ValueError(
            f"{kind} has an index of its own already (index_n_heads in its config); if it is a "
            "MiniMax-M3, call openmsa.hf.enable(model)"
        )
    if "forward" in vars(model) or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"this {kind} is already dispatched or prepared by accelerate; convert it right after "
            "loading it on one device, save it, and load the result with device_map"
        )


def loaded(model: nn.Module) -> None:
    """Raises ValueError for weights that are not in memory."""
    for name, weight in model.named_parameters():
        if weight.device.type == "meta":
            raise ValueError(f"weight {name} is not loaded (meta device); load the whole model")


def dense_layers(model: PreTrainedModel, config: object) -> None:
    """Raises ValueError if layers stay dense that need more than scaled dot product attention."""
    if config.layers is not None and not model._supports_sdpa:
        raise ValueError(
            f"{type(model).__name__} cannot run the layers that stay dense by scaled dot product "
            "attention; leave layers out to convert all of them"
        )


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every layer, in order.

    Raises ValueError if one of them is not made of q, k, v and o projections, and names what is
    missing.
    """
    layers = _layers(model)
    found = []
    for number, (path, layer) in enumerate(layers):
        name, attention = _attention(layer, path)
        missing = [part for part in PROJECTIONS if not hasattr(attention, part)]
        if missing:
            parts = ", ".join(name for name, _ in attention.named_children())
            raise ValueError(
                f"{path}.{name} ({type(attention).__name__}) has no {', '.join(missing)} but "
                f"{parts}; only attention with separate q, k, v and o projections can be converted"
            )
        _heads(attention, f"{path}.{name}", model.config.num_attention_heads)
        if getattr(attention, "layer_idx", None) != number:
            raise ValueError(f"{path}.{name} does not know its layer number (layer_idx)")
        found.append(attention)
    return found


def _layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    prefix, count = model.base_model_prefix, model.config.num_hidden_layers
    for name, child in model.base_model.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return [(f"{prefix}.{name}.{i}", layer) for i, layer in enumerate(child)]
    raise ValueError(f"{type(model).__name__} has no list of its {count} decoder layers")


def _attention(layer: nn.Module, path: str) -> tuple[str, nn.Module]:
    for name, child in layer.named_children():
        if name == "self_attn" or type(child).__name__.endswith("Attention"):
            return name, child
    raise ValueError(f"{path} ({type(layer).__name__}) has no attention module")


def _heads(attention: nn.Module, path: str, num_heads: int) -> None:
    for name in ("head_dim", "scaling"):
        if not hasattr(attention, name):
            raise ValueError(f"{path} ({type(attention).__name__}) does not know its {name}")
    dim = attention.head_dim
    sizes = [getattr(getattr(attention, name), "out_features", None) for name in PROJECTIONS[:3]]
    if None in sizes or not attention.q_proj.weight.is_floating_point():
        raise ValueError(
            f"{path}: the projections must be linear layers with floating point weights; load the "
            "model without quantisation"
        )
    heads, groups = sizes[0] / dim, sizes[1] / dim
    if heads != num_heads or groups != int(groups) or num_heads % groups:
        raise ValueError(
            f"{path}: q_proj gives {sizes[0]} and k_proj {sizes[1]} channels for {num_heads} heads "
            f"of {dim} channels; the query heads must be a multiple of whole KV heads"
        )


def width(config: object, attention: nn.Module) -> int:
    """The width of the index: d_index, or the head. Raises ValueError if RoPE cannot turn it."""
    dim = attention.head_dim
    d_index = dim if config.d_index is None else config.d_index
    if d_index % 2 or d_index > dim:
        raise ValueError(
            f"d_index={d_index} must be even and at most the head dim {dim} (RoPE turns pairs of "
            "channels); leave it out for the head dim"
        )
    return d_index


def finite_weights(model: nn.Module) -> None:
    """Raises ValueError naming the first weight that holds a NaN or an infinity."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.device.type != "meta" and weight.numel():
            low, high = torch.aminmax(
                weight.detach().float() if weight.itemsize == 1 else weight.detach()
            )
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ValueError(
                    f"weight {name} holds a NaN or an infinity; the checkpoint is damaged or its "
                    "training diverged"
                )


@torch.no_grad()
def can_attend(model: PreTrainedModel, attention: nn.Module) -> None:
    """See, on a few made-up tokens, whether this attention layer asks for causal attention alone.

    Raises ValueError for sliding windows, soft caps, sinks and whatever else it hands on.
    """
    kind, seen = _kind(attention), {}
    _probe(model, attention, _made_up(attention), seen, kind)
    _features(seen["arguments"], kind, model)


@torch.no_grad()
def can_follow(model: PreTrainedModel, attention: nn.Module, d_index: int) -> None:
    """See, on a few made-up tokens, whether our index branch can do as this attention layer does.

    Raises ValueError for everything between its projections and its attention that is not a norm
    per head, RoPE and a scale: sliding windows, soft caps, sinks, norms over all heads, no RoPE.
    """
    kind, seen = _kind(attention), {}
    _norms(attention, kind)
    rotate = rotation_of(type(attention))
    if rotate is None or not hasattr(model.base_model, "rotary_emb"):
        raise ValueError(f"{kind}: no apply_rotary_pos_emb and rotary_emb for the index to use")
    hidden = _made_up(attention)
    cos, sin = _probe(model, attention, hidden, seen, kind)
    _features(seen.pop("arguments"), kind, model)
    if d_index < attention.head_dim:
        _half_split(rotate, cos.shape[-1], attention.head_dim, kind)
    for part, seen_part in seen.items():
        ours = _as_we_would(attention, hidden, part, rotate, cos, sin)
        if ours.shape != seen_part.shape or not _close(ours, seen_part):
            raise ValueError(
                f"{kind} does more to its {part} than a norm per head and RoPE, which the index "
                "branch cannot follow"
            )


def _kind(attention: nn.Module) -> str:
    return f"layer {attention.layer_idx} ({type(attention).__name__})"


def _made_up(attention: nn.Module) -> Tensor:
    """Hidden states of four tokens, neither equal nor random."""
    weight = attention.q_proj.weight
    hidden = torch.arange(4 * weight.shape[1], device=weight.device).view(1, 4, -1)
    return (hidden * 0.7 % 2.3).sub(1.15).to(weight.dtype)


def _norms(attention: nn.Module, kind: str) -> None:
    for name in ("q_norm", "k_norm"):
        weight = getattr(getattr(attention, name, None), "weight", None)
        if weight is not None and weight.shape != (attention.head_dim,):
            raise ValueError(
                f"{kind}: {name} normalises {tuple(weight.shape)} channels at once; only a norm "
                f"per head ({attention.head_dim} channels) can be shared with the index"
            )


def _probe(model, attention, hidden: Tensor, seen: dict, kind: str) -> tuple[Tensor, Tensor]:
    chosen = model.config._attn_implementation
    model.config._attn_implementation = PROBE
    try:
        positions = torch.arange(3, 3 + hidden.shape[1], device=hidden.device)[None]
        rotary = model.base_model.rotary_emb
        by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
        turns = rotary(hidden, positions, *([attention.layer_type] if by_kind else []))
        attention(hidden, position_embeddings=turns, attention_mask=None, msa_probe=seen)
        cos, sin = turns
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(f"{kind} cannot be run on its own to look into it: {error}") from error
    finally:
        model.config._attn_implementation = chosen
    if not seen:
        raise ValueError(f"{kind} does not hand keyword arguments to its attention function")
    return cos, sin


def _spy(module, query, key, value, attention_mask, **arguments):
    if "msa_probe" in arguments:
        arguments["msa_probe"].update(query=query, key=key, arguments=arguments)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _features(arguments: dict, kind: str, model: PreTrainedModel) -> None:
    more = [k for k, v in arguments.items() if k not in _HANDED and v is not None]
    if more:
        raise ValueError(
            f"{kind} hands {', '.join(more)} to its attention, which no mechanism has a place for"
        )
    window = arguments.get("sliding_window")
    if window is not None:
        types = getattr(model.config, "layer_types", None) or []
        full = tuple(i for i, name in enumerate(types) if name == "full_attention")
        remedy = f"layers={full}" if full else "sliding_window=None in its config, if that is right"
        raise ValueError(
            f"{kind} attends within a sliding window of {window} tokens and gains nothing from "
            f"a sparse mechanism; convert with {remedy}"
        )


def _as_we_would(attention, hidden, part, rotate, cos, sin) -> Tensor:
    name = {"query": "q", "key": "k"}[part]
    x = getattr(attention, f"{name}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    x = (x if norm is None else norm(x)).transpose(1, 2)
    turned = cos.shape[-1]
    rotated = rotate(x[..., :turned], x[..., :turned], cos, sin)[0]
    return torch.cat([rotated, x[..., turned:]], -1)


def _close(a: Tensor, b: Tensor) -> bool:
    error, size = (a.float() - b.float()).abs().max(), b.float().abs().max()
    return bool(error <= 0.02 * size)


def _half_split(rotate, turned: int, dim: int, kind: str) -> None:
    """A narrower index is laid out in two halves: see that RoPE turns a whole head in this way."""
    halves = torch.arange(dim).view(2, -1)
    if turned != dim or not torch.equal(pairs_of(rotate, turned, dim), halves):
        raise ValueError(
            f"{kind}: a d_index below the head dim needs RoPE over the whole head in two halves; "
            "leave d_index out"
        )


AttentionInterface.register(PROBE, _spy)
