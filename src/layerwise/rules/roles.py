"""The role of a layer in its network: embedding, attention, feed-forward, normalisation, head and so on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._arguments import has_type
from .._rows import is_rows
from ..layers import Layer, check_patterns, matches

ROLES = (
    "embedding",
    "position",
    "norm",
    "lora_a",
    "lora_b",
    "qkv",
    "qk",
    "vo",
    "stem",
    "router",
    "ffn",
    "head",
    "conv",
    "scalar",
    "other",
)
"""`"qkv"` is a fused projection of queries, keys and values, `"qk"` and `"vo"` are separate ones.

`"scalar"` is a parameter of one element, such as a scale, and `"other"` what no test of `roles_of` recognises.
"""

RoleArgument = Mapping[str, str] | Callable[[str], str | None] | None
"""Patterns of layer names to roles, or a function from a layer's name to its role; None leaves it to the tests here."""

_LEAF = {
    "position": re.compile(
        r"pos_embed|position_embedding|(?:cls|reg|mask|class|dist)_token|class_embedding|masked_spec_embed|"
        r"rel(?:ative)?_pos|relative_attention_bias"
    ),
    "lora_a": re.compile(r"lora_(?:embedding_)?a\b"),
    "lora_b": re.compile(r"lora_(?:embedding_)?b\b"),
}
_POSITION = re.compile(r"pos|wpe|relative_attention_bias")
_EMBEDDING = re.compile(
    r"^(?:wte|tok_embeddings|embed_tokens|(?:word|token|token_type|value)_embed(?:ding)?s?|shared)$"
)
_NORM_CLASS = re.compile(r"Norm$|(?:Layer|RMS|Group|Batch|Instance)Norm")
_QKV = re.compile(r"^(?:qkv|c_attn|query_key_value|wqkv|qkv_proj)$")
_IN = re.compile(r"^in_proj$")  # elsewhere that of a state space or a gated unit
_QK = re.compile(r"^(?:[qk]|(?:[qk]|query|key)_proj|w[qk]|query|key|to_[qk]|[qk]_attn|[qk]_lin)$")
_VO = re.compile(r"^(?:[vo]|(?:[vo]|value)_proj|w[vo]|value|to_v|to_out|v_attn|v_lin|out_lin)$")
_OUT = re.compile(r"^(?:c_proj|proj|out_proj|output|dense)$")
_STEM = re.compile(r"^(?:patch_embed\w*|conv_stem|stem)$")
_ROUTER = re.compile(r"^(?:router|gate)$")
_FFN_BLOCK = re.compile(r"^dense\w+dense$")  # of T5, whose wi and wo are no projections of attention
_FFN = re.compile(
    r"^(?:mlp|ffn|ffn_output|feed_forward|pwconv[12]|fc[12]|c_fc|(?:gate|up|down)_proj|intermediate|w[123]|lin(?:ear)?[12]|expand|contract)$"
)
_HEAD = re.compile(r"^(?:lm_head|decode_head|head|classifier|score|fc|output)$")


def roles_of(layers: Sequence[Layer], role: RoleArgument = None) -> list[str]:
    """Return the role of each layer, from its module's class where the model is known, and from its name.

    The last three components of a name count, without capitals. A layer of several parameters has the role of its
    largest one, so a bias has the role of its weight. A part of a parameter has the role of the whole one,
    but `"qk"` or `"vo"` where it is named `q`, `k` or `v`.

    Args:
        layers: The layers, in the model's order.
        role: Roles for names that the tests here would take for others.

    Raises:
        TypeError: `role` is neither a mapping nor a callable, or a role in it is no string.
        ValueError: A pattern matches no layer.

    Example:
        >>> import torch
        >>> names = ["wte", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.ln_2", "lm_head"]
        >>> vector, matrix = torch.zeros(2), torch.zeros(2, 2)
        >>> roles_of([Layer(name, (vector if "ln" in name else matrix,)) for name in names])
        ['embedding', 'qkv', 'vo', 'ffn', 'norm', 'head']
    """
    own = _own_roles(layers, role)
    paths = [_path(layer) for layer in layers]
    numbered = [i for i, path in enumerate(paths) if any(part.isdigit() for part in path)]
    last = numbered[-1] if numbered else len(layers)
    beside_experts = {path[: path.index("experts")] for path in map(tuple, paths) if "experts" in path}
    return [
        given or _of_part(layer, _role(layer, path, above=i > last, routes=tuple(path[:-1]) in beside_experts))
        for i, (layer, path, given) in enumerate(zip(layers, paths, own, strict=True))
    ]


def _own_roles(layers: Sequence[Layer], role: RoleArgument) -> list[str | None]:
    names = [layer.name for layer in layers]
    if role is None:
        return [None] * len(names)
    if callable(role):
        found = [role(name) for name in names]
    elif has_type(role, Mapping):
        check_patterns(role, names, "role")
        found = [next((one for pattern, one in role.items() if matches(name, pattern)), None) for name in names]
    else:
        raise TypeError(
            f"role={role!r} must be a mapping of patterns to roles, or a function from name to role or None"
        )
    for name, one in zip(names, found, strict=True):
        if one is not None and not has_type(one, str):
            raise TypeError(f"role of {name!r} is {one!r}; it must be a string such as 'ffn', or None")
    return found


def _largest(layer: Layer) -> tuple[str, Tensor]:
    """Return the name and a tensor of the whole shape of a layer's largest parameter."""
    names = layer.parameter_names or (layer.name,) * len(layer.parameters)
    return max(zip(names, layer.whole(), strict=True), key=lambda pair: pair[1].numel())


def _path(layer: Layer) -> list[str]:
    """Return the components of the name of the module that owns a layer, and of a parameter with a name of its own."""
    largest, parameter = _largest(layer)
    own = largest.removesuffix(f"[{parameter.label}]") if is_rows(parameter) else largest
    parts = own.lower().split(".")
    return parts[:-1] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts


def _of_part(layer: Layer, role: str) -> str:
    """Return the role of a layer that is a part of a parameter of this role: its name may say more."""
    first = layer.parameters[0]
    if not is_rows(first) or role not in ("qkv", "other"):
        return role
    name = first.label.lower()
    return "qk" if _QK.match(name) else "vo" if _VO.match(name) else role


def _role(layer: Layer, path: list[str], *, above: bool, routes: bool) -> str:
    """Return a layer's role; the first test that holds decides.

    Args:
        layer: The layer.
        path: The components of its name.
        above: Whether it comes after the last numbered block.
        routes: Whether it lies beside experts.
    """
    module: Any = layer.module
    kind, last = type(module).__name__, path[-1]
    near = path[-3:]
    name, largest = ".".join(near), _largest(layer)[1]
    attends = any("attn" in part or "attention" in part for part in near)

    def has(pattern: re.Pattern[str]) -> bool:
        return any(map(pattern.search, near))

    if isinstance(module, nn.Embedding) or _EMBEDDING.search(last):
        return "position" if _POSITION.search(name) else "embedding"
    if last == "wpe" or _LEAF["position"].search(last):
        return "position"
    named_norm = _named_norm(last) or last.startswith("gamma") or kind == "LayerScale"
    if _NORM_CLASS.search(kind) or (largest.ndim <= 1 and named_norm):
        return "norm"
    for role in ("lora_a", "lora_b"):
        if _LEAF[role].search(name):
            return role
    if largest.numel() == 1 and not _largest(layer)[0].endswith(("weight", "bias")):
        return "scalar"
    if has(_FFN_BLOCK):
        return "ffn"
    if has(_QKV) or (attends and has(_IN)) or last.startswith("in_proj_"):
        return "qkv"
    if has(_QK):
        return "qk"
    if has(_VO) or (attends and has(_OUT)):
        return "vo"
    if has(_STEM):
        return "stem"
    if routes and _ROUTER.search(last):
        return "router"
    if has(_FFN) or (near[-2:] == ["output", "dense"] and not above):
        return "ffn"
    outside_blocks = path[: next((i for i, part in enumerate(path) if part.isdigit()), len(path))]
    if above or any(map(_HEAD.search, outside_blocks[-3:])):
        return "head"
    return "conv" if hasattr(module, "kernel_size") or largest.ndim > 2 else "other"


def _named_norm(component: str) -> bool:
    words = re.split(r"[_\d]+", component)
    return any(word in ("ln", "bn") or word.endswith("norm") for word in words)
