"""Every optimizer of pytorch-optimizer and schedulefree, and torch's Muon: how each is built and stepped."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import ConstantLR

import packages
from layerwise.optimizers import unwrap

PACKAGES = {"pytorch_optimizer": "pytorch-optimizer", "schedulefree": "schedulefree"}
RATE = 0.02
DECAY = 0.02
# Options beside the rate and the decay, such that what an optimizer does only now and then is done within a few steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "AdaGC": {"warmup_steps": 2},
    "AdaHessian": {"update_period": 2},
    "AdaShift": {"keep_num": 2},
    "Adan": {"max_grad_norm": 1.0},
    "Alice": {"rank": 3, "leading_basis": 1, "update_interval": 2},
    "BSAM": {"num_data": 8},
    "Conda": {"update_proj_gap": 2},
    "DASH": {"precondition_frequency": 2},
    "FAdam": {"momentum_dtype": torch.float64, "fim_dtype": torch.float64},
    "Kron": {"pre_conditioner_update_probability": 1.0},
    "Lookahead": {"k": 2},
    "LookSAM": {"k": 2},
    "RAdam": {"betas": (0.9, 0.9)},
    "RAdamScheduleFree": {"betas": (0.9, 0.9)},
    "Ranger": {"k": 2},
    "Ranger21": {"num_iterations": 12, "lookahead_merge_time": 2},
    "ScheduleFreeRAdam": {"betas": (0.9, 0.9)},
    "SaRA": {"threshold": 0.3},
    "ScalableShampoo": {"start_preconditioning_step": 2, "preconditioning_compute_steps": 1},
    "SOAP": {"precondition_frequency": 2},
    "SophiaH": {"update_period": 2},
    "SpectralSphere": {"solver_max_iterations": 3},
    "SPAM": {"update_proj_gap": 2, "density": 0.5},
    "SPlus": {"inverse_steps": 2},
    "StableSPAM": {"update_proj_gap": 2},
    "TRAC": {"s_prev": 0.1},
}
# Rows beside those of the default options, where an option decides where a factor can act.
VARIANTS: dict[str, dict[str, Any]] = {
    "AdaFactor": {"relative_step": False},
    "ApolloDQN": {"warmup_steps": 0},
    "EmoNavi": {"use_shadow": True},
    "SWATS": {"eps": 1.0},  # with which it soon turns to SGD
}
LOW_RANK = {"rank": 3, "update_proj_gap": 2, "scale": 1.0, "projection_type": "std"}  # in the group, as GaLore asks
WITH_LOW_RANK = {"APOLLO", "Fira", "GaLore"}
OF_MODEL = {"AdamMini", "LOMO", "AdaLOMO"}
AROUND = {"Lookahead", "Magma", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC"}
AROUND |= {"ScheduleFreeWrapperReference"}
SHARPNESS = {"SAM", "LookSAM", "FriendlySAM", "WSAM", "GSAM"}
NOT_TRIED = {"CPUOffloadOptimizer": "it needs CUDA", "DeMo": "it needs the package einops"}
SECOND_ORDER = {"AdaHessian", "SophiaH"}
DISTANCE = {"DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "Prodigy"}  # used at a rate of 1
MATRICES = {"SpectralSphere", "Muon"}  # torch's Muon; the others take the remaining parameters with AdamW


@dataclass(frozen=True)
class Guest:
    """An optimizer of another package with one setting of its options."""

    package: str
    name: str
    variant: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.variant.items())
        return f"{self.package}.{self.name}" + (f"({options})" if options else "")

    @property
    def key(self) -> str:
        """Where the class stands."""
        return f"{self.package}.{self.name}"

    @property
    def kind(self) -> type:
        """The class."""
        module = packages.imported(self.package) if self.further else import_module(self.package)
        return getattr(module, self.name)

    @property
    def further(self) -> bool:
        """Whether `packages.py` builds it."""
        return self.package in packages.PACKAGES

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that it is tried on."""
        return torch.float32 if self.package in packages.SINGLE or self.name == "GaLoreAdamW8bit" else torch.float64

    @property
    def mixed(self) -> bool:
        """Whether it takes matrices, and in groups of their own all other parameters."""
        if self.further:
            return self.key in packages.MIXED
        return ".muon" in self.kind.__module__ and self.package == "pytorch_optimizer"


def guests(package: str) -> list[Guest]:
    """Return the optimizers that a package offers, its wrappers among them, in alphabetical order."""
    found: list[Guest] = []
    for name, kind in sorted(vars(import_module(package)).items()):
        is_optimizer = isinstance(kind, type) and hasattr(kind, "step") and hasattr(kind, "zero_grad")
        if is_optimizer and not kind.__module__.startswith("torch."):
            found.append(Guest(package, name))
            if name in VARIANTS:
                found.append(Guest(package, name, VARIANTS[name]))
    return found


def further_guests(package: str) -> list[Guest]:
    """Return the optimizers of a further package, each with the options that make a difference."""
    found: list[Guest] = []
    for name in packages.names(package):
        found.append(Guest(package, name))
        if found[-1].key in packages.VARIANTS:
            found.append(Guest(package, name, packages.VARIANTS[found[-1].key]))
    return found


def all_guests() -> list[Guest]:
    """Return the optimizers of pytorch-optimizer, schedulefree and torch itself."""
    found = [guest for package in PACKAGES if find_spec(package) for guest in guests(package)]
    return [*found, *([Guest("torch.optim", "Muon")] if hasattr(optim, "Muon") else [])]


class Pair(nn.Module):
    """A matrix as the product of two, as in LoRA."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, inside) / 3)
        self.up = nn.Parameter(torch.randn(outside, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return x @ self.down.T @ self.up.T


class Network(nn.Module):
    """Three layers.

    Args:
        guest: The optimizer, which decides what the layers are made of.
        separate: None for a loss that joins the layers; else a curvature, and the gradient of each layer depends on its
            own weights only.
    """

    def __init__(self, guest: Guest, separate: float | None) -> None:
        super().__init__()
        seed_everything(0)
        self.width = 64 if guest.package in packages.WIDE else 5
        shapes = {"first": (5, 6), "second": (6, 4), "third": (4, 3)}
        if self.width == 64:
            shapes = dict.fromkeys(shapes, (64, 64))
        for name, (inside, outside) in shapes.items():
            bias = (
                guest.mixed or guest.key not in packages.MATRICES
                if guest.further
                else (guest.name not in MATRICES or guest.mixed)
            )
            layer = Pair(inside, outside) if guest.name == "LoRARite" else nn.Linear(inside, outside, bias=bias)
            self.add_module(name, layer)
        self.separate = separate
        self.to(guest.dtype)

    def loss(self, step: int) -> Tensor:
        """Return a loss with other gradients at each step."""
        generator = torch.Generator().manual_seed(1000 + step)
        if self.separate is not None:
            drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in self.parameters()]
            slopes = [0.5 + d.to(p.dtype) for d, p in zip(drawn, self.parameters(), strict=True)]
            terms = [(s * p + 0.5 * self.separate * p**2).sum() for s, p in zip(slopes, self.parameters(), strict=True)]
            return torch.stack(terms).sum() + 100.0
        x = torch.randn(8, self.width, generator=generator, dtype=torch.float64).to(next(self.parameters()).dtype)
        for layer in self.children():
            x = torch.tanh(layer(x))
        return (x - 0.2 * step).pow(2).mean() + 0.1 * step


@dataclass
class Run:
    """A network and the optimizer that trains it.

    Args:
        stepped: What the training loop steps.
        target: What an adapter is attached to: the same, or the optimizer that it holds.
    """

    guest: Guest
    model: Network
    stepped: Any
    target: Any

    @property
    def inner(self) -> optim.Optimizer:
        """The optimizer on which an adapter acts."""
        return unwrap(self.target)

    @property
    def parameters(self) -> list[Tensor]:
        """What it trains, in the model's order; copies of the parameters in the case of SafeFP16Optimizer."""
        return getattr(self.stepped, "fp32_params", list(self.model.parameters()))

    @property
    def layer_of(self) -> dict[int, str]:
        """The layer's name of each parameter's id."""
        names = [name for name, layer in self.model.named_children() for _ in layer.parameters()]
        return dict(zip(map(id, self.parameters), names, strict=True))

    def step(self, number: int, *, with_closure: bool = False) -> None:
        """Take one step."""
        guest = self.guest
        if hasattr(self.stepped, "train") and guest.name != "SAMWrapper":
            self.stepped.train()

        @torch.enable_grad()
        def closure() -> Any:
            self.stepped.zero_grad()
            loss = self.model.loss(number)
            if hasattr(self.stepped, "backward"):
                self.stepped.backward(loss)
            else:
                loss.backward(create_graph=guest.name in SECOND_ORDER or guest.key in packages.SECOND_ORDER)
            return (None, loss.detach()) if guest.name == "GSAM" else loss.detach()

        loss = closure()
        seed_everything(number)
        if guest.further and not takes_closure(self.stepped):
            self.stepped.step()
        elif (
            guest.name in SHARPNESS | {"SAMWrapper"}
            or with_closure
            or guest.name == "BSAM"
            or guest.name.endswith("Closure")
        ):
            self.stepped.step(closure)
        else:
            self.stepped.step(*([lambda: loss] if guest.name == "AliG" else []))

    def weights(self) -> list[Tensor]:
        """Return copies of the parameters, as they are trained and as they are evaluated."""
        training = [p.detach().clone() for p in self.model.parameters()]
        if not (hasattr(self.stepped, "eval") and self.stepped.state) or self.guest.name == "SAMWrapper":
            return [*training, *training]
        self.stepped.eval()
        return [*training, *(p.detach().clone() for p in self.model.parameters())]


def takes_closure(optimizer: Any) -> bool:
    """Tell whether `step` takes a closure."""
    return len(inspect.signature(optimizer.step).parameters) > 0


def draws_random_numbers(run: Run) -> bool:
    """Take three steps; tell whether one of them has drawn random numbers."""
    drawn = False
    for number in range(3):
        run.step(number)
        after = random_state()
        seed_everything(number)
        drawn = drawn or after != random_state()
    return drawn


def random_state() -> Any:
    """Return where the random number generators are."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy.random.get_state()[2]


def seed_everything(seed: int) -> None:
    """Let the optimizers that draw random numbers draw the same ones in each run."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed writes down the stack for every kind of device
    random.seed(seed)
    numpy.random.seed(seed)


def groups_of(guest: Guest, model: Network) -> list[dict[str, Any]]:
    """Return the parameter groups to build the optimizer of, as few as it allows."""
    if guest.package == "galore_torch":
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        return [{"params": others}, {"params": matrices, **packages.LOW_RANK}]
    own = LOW_RANK if guest.name in WITH_LOW_RANK and not guest.further else {}
    if guest.mixed:
        return [
            {"params": [p for p in model.parameters() if (p.ndim == 2) == matrices], "use_muon": matrices}
            for matrices in (True, False)
        ]
    return [{"params": list(model.parameters()), **own}]


def split_by_layer(groups: list[dict[str, Any]], layer_of: dict[int, str]) -> list[dict[str, Any]]:
    """Return groups of one layer each."""
    names = list(dict.fromkeys(layer_of.values()))
    return [
        {**group, "params": [p for p in group["params"] if layer_of[id(p)] == name]}
        for group in groups
        for name in names
    ]


def build(
    guest: Guest,
    *,
    by_layer: bool = False,
    foreach: bool = False,
    rate: float = RATE,
    decay: float = DECAY,
    separate: float | None = None,
) -> Run:
    """Build a network and its optimizer."""
    model = Network(guest, separate)
    run = Run(guest, model, None, None)
    groups, kind = groups_of(guest, model), guest.kind
    if by_layer:
        groups = split_by_layer(groups, run.layer_of)
    if guest.further:
        rate = rate / RATE if guest.key in packages.RATELESS else rate
        options = {"lr": rate, "weight_decay": decay, "d0": 1e-3, "min_8bit_size": 16, "block_size": 64}
        options |= {**packages.OPTIONS.get(guest.key, {}), **guest.variant, **({"foreach": True} if foreach else {})}
        run.stepped = run.target = packages.built(guest.key, kind, model, groups, options)
        if by_layer and guest.key in packages.ONE_GROUP:
            run.inner.param_groups = split_by_layer(run.inner.param_groups, run.layer_of)
        if guest.key in packages.AROUND:
            run.target = getattr(run.stepped, packages.AROUND[guest.key])
        return run
    accepted = inspect.signature(kind.__init__).parameters
    options = {**OPTIONS.get(guest.name, {}), **guest.variant}
    options |= {"foreach": True} if foreach and "foreach" in accepted else {}
    if guest.name in AROUND:
        copies = guest.name == "SafeFP16Optimizer"  # found again by the parameters' names
        params = list(model.named_parameters()) if copies else groups
        run.stepped = kind(optim.SGD(params, lr=rate, momentum=0.5, weight_decay=decay), **options)
        run.target = run.stepped if hasattr(run.stepped, "optimizer") else run.stepped.base
        if copies and by_layer:  # it takes one group only
            run.inner.param_groups = split_by_layer(run.inner.param_groups, run.layer_of)
        return run
    if guest.name in SHARPNESS:
        options |= {"lr": rate, "weight_decay": decay}
        if guest.name == "GSAM":
            base = optim.SGD(groups, lr=rate, momentum=0.5, weight_decay=decay)
            radius = import_module(guest.package).ProportionScheduler(ConstantLR(base, 1.0), max_lr=rate)
            run.stepped = kind(groups, base, model, radius)
        else:
            run.stepped = kind(*([model] if guest.name == "WSAM" else []), groups, optim.SGD, **options)
        run.target = run.stepped.base_optimizer
        return run
    options |= {"weight_decay": decay} if "weight_decay" in accepted else {}
    if guest.name in DISTANCE:
        rate, options["d0"] = rate / RATE, 1e-3
    options |= {name: rate for name in ("lr", "max_lr") if name in accepted}
    run.stepped = run.target = kind(model if guest.name in OF_MODEL else groups, **options)
    return run


@contextlib.contextmanager
def surroundings(guest: Guest) -> Iterator[None]:
    """Give the optimizer what it needs around it, and keep to itself what it says."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        if guest.further:
            warnings.simplefilter("ignore")
            stack.enter_context(packages.uncompiled())
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        if guest.name in {"DistributedMuon", "DeMo"} or guest.key in packages.PROCESSES:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
