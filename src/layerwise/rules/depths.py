"""The depth of a layer in its network, read from names: embeddings, blocks, head, in one tower or in several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

from .._arguments import has_type
from ..layers import Layer, some


class Place(NamedTuple):
    """What is known of a layer's place in the network.

    Args:
        path: The name of the module that owns its parameters, or what names there are.
        leaves: The last components of its parameters' names, or of its name.
        trained: Whether a parameter requires a gradient; None where that is not known.
    """

    path: str
    leaves: tuple[str, ...]
    trained: bool | None = None


@dataclass(frozen=True)
class Depths:
    """The depths of a network's layers.

    Args:
        depth: Of each layer, from 0 at the input of its tower.
        top: The depth of the head of each layer's tower.
        doubts: Why they may be wrong; empty if the names are unambiguous.
    """

    depth: list[int]
    top: list[int]
    doubts: list[str]


def depths(names: Sequence[str]) -> list[int]:
    """Return the depth of each layer, counted from 0 at the input, from the names alone.

    Layers of one numbered block (`blocks.3`, `encoder.layer.3`, `layer1.0`, `stages.1.blocks.0`, `3`) share a depth.
    Layers named before the first block are its embeddings, all of depth 0, and so are tokens wherever they stand
    (`reg_token`, `pos_embed`); those after the last block are the head, all of the last depth, and so are `heads.0`,
    `heads.1`; those in between belong to the block before them, those of a stage before its first block to that one.
    Without numbered blocks every layer is a depth of its own.

    Towers (`text_model` and `vision_model`, `encoder` and `decoder`) each count from 0; what they share is their head,
    or of depth 0 if it is an embedding.

    Example:
        >>> depths(["patch_embed", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "norm", "head"])
        [0, 1, 1, 2, 3, 3]
        >>> depths(["shared", "encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "lm_head"])
        [0, 1, 2, 1, 3]
    """
    return _read([Place(name, (name.rpartition(".")[2],)) for name in names])[0]


def read_depths(layers: Sequence[Layer]) -> Depths:
    """Return the depths of layers from their names.

    A frozen copy of trained blocks, such as those of a moving average, has the depths of what it copies and shifts no
    other ones.
    """
    places = list(map(_place, layers))
    depth, top, columns = _read(places)
    reasons = [reason for column in columns for reason in _doubts(column, places, layers, depth, top)]
    names = [layer.name for layer in layers]
    paths = any("/" in name for layer in layers for name in layer.parameter_names)
    if paths and len(names) > 1 and names == sorted(names):
        reasons.append("the names are those of a dictionary in alphabetical order, which says nothing of depth")
    return Depths(depth, top, list(dict.fromkeys(reasons)))


def _place(layer: Layer) -> Place:
    names = layer.parameter_names or (layer.name,)
    # A layer that is one parameter has the name of that.
    path = layer.name.rpartition(".")[0] if layer.parameter_names == (layer.name,) else layer.name
    return Place(path, tuple(name.rpartition(".")[2] for name in names), any(p.requires_grad for p in layer.parameters))


# --- Names -----------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")
_HEADS = re.compile(r"^(?:[^\d.][^.]*\.)*(?:\w+_)?heads(?=\.\d+(?:\.|$))")  # several heads in a list
_STEM = re.compile(r"^(?:stem|conv_stem|patch_embed\w*)$")  # numbers in it count no blocks
# Parameters and modules next to the input, wherever they are registered.
_INPUT = re.compile(
    r"^(?:\w+_)?(?:cls|class|dist|reg|register|mask)_tokens?$|^class_embedding$|^pos(?:ition(?:al)?)?_embed(?:ding)?s?$"
    r"|^(?:embed_positions|layer_?norm_embedding)$"
)
_SHARED_INPUT = re.compile(r"embed(?!_?out)|^shared$|^(?:stem|wte|wpe)$")
_TOWER = re.compile(
    r"^(?:text|vision|visual|image|audio|speech|video|language|query|question|context|ctx|passage)"
    r"(?:_(?:model|encoder|decoder|tower|backbone|transformer))?$|_tower$"
)
_CODER = re.compile(r"^(?:\w+_)?(?:encoder|decoder)$")  # beside each other in a transformer, not in an autoencoder
_STAGES = re.compile(r"(?:^|_)(?:blocks?|layers?|stages?|features)$")  # lists whose members may hold lists of blocks
_STAGE = re.compile(r"(?:^|_)(?:blocks?|layers?|stages?)_?\d+$")  # a stage with its number, such as `layer1`
_INNER = re.compile(r"^(?:(?P<word>\D[^.]*)\.)?(?P<number>\d+)(?:\.(?P<rest>.+))?$")  # a number below a numbered block
_BLOCKS = re.compile(r"(?:^|_)(?:blocks?|layers?|resnets|units)$")  # the word of an inner list of blocks
# Words in the name of a copy that is not trained.
_COPY = re.compile(r"(?:^|[._])(?:ema|teacher|target|momentum|shadow|averaged?)|_(?:ema|m|k)(?:[._]|$)")
# Names of layers next to the loss, and of layers next to the input.
_HEAD = re.compile(r"(?:^|_)(?:head|classifier|logits)s?(?:_?\d+)?$|^final")
_HEAD_WORD = re.compile(r"^(?:fc|out|output|score|cls|readout|predictions|project_out)$")
_HEAD_STACKS = ("head", "classifier", "fc", "mlp_head", "lm_head")  # numbered chains that may be heads
_EMBEDDING = re.compile(r"embed(?!_?out)|^(?:stem|wte|wpe)$")


def _block(path: str) -> str | None:
    """Return the name of the first numbered module in a path, of which the last component is its number."""
    found = _BLOCK.match(path)
    parts = found[0].split(".")[:-1] if found else []
    return None if not found or _HEADS.match(path) or any(map(_STEM.match, parts)) else found[0]


def _is_input(place: Place) -> bool:
    words = (place.path.rpartition(".")[2], *place.leaves)
    return not _block(place.path) and any(map(_INPUT.search, words))


# --- Depths ----------------------------------------------------------------------------------------------------------


@dataclass
class _Column:
    """Blocks that follow each other: a network, or one of its towers.

    Args:
        rows: The positions of its layers.
        blocks: The block of each layer; None outside of blocks.
        is_inside: Whether numbers below its blocks are known to be parts of these.
    """

    rows: list[int]
    blocks: list[str | None]
    is_inside: bool


def _read(places: Sequence[Place]) -> tuple[list[int], list[int], list[_Column]]:
    """Return each layer's depth, the depth of its tower's head, and the columns of blocks."""
    copies = _copies(places)
    kept = [i for i in range(len(places)) if i not in copies]
    depth, top = [0] * len(places), [0] * len(places)
    roots = _towers([places[i].path for i in kept])
    columns: list[_Column] = []
    shared: list[int] = []
    if roots:
        rows_of = _rows_of_towers(kept, places, roots)
        columns = [_column(rows, places) for rows in rows_of]
        shared = [i for i in kept if not any(i in rows for rows in rows_of)]
    else:
        columns = [_column(kept, places)]
    low = [i for i in shared if _is_shared_input(i, places, columns)]
    for column in columns:
        _count(column, places, depth, starts_at_1=bool(low))
    heads = [_last_block(column, depth) + 1 for column in columns]
    if not _has_head(columns, depth, heads, [i for i in shared if i not in low]):
        heads = [max((depth[i] for i in column.rows), default=0) for column in columns]
    for column, head in zip(columns, heads, strict=True):
        for i in column.rows:
            top[i] = head
    for i in shared:
        top[i] = max(heads)
        depth[i] = 0 if i in low else top[i]
    for copy, original in copies.items():
        depth[copy], top[copy] = (max(heads),) * 2 if original is None else (depth[original], top[original])
    return depth, top, columns


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _rows_of_towers(kept: Sequence[int], places: Sequence[Place], roots: Sequence[str]) -> list[list[int]]:
    """Return the positions of each tower's layers; one with root `""` has none but normalisations above its blocks."""
    rows_of = [[i for i in kept if root and _is_below(places[i].path, root)] for root in roots]
    if "" in roots:
        rest = [i for i in kept if not any(i in rows for rows in rows_of)]
        last = max(i for i in rest if _block(places[i].path))
        is_norm = re.compile(r"(?:^|_)(?:ln|norm)").search
        inside = [
            i for i in rest if _is_input(places[i]) or (places[i].path and (i <= last or is_norm(places[i].path)))
        ]
        rows_of[list(roots).index("")] = inside
    return rows_of


def _is_shared_input(row: int, places: Sequence[Place], columns: Sequence[_Column]) -> bool:
    place = places[row]
    if _is_input(place):
        return True
    if not place.path:
        return False
    if any(map(_SHARED_INPUT.search, place.path.split("."))):
        return True
    return row < min(i for column in columns for i in column.rows) and not _is_head(place.path, numbered=True)


def _has_head(columns: Sequence[_Column], depth: Sequence[int], heads: Sequence[int], shared: Sequence[int]) -> bool:
    at_head = (depth[i] >= head for column, head in zip(columns, heads, strict=True) for i in column.rows)
    return bool(shared) or any(at_head)


def _column(rows: Sequence[int], places: Sequence[Place]) -> _Column:
    """Return the blocks of layers that follow each other; a stage's blocks count, not the stages."""
    paths = [places[i].path for i in rows]
    blocks = list(map(_block, paths))
    staged, is_inside = _stages(paths, blocks)
    if staged:
        for j, (path, outer) in enumerate(zip(paths, blocks, strict=True)):
            if outer and outer.rpartition(".")[0] in staged:
                found = _INNER.match(path[len(outer) + 1 :])
                fits = found and (found["word"] or "") == staged[outer.rpartition(".")[0]]
                blocks[j] = path[: len(outer) + 1 + found.end("number")] if found and fits else f"{outer}?"
        blocks = _stage_layers(blocks)
    return _Column(list(rows), blocks, is_inside)


def _stage_layers(blocks: Sequence[str | None]) -> list[str | None]:
    """Return the blocks with one for each layer of a stage outside of them, marked `?`: before the first it is that."""
    result = list(blocks)
    for j, block in enumerate(blocks):
        if block and block.endswith("?"):
            stage = f"{block[:-1]}."
            own = [other for other in blocks if other and other.startswith(stage)]
            before = [other for other in blocks[:j] if other and other.startswith(stage)]
            result[j] = before[-1] if before else own[0] if own else block[:-1]
    return result


def _count(column: _Column, places: Sequence[Place], depth: list[int], *, starts_at_1: bool) -> None:
    """Set the depths of a column's layers."""
    rows, blocks = column.rows, column.blocks
    numbered = [j for j, block in enumerate(blocks) if block]
    if not numbered:
        _count_singly(rows, places, depth)
        return
    in_order = list(dict.fromkeys(filter(None, blocks)))
    starts_at_1 = starts_at_1 or numbered[0] > 0 or any(_is_input(places[i]) for i in rows)
    depth_of = {block: number for number, block in enumerate(in_order, int(starts_at_1))}
    head = depth_of[in_order[-1]] + 1
    current = 0
    for j, (i, block) in enumerate(zip(rows, blocks, strict=True)):
        current = depth_of.get(block or "", current)
        path = places[i].path
        on_top = j > numbered[-1] or _HEADS.match(path) or (not block and path.rpartition(".")[2] == "rel_pos_bias")
        depth[i] = 0 if _is_input(places[i]) else head if on_top else current


def _count_singly(rows: Sequence[int], places: Sequence[Place], depth: list[int]) -> None:
    """Set the depths of layers without numbered blocks: each its own, but those of one module and the heads' list."""
    number, before = -1, None
    for i in rows:
        heads = _HEADS.match(places[i].path)
        own = heads[0] if heads else places[i].path
        number += own != before
        depth[i], before = number, own


def _last_block(column: _Column, depth: Sequence[int]) -> int:
    inside = [depth[i] for i, block in zip(column.rows, column.blocks, strict=True) if block]
    return max(inside) if inside else max(depth[i] for i in column.rows) - 1


def _towers(paths: Sequence[str]) -> list[str]:
    """Return the roots of towers that stand beside each other; empty for a network that is one column."""
    members: dict[str, dict[str, set[str]]] = {}
    for path in paths:
        if block := _block(path):
            below = members.setdefault(block.rpartition(".")[0], {})
            below.setdefault(block, set()).add(path[len(block) + 1 :])
    stacks = [stack for stack in members if stack.rpartition(".")[2] not in _HEAD_STACKS]
    root_of = {stack: _tower(stack) for stack in stacks}
    roots = list(dict.fromkeys(root for root in root_of.values() if root))
    others = [stack for stack, root in root_of.items() if not root]
    coders = [stack for stack in stacks if _CODER.match(root_of[stack].rpartition(".")[2])]
    first_blocks = [next(iter(members[stack].values())) for stack in coders]
    is_autoencoder = any(root_of[stack] == stack for stack in coders) or not _are_alike(first_blocks)
    if len(roots) > 1 and not others:
        return [] if is_autoencoder else roots
    # The tower of one sort stands below a name of its own, and the other at the root, as in OpenAI's CLIP.
    if len(roots) == len(others) == 1 and f"{roots[0]}.{others[0]}" in stacks:
        return [*roots, ""]
    return []


def _tower(stack: str) -> str:
    """Return the root of the tower that holds a stack: the first component that is named as one."""
    parts = stack.split(".")
    named = (i for kind in (_TOWER, _CODER) for i, part in enumerate(parts) if kind.search(part))
    return ".".join(parts[: next(named, -1) + 1])


def _stages(paths: Sequence[str], blocks: Sequence[str | None]) -> tuple[dict[str, str], bool]:
    """Return the stacks whose members are stages, with the word of their inner list, and whether others hold no blocks.

    Blocks are what repeats: the members of an inner list are blocks if they are alike, and parts of a block if they are
    not, but the blocks are.
    """
    inner: dict[tuple[str, str], dict[str, dict[str, set[str]]]] = {}
    whole: dict[str, dict[str, set[str]]] = {}
    for path, outer in zip(paths, blocks, strict=True):
        if not outer:
            continue
        stack, rest = outer.rpartition(".")[0], path[len(outer) + 1 :]
        whole.setdefault(stack, {}).setdefault(outer, set()).add(rest)
        if found := _INNER.match(rest):
            numbered = inner.setdefault((stack, found["word"] or ""), {}).setdefault(outer, {})
            numbered.setdefault(found["number"], set()).add(found["rest"] or "")
    staged: dict[str, str] = {}
    is_inside = bool(inner)
    for (stack, word), members in inner.items():
        lists = [list(numbered.values()) for numbered in members.values()]
        several = all(len(below) > 1 for one in lists for below in one) and any(len(one) > 1 for one in lists)
        named = _STAGES.search(stack.rpartition(".")[2]) and (not word or _BLOCKS.search(word))
        if several and named and all(map(_are_alike, lists)):
            staged[stack] = word
        elif several or not word:
            parts = not any(len(one) > 1 and _are_alike(one) for one in lists)
            is_inside = is_inside and parts and len(members) > 1 and _are_alike(list(whole[stack].values()))
    return staged, is_inside


def _are_alike(members: Sequence[set[str]]) -> bool:
    """Return whether at least half of the names in each set are in the first, or the other way round."""
    return all(2 * len(one & members[0]) >= min(len(one), len(members[0])) for one in members)


# --- Copies ----------------------------------------------------------------------------------------------------------


def _copies(places: Sequence[Place]) -> dict[int, int | None]:
    """Return the rows of frozen copies, such as moving averages, with the rows of what they copy."""
    stacks: dict[str, set[str]] = {}
    trained: set[str] = set()
    for place in places:
        if block := _block(place.path):
            stack = block.rpartition(".")[0]
            stacks.setdefault(stack, set()).add(place.path[len(stack) :].lstrip("."))
            trained |= {stack} if place.trained else set()
    result: dict[int, int | None] = {}
    row_of = {place.path: i for i, place in enumerate(places)}
    for stack in stacks.keys() - trained:
        twins = [
            one for one in trained if stacks[one] == stacks[stack] and (stack.endswith(one) or _COPY.search(stack))
        ]
        if not twins:
            continue
        copy, original = _without_common_end(stack, twins[0])
        for i, place in enumerate(places):
            if _is_below(place.path, copy) and place.trained is False:
                path = f"{original}{place.path[len(copy) :]}".lstrip(".")
                result[i] = row_of.get(path)
    return result


def _without_common_end(one: str, two: str) -> tuple[str, str]:
    """Return two names without the components at their ends in which they agree, but with one at least of the first."""
    first, second = one.split("."), two.split(".")
    while len(first) > 1 and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
    return ".".join(first), ".".join(second)


# --- Doubts ----------------------------------------------------------------------------------------------------------


def _doubts(
    column: _Column, places: Sequence[Place], layers: Sequence[Layer], depth: Sequence[int], top: Sequence[int]
) -> list[str]:
    """Return the reasons why a column's depths may be wrong; empty if the names are unambiguous."""
    own = [layers[i] for i in column.rows]
    paths = [places[i].path for i in column.rows]
    names, blocks = [layer.name for layer in own], column.blocks
    stacks: dict[str, list[int]] = {}
    for block in dict.fromkeys(filter(None, blocks)):
        stack, _, number = block.rpartition(".")
        stacks.setdefault(stack, []).append(int(number))
    head = _head_stack(own, blocks)
    bodies = [stack for stack in stacks if stack != head]
    kinds = {re.sub(r"\d+", "", stack) for stack in bodies}
    reasons: list[str] = []
    if len(kinds) > 1:
        shown = some([f"{stack}.*".lstrip(".") for stack in bodies], 4)
        reasons.append(f"there are several numbered stacks ({shown}), and each is taken to lie above the one before")
    alike = len(kinds) < len(bodies) and not _are_stages(bodies)
    if alike or (not column.is_inside and _has_inner_blocks(paths, blocks)):
        shown = some(filter(None, blocks), 3)
        reasons.append(f"names hold numbers at two levels, and the depths count {shown}")
    if any(numbers != sorted(numbers) for numbers in stacks.values()):
        reasons.append("numbered blocks are not in their order")
    singly = [name for name in names if not _HEADS.match(name)]
    reasons += _doubts_outside(own, blocks) if stacks else _doubts_without_numbers(singly)
    single = [(layers[i].name, i) for i, block in zip(column.rows, blocks, strict=True) if not block]
    if low := [name for name, i in single if depth[i] < top[i] and _is_head(name, numbered=bool(stacks))]:
        reasons.append(f"{some(low, 3)} by name next to the loss, but not last in the model's order")
    if above := [name for name, i in single if depth[i] > 0 and any(map(_EMBEDDING.search, name.split(".")))]:
        reasons.append(f"{some(above, 3)} by name next to the input, but not first in the model's order")
    return reasons


def _are_stages(stacks: Sequence[str]) -> bool:
    """Return whether the names are those of stages in their order: `layer1`, `layer2`, or `stages.0.blocks`."""
    numbers: list[tuple[int, ...]] = []
    for stack in stacks:
        parts = stack.split(".")
        with_number = [i for i, part in enumerate(parts) if re.search(r"\d", part)]
        for i in with_number:
            named = _STAGES.search(parts[i - 1]) if parts[i].isdigit() and i else _STAGE.search(parts[i])
            if not named:
                return False
        numbers.append(tuple(int(number) for number in re.findall(r"\d+", stack)))
    return numbers == sorted(numbers)


def _is_head(name: str, *, numbered: bool) -> bool:
    parts = name.split(".")
    return any(map(_HEAD.search, parts)) or (numbered and bool(_HEAD_WORD.match(parts[-1])))


def _head_stack(layers: Sequence[Layer], blocks: Sequence[str | None]) -> str | None:
    """Return the stack of a head that is a numbered chain at the end, such as `classifier.0`, `classifier.3`."""
    stack = ((blocks[-1] if blocks else "") or "").rpartition(".")[0]
    if stack.rpartition(".")[2] not in _HEAD_STACKS:
        return None
    chain = [layer for layer, block in zip(layers, blocks, strict=True) if block and block.rpartition(".")[0] == stack]
    shapes = [p.shape for layer in chain for p in layer.whole() if p.ndim > 1]
    fits = all(one[0] == two[1] for one, two in pairwise(shapes))
    at_end = list(layers[-len(chain) :]) == chain
    return stack if fits and at_end and all(layer.name in blocks for layer in chain) else None


def _has_inner_blocks(names: Sequence[str], blocks: Sequence[str | None]) -> bool:
    """Return whether blocks contain numbered blocks of several layers, or two numbers follow each other in a name."""
    inner: dict[str, dict[str, set[str]]] = {}
    staged = {block.rpartition(".")[0] for block in filter(None, blocks) if re.search(r"(?:^|\.)\d+\..*\d+$", block)}
    for name, block in zip(names, blocks, strict=True):
        if not block or block.rpartition(".")[0] in staged:
            continue
        rest = name.removeprefix(block).removeprefix(".")
        if re.match(r"\d+(?:\.|$)", rest):
            return True
        if (found := re.match(r"(.+?)\.(\d+)(?:\.(.+))?$", rest)) and "expert" not in found[1]:
            inner.setdefault(f"{block}.{found[1]}", {}).setdefault(found[2], set()).add(found[3] or "")
    return any(sum(len(below) > 1 for below in numbered.values()) > 1 for numbered in inner.values())


def _doubts_outside(layers: Sequence[Layer], blocks: Sequence[str | None]) -> list[str]:
    """Return doubts about layers that share the first or last depth while each numbered layer has its own."""
    numbered = [i for i, block in enumerate(blocks) if block]
    if any(layers[i].name != blocks[i] for i in numbered):
        return []
    for end, which in ((layers[: numbered[0]], "first"), (layers[numbered[-1] + 1 :], "last")):
        weights = [one.name for one in end if one.name and any(p.ndim > 1 for p in one.whole())]
        if len([name for name in weights if not _is_known(name)]) > 1:
            return [
                f"{some(weights, 3)} have no number and share the {which} depth, while numbered layers have one each"
            ]
    return []


def _is_known(name: str) -> bool:
    """Return whether a name says that a layer is an embedding, part of a stem, or one of several heads."""
    return bool(_HEADS.match(name) or any(_EMBEDDING.search(part) for part in name.split(".")))


def _doubts_without_numbers(names: Sequence[str]) -> list[str]:
    """Return doubts about names without numbered components, where each layer is a depth of its own."""
    members: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            members.setdefault(".".join(parts[:i]), []).append(".".join(parts[i:]))
    members = {parent: below for parent, below in members.items() if len(below) > 1}
    numbered = [parent for parent in members if parent[-1].isdigit()]
    if len({re.sub(r"\d+", "", parent) for parent in numbered}) < len(numbered):
        return [f"numbers within words ({some(numbered, 3)}) count as no blocks, and each layer is a depth of its own"]
    twins: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for parent, below in members.items():
        twins.setdefault((parent.count("."), tuple(below)), []).append(parent)
    for parents in twins.values():
        if len(parents) > 1:
            return [f"{some(parents, 3)} hold layers of the same names, and each is taken to lie above the one before"]
    return []


# --- timm's group_matcher --------------------------------------------------------------------------------------------

_WITH_PREVIOUS = 99999  # timm's mark of a group that belongs to the one before it


def matched_depths(layers: Sequence[Layer], matcher: Mapping[str, Any]) -> list[int]:
    r"""Return the depths that a network of timm gives by its `group_matcher(coarse=False)`.

    That is a mapping of words to a pattern, or to a list of pairs of a pattern and more numbers. A layer's place is the
    position of the pattern that matches first, the numbers in it and those beside it; what no pattern matches is last.

    Example:
        >>> import torch
        >>> names = ["stem.0", "blocks.0.attn", "blocks.1.attn", "norm", "head"]
        >>> layers = [Layer(name, (torch.zeros(1),)) for name in names]
        >>> matched_depths(layers, {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), ("^norm", (99999,))]})
        [0, 1, 2, 2, 3]
    """
    tests: list[tuple[re.Pattern[str], tuple[float, ...], tuple[float, ...]]] = []
    try:
        for position, given in enumerate(matcher.values()):
            pairs = [(given, None)] if has_type(given, str) else cast("Sequence[Any]", given or ())
            tests += [(re.compile(pattern), (position,), tuple(after or ())) for pattern, after in pairs]
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"depth={matcher!r} is no mapping of words to patterns, as group_matcher(coarse=False) of a network of "
            f"timm returns: {error}"
        ) from error
    places: list[tuple[float, ...]] = []
    for layer in layers:
        name = layer.parameter_names[0] if layer.parameter_names else layer.name
        hits = ((found, *more) for pattern, *more in tests if (found := pattern.match(name)))
        found, before, after = next(hits, (None, (float("inf"),), ()))
        inside = tuple(float(number) for number in found.groups() if number is not None) if found else ()
        places.append((*before, *inside, *after))
    number, depth_of = -1, dict[tuple[float, ...], int]()
    for place in sorted(set(places)):
        number += number < 0 or place[-1] != _WITH_PREVIOUS
        depth_of[place] = number
    return [depth_of[place] for place in places]
