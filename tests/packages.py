"""Further packages of optimizers: which there are, and how each class is built.

Their modules are imported when they are asked for, some of them in stages that a plain import would not reach: timm's
optimizers need none of its models, and so no torchvision.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn, optim

PACKAGES = {
    "adam_mini": "adam-mini",
    "badam": "badam",
    "bitsandbytes.optim": "bitsandbytes",
    "came_pytorch": "came-pytorch",
    "dadaptation": "dadaptation",
    "galore_torch": "galore-torch",
    "heavyball": "heavyball",
    "lion_pytorch": "lion-pytorch",
    "muon": "muon-optimizer",
    "optimi": "torch-optimi",
    "prodigyopt": "prodigyopt",
    "prodigyplus": "prodigy-plus-schedule-free",
    "timm.optim": "timm",
    "torch_optimizer": "torch-optimizer",
    "torchao.optim": "torchao",
}
SINGLE = {"bitsandbytes.optim", "heavyball", "torchao.optim"}  # float32
WIDE = {"torchao.optim"}  # small tensors get no states of eight bits
NO_OPTIMIZER = {
    *("heavyball.PSGDBase", "heavyball.SOAPBase", "prodigyplus.CoreOptimiser"),  # classes above others
    "torchao.optim._AdamW",
}
CPU = "its step needs CUDA"
BREAKS = "its step fails on the CPU, without an adapter too"
NOT_TRIED = {
    "badam.BlockOptimizerRatio": "it needs a language model with an embedding and a head",
    "bitsandbytes.optim.AdEMAMix32bit": BREAKS,
    "bitsandbytes.optim.PagedAdEMAMix32bit": BREAKS,
    "galore_torch.GaLoreAdamW8bit": CPU,
    "heavyball.SplitOpt": "it holds one optimizer for each kind of parameters; attach to each of them",
    "torchao.optim.CPUOffloadOptimizer": "it needs CUDA",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adam_mini.Adam_mini": {"dim": 4, "n_heads": 2, "verbose": False},
    **{f"bitsandbytes.optim.{n}{b}": {"momentum": 0.5} for n in ("LARS", "SGD") for b in ("", "8bit", "32bit")},
    "bitsandbytes.optim.PytorchLARS": {"momentum": 0.5},
    "came_pytorch.CAME": {"betas": (0.9, 0.999, 0.9999)},
    "galore_torch.GaLoreAdafactor": {"relative_step": False},
    "optimi.Ranger": {"k": 2},
    "optimi.RAdam": {"betas": (0.9, 0.9)},
    "torch_optimizer.Lookahead": {"k": 2},
    "torch_optimizer.RAdam": {"betas": (0.9, 0.9)},
    "torch_optimizer.Ranger": {"k": 2, "betas": (0.9, 0.9)},
    "torch_optimizer.RangerQH": {"k": 2},
    "torch_optimizer.RangerVA": {"k": 2},
    "torch_optimizer.SWATS": {"eps": 1.0},  # with which it soon turns to SGD
    "torch_optimizer.Adafactor": {"relative_step": True},
    "timm.optim.Lookahead": {"k": 2},
    "timm.optim.MADGRAD": {},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "prodigyopt.Prodigy": {"slice_p": 3},
    "torch_optimizer.Adafactor": {"relative_step": False},
}
RATELESS = {  # the rate is the estimated distance, times this
    *("dadaptation." + name for name in ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")),
    *("prodigyopt.Prodigy", "prodigyplus.ProdigyPlusScheduleFree"),
}
SECOND_ORDER = {"torch_optimizer.Adahessian", "timm.optim.Adahessian"}
MATRICES = {"muon.Muon", "muon.SingleDeviceMuon", "timm.optim.Muon"}
MIXED = {"muon.MuonWithAuxAdam", "muon.SingleDeviceMuonWithAuxAdam"}
AROUND = {"heavyball.SAMWrapper": "wrapped_optimizer"}
AROUND |= {"torch_optimizer.Lookahead": "optimizer", "timm.optim.Lookahead": "_base_optimizer"}
ONE_GROUP = {"muon.Muon", "heavyball.PSGDLRA"}  # takes a list of parameters alone
LOW_RANK = {"rank": 3, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}
PROCESSES = {"muon.Muon", "muon.MuonWithAuxAdam"}


def imported(module: str) -> Any:
    """Import a module of a package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if module == "timm.optim" and find_spec("torchvision") is None and module not in sys.modules:
            package = types.ModuleType("timm")
            package.__path__ = list(find_spec("timm").submodule_search_locations)
            models: Any = types.ModuleType("timm.models")
            models.group_parameters = None
            sys.modules |= {"timm": package, "timm.models": models}
        found = importlib.import_module(module)
    if module == "heavyball":
        found.utils.compile_mode = None
    return found


def is_here(module: str) -> bool:
    """Tell whether a package is installed."""
    return find_spec(module.partition(".")[0]) is not None


def names(module: str) -> list[str]:
    """Return the names of a package's optimizers, each class once."""
    here: dict[type, str] = {}
    for name, kind in sorted(vars(imported(module)).items()):
        is_optimizer = isinstance(kind, type) and hasattr(kind, "step") and hasattr(kind, "zero_grad")
        if is_optimizer and not kind.__module__.startswith("torch.") and f"{module}.{name}" not in NO_OPTIMIZER:
            here.setdefault(kind, name)
    return sorted(here.values())


def built(key: str, kind: Any, model: nn.Module, groups: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    """Build an optimizer; options that it does not take are left out."""
    accepted = inspect.signature(kind.__init__).parameters
    rate = options["lr"]
    options = {name: value for name, value in options.items() if name in accepted}
    if key == "adam_mini.Adam_mini":
        return kind(list(model.named_parameters()), **options)
    if key == "badam.BlockOptimizer":
        base = optim.AdamW(groups, lr=rate)
        blocks = [[name] for name, _ in model.named_children()]
        return kind(base, list(model.named_parameters()), block_prefix_list=blocks, switch_block_every=99, verbose=0)
    if key.endswith("Lookahead"):
        return kind(optim.SGD(groups, lr=rate, momentum=0.5), **OPTIONS[key])
    if key == "heavyball.SAMWrapper":
        return kind(groups, imported("heavyball").AdamW(groups, lr=rate))
    if key in ONE_GROUP:
        return kind([p for group in groups for p in group["params"]], **options)
    if key in MIXED:
        return kind([{**group, "lr": rate, "weight_decay": options.get("weight_decay", 0.02)} for group in groups])
    return kind(groups, **options)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Let steps that compile themselves run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield
