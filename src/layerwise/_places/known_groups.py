"""The groups of an optimizer that replaces them in its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class KnownGroups:
    """All parameters, with their latest options, of an optimizer that replaces its groups in its step.

    Args:
        groups: The optimizer's groups.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.param_groups: list[dict[str, Any]] = [{**group, "params": list(group["params"])} for group in groups]

    def update(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over the current groups' options, and parameters that are new."""
        now: dict[int, Mapping[str, Any]] = {id(p): group for group in groups for p in group["params"]}
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            current = next((now[id(p)] for p in group["params"] if id(p) in now), group)
            group.update({name: value for name, value in current.items() if name not in ("params", "param_names")})
        for group in groups:
            new = [i for i, p in enumerate(group["params"]) if id(p) not in known]
            if new:
                names = {"param_names": [group["param_names"][i] for i in new]} if "param_names" in group else {}
                self.param_groups.append({**group, "params": [group["params"][i] for i in new], **names})
