"""An optimizer that is not torch's own is stepped right, or refused with a reason and a remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import layerwise
from layerwise.rules import Constant, LayerAdaptive

FACTORS = {"0": 0.5, "1": 2.0, "2": 0.25, "3": 1.0}


def network(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers))).double()


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def close(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(first, second, strict=True))


Build = Callable[[nn.Module], optim.Optimizer]


def trained(build: Build, steps: int = 6, attach_at: int | None = 0, **arguments: Any) -> tuple[list[Tensor], str]:
    """Return the weights, and where the factors acted."""
    model = network()
    optimizer = build(model)
    place = ""
    for step in range(steps):
        if step == attach_at:
            place = layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, **arguments).apply
        give_gradients(model, step)
        optimizer.step()
    return weights(model), place


def interpolated(build: Build, steps: int = 6, attach_at: int = 0) -> list[Tensor]:
    """Return the weights if each step of the bare optimizer is scaled by hand."""
    model = network()
    optimizer = build(model)
    for step in range(steps):
        give_gradients(model, step)
        old = weights(model)
        optimizer.step()
        with torch.no_grad():
            for p, before, factor in zip(model.parameters(), old, FACTORS.values(), strict=True):
                if step >= attach_at:
                    p.copy_(before + factor * (p - before))
    return weights(model)


def permanent(build: Callable[[Any], optim.Optimizer], steps: int = 6, attach_at: int = 0) -> list[Tensor]:
    """Return the weights with a group for each layer, whose rates are set by hand."""
    model = network()
    optimizer = build([{"params": [p]} for p in model.parameters()])
    for step in range(steps):
        if step == attach_at:
            for group, factor in zip(optimizer.param_groups, FACTORS.values(), strict=True):
                group["lr"] *= factor
        give_gradients(model, step)
        optimizer.step()
    return weights(model)


def of_all(kind: Any, **options: Any) -> Build:
    return lambda model: kind(list(model.parameters()), **options)


# --- Optimizers that follow the rates of their groups -----------------------------------------------------------------


class Momentum(optim.Optimizer):
    """Plain momentum, a parameter at a time."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    v = self.state[p].setdefault("v", torch.zeros_like(p))
                    v.mul_(0.9).add_(p.grad)
                    p.add_(v, alpha=-group["lr"])


class OverriddenSGD(optim.SGD):
    """A subclass of torch's that takes another step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


class Renamed(optim.SGD):
    """A subclass of torch's that takes the same step."""


class Counted(optim.Optimizer):
    """Counts its steps in each group, in place."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            group["step"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / float(group["step"]).__pow__(0.5))


@pytest.mark.parametrize("attach_at", [0, 3])
@pytest.mark.parametrize("kind", [Counted, Momentum, OverriddenSGD, Renamed])
def test_an_optimizer_that_follows_its_rates_equals_permanent_groups(kind: Any, attach_at: int) -> None:
    found, place = trained(of_all(kind, lr=0.1), attach_at=attach_at)
    assert place == "lr"
    assert close(found, permanent(lambda groups: kind(groups, lr=0.1), attach_at=attach_at))


# --- State and work that belong to the group --------------------------------------------------------------------------


class Stacked(optim.Optimizer):
    """One momentum for all parameters of a group, kept at the first of them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            state = self.state[group["params"][0]]
            gradients = torch.stack([p.grad for p in group["params"]])
            v = state.setdefault("v", torch.zeros_like(gradients))
            if v.shape != gradients.shape:
                v = state["v"] = torch.zeros_like(gradients)
            v.mul_(0.9).add_(gradients)
            for p, one in zip(group["params"], v, strict=True):
                p.sub_(group["lr"] * one)


class Zipped(Momentum):
    """A list with one entry a group."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, base in zip(self.param_groups, self.base_lrs, strict=False):
            for p in group["params"]:
                p.sub_(base * p.grad * (group["lr"] / base))


class Named(optim.Optimizer):
    """A list in each group with one entry a parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__([{"params": params, "names": [f"p{i}" for i in range(len(params))]}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p, name in zip(group["params"], group["names"], strict=False):
                v = self.state[name].setdefault("v", torch.zeros_like(p))
                v.mul_(0.9).add_(p.grad)
                p.sub_(group["lr"] * v)


class ByPosition(optim.Optimizer):
    """Momentum by (group, position)."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.history: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for number, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                v = self.history.setdefault((number, position), torch.zeros_like(p))
                v.mul_(0.9).add_(p.grad)
                p.sub_(group["lr"] * v)


class Normed(optim.Optimizer):
    """Divides by the norm of a group's gradients."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / norm)


class JoinedAboveASize(optim.Optimizer):
    """Divides by the norm of all matrices of a group that are large enough."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            large = [p for p in group["params"] if min(p.shape) >= 8]
            total = sum((p.grad.norm() for p in large), torch.zeros(()))
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / (total if min(p.shape) >= 8 else 1))


class NormedLater(optim.Optimizer):
    """Counts in its group, and from the thirtieth step on keeps there a norm over the group."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "count": 0, "norm": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            if group["count"] >= 30:
                group["norm"] = float(torch.stack([p.grad.norm() for p in group["params"]]).norm())
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / group["norm"])


@pytest.mark.parametrize("kind", [JoinedAboveASize, NormedLater])
def test_groups_that_belong_together_only_above_a_size_or_later_stay_whole(kind: Any) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in FACTORS)).double()
    assert layerwise.LayerwiseLR(kind(model.parameters()), Constant(FACTORS), model).apply == "update"
    with pytest.raises(ValueError, match="use apply='update'"):
        layerwise.LayerwiseLR(kind(model.parameters()), Constant(FACTORS), model, apply="lr")


JOINED = [Stacked, Zipped, Named, ByPosition, Normed]


@pytest.mark.parametrize("attach_at", [0, 3])
@pytest.mark.parametrize("kind", JOINED)
def test_groups_that_belong_together_stay_whole_under_auto(kind: Any, attach_at: int) -> None:
    found, place = trained(of_all(kind, lr=0.1), attach_at=attach_at)
    assert place == "update"
    assert close(found, interpolated(of_all(kind, lr=0.1), attach_at=attach_at))


@pytest.mark.parametrize("kind", JOINED)
def test_lr_is_refused_where_groups_belong_together(kind: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"use apply='update'"):
        layerwise.LayerwiseLR(kind(list(model.parameters())), Constant(FACTORS), model, apply="lr")


# --- Rates that are not those of the groups ---------------------------------------------------------------------------


class RelativeStep(optim.Optimizer):
    """A rate that follows from the number of the step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "relative_step": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["k"] = state.get("k", 0) + 1
                p.sub_(0.1 * p.grad / state["k"] ** 0.5)


class EarlyRate(optim.Optimizer):
    """Reads the rate when it makes its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p].setdefault("lr", group["lr"]) * p.grad)


class FirstRate(optim.Optimizer):
    """Refuses groups of different rates, as Prodigy does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("different rates are not supported")
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


class RateOfFirst(optim.Optimizer):
    """Takes the rate of its first group for all."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.param_groups[0]["lr"] * p.grad)


class RateOfLast(RateOfFirst):
    """Takes the rate of its last group for all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.param_groups[-1]["lr"] * p.grad)


class Opaque:
    """Holds an optimizer where no list or dictionary shows it."""

    def __init__(self, inner: optim.Optimizer) -> None:
        self.inner = inner


class Hidden(optim.Optimizer):
    """Steps an optimizer that is held by an object, with groups of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.held = Opaque(optim.SGD(params, lr=lr))

    def step(self, closure: Any = None) -> None:
        self.held.inner.step()


UNREAD = [RelativeStep, EarlyRate, FirstRate, RateOfFirst, RateOfLast, Hidden]


@pytest.mark.parametrize("kind", UNREAD)
def test_auto_scales_the_update_where_rates_are_not_read(kind: Any) -> None:
    found, place = trained(of_all(kind, lr=0.1))
    assert place == "update"
    assert close(found, interpolated(of_all(kind, lr=0.1)))


@pytest.mark.parametrize("kind", UNREAD)
def test_lr_is_refused_where_rates_are_not_read(kind: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"apply='lr' does not work with .*use apply='update'"):
        layerwise.LayerwiseLR(kind(list(model.parameters())), Constant(FACTORS), model, apply="lr")


# --- Weights of its own -----------------------------------------------------------------------------------------------


class Averaged(optim.Optimizer):
    """Moves an iterate of its own, and the weights towards it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                z.sub_(group["lr"] * p.grad)
                p.lerp_(z, 0.2)


class Master(optim.Optimizer):
    """Steps wide copies of the weights and writes these over the weights."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.masters = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        every = [(group, p) for group in self.param_groups for p in group["params"]]
        for (group, p), master in zip(every, self.masters, strict=True):
            master.sub_(group["lr"] * p.grad)
            p.copy_(master)


class SlowWeights(optim.Optimizer):
    """Every tenth step goes back half-way to where the weights were ten steps before."""

    def __init__(self, params: Any, lr: float = 0.1, every: int = 20) -> None:
        super().__init__(params, {"lr": lr, "every": every})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                slow = state.setdefault("slow", p.clone())
                state["k"] = state.get("k", 0) + 1
                p.sub_(group["lr"] * p.grad)
                if state["k"] % group["every"] == 0:
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class SlowerWeights(SlowWeights):
    """Goes back every two hundred steps."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, every=200)


@pytest.mark.parametrize("kind", [Averaged, Master, SlowWeights, SlowerWeights])
def test_update_is_refused_where_weights_are_kept(kind: Any) -> None:
    model = network()
    optimizer = kind(list(model.parameters()))
    before = weights(model)
    with pytest.raises(ValueError, match=r"apply='update' does not work with .*weights of its own.*use apply='lr'"):
        layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    assert close(before, weights(model))
    assert not optimizer.state


@pytest.mark.parametrize("kind", [Averaged, Master, SlowWeights])
def test_lr_equals_permanent_groups_where_weights_are_kept(kind: Any) -> None:
    found, place = trained(of_all(kind))
    assert place == "lr"
    assert close(found, permanent(kind))


class WideCopies(optim.Optimizer):
    """Steps wide copies of the weights where these are of half precision."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype is torch.bfloat16:
                    wide = self.state[p].setdefault("wide", p.float())
                    wide.sub_(group["lr"] * p.grad.float())
                    p.copy_(wide)
                else:
                    p.sub_(group["lr"] * p.grad)


def test_wide_copies_of_half_precision_are_found() -> None:
    model = network().bfloat16()
    with pytest.raises(ValueError, match=r"apply='update' does not work with .*use apply='lr'"):
        layerwise.LayerwiseLR(WideCopies(model.parameters()), Constant(FACTORS), model, apply="update")
    assert layerwise.LayerwiseLR(WideCopies(model.parameters()), Constant(FACTORS), model).apply == "lr"
    model = network()
    assert layerwise.LayerwiseLR(WideCopies(model.parameters()), Constant(FACTORS), model, apply="update")


class Kahan(optim.Optimizer):
    """Keeps what rounding to half precision has lost, and adds it to the next step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype is torch.bfloat16:
                    lost = self.state[p].setdefault("lost", torch.zeros_like(p))
                    lost.sub_(group["lr"] * p.grad)
                    before = p.clone()
                    p.add_(lost)
                    lost.add_(before - p)
                else:
                    p.sub_(group["lr"] * p.grad)


def test_what_rounding_has_lost_is_a_position_in_half_precision() -> None:
    weights_of: list[list[Tensor]] = []
    for attached in (True, False):
        model = network().bfloat16()
        parameters = list(model.parameters())
        if attached:
            optimizer = Kahan(parameters, lr=1e-3)
            layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model)
        else:
            own = [{"params": [p], "lr": 1e-3 * f} for p, f in zip(parameters, FACTORS.values(), strict=True)]
            optimizer = Kahan(own)
        for _ in range(30):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        weights_of.append(weights(model))
    assert close(*weights_of)
    model = network().bfloat16()
    with pytest.raises(ValueError, match=r"apply='update' does not work with Kahan: .*half precision.*use apply='lr'"):
        layerwise.LayerwiseLR(Kahan(model.parameters()), Constant(FACTORS), model, apply="update")


class Capped(optim.Optimizer):
    """Takes no larger rate than 0.05."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(min(group["lr"], 0.05) * p.grad)


@pytest.mark.parametrize("attach_at", [0, 3])
def test_a_rate_that_does_not_act_in_proportion_equals_permanent_groups(attach_at: int) -> None:
    found, place = trained(of_all(Capped, lr=0.1), attach_at=attach_at)
    assert place == "lr"
    assert close(found, permanent(lambda groups: Capped(groups, lr=0.1), attach_at=attach_at))


class SlowAndUnread(Averaged):
    """Weights of its own, at a rate of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                z.sub_(0.1 * p.grad)
                p.lerp_(z, 0.2)


def test_auto_is_refused_where_no_place_is_right() -> None:
    model = network()
    optimizer = SlowAndUnread(list(model.parameters()))
    with pytest.raises(ValueError, match=r"'update' does not work .*weights of its own.*'lr' does not either.*use app"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert "cannot be attached" in layerwise.diagnose(optimizer, model)
    found, place = trained(of_all(SlowAndUnread), apply="gradient")
    model = network()
    optimizer = SlowAndUnread(list(model.parameters()))
    for step in range(6):
        give_gradients(model, step)
        for p, factor in zip(model.parameters(), FACTORS.values(), strict=True):
            p.grad.mul_(factor)
        optimizer.step()
    assert place == "gradient"
    assert close(found, weights(model))


# --- Optimizers that hold optimizers ----------------------------------------------------------------------------------


class Container(optim.Optimizer):
    """Steps the optimizers in a list, as torchtitan's container does."""

    def __init__(self, parts: Sequence[nn.Module], form: str) -> None:
        inner = {str(i): optim.SGD(part.parameters(), lr=0.1) for i, part in enumerate(parts)}
        self.optimizers: Any = {"list": list(inner.values()), "tuple": tuple(inner.values()), "dict": inner}[form]
        super().__init__([p for part in parts for p in part.parameters()], {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        held = self.optimizers.values() if isinstance(self.optimizers, dict) else self.optimizers
        for optimizer in held:
            optimizer.step()


@pytest.mark.parametrize("form", ["list", "tuple", "dict"])
def test_a_container_names_the_optimizers_to_attach_to(form: str) -> None:
    model = network()
    container = Container([model[:2], model[2:]], form)
    first = "optimizer.optimizers['0']" if form == "dict" else "optimizer.optimizers[0]"
    with pytest.raises(ValueError, match="wraps other optimizers") as refused:
        layerwise.LayerwiseLR(container, Constant(FACTORS), model)
    assert first in str(refused.value)
    assert first in layerwise.diagnose(container, model)
    held = list(container.optimizers.values()) if form == "dict" else container.optimizers
    for number, inner in enumerate(held):
        rule = Constant({str(i): FACTORS[str(i)] for i in (2 * number, 2 * number + 1)})
        layerwise.LayerwiseLR(inner, rule, model)
    before = weights(model)
    give_gradients(model, 0)
    container.step()
    for p, old, factor in zip(model.parameters(), before, FACTORS.values(), strict=True):
        assert torch.allclose(p.detach(), old - 0.1 * factor * p.grad, rtol=1e-12)


# --- What a trial leaves ----------------------------------------------------------------------------------------------


def test_a_trial_changes_nothing() -> None:
    model = network()
    optimizer = ByPosition(list(model.parameters()))
    give_gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy((vars(optimizer)["history"], weights(model), [p.grad for p in model.parameters()]))
    state = torch.get_rng_state()
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model)
    after = (vars(optimizer)["history"], weights(model), [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert all(torch.equal(a, b) for x, y in zip(before[1:], after[1:], strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


class CannotBeCopied(optim.Optimizer):
    """Reaches its parameters through a closure, so that no copy of it can be tried."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.move = lambda: [p.sub_(0.1 * p.grad) for p in params]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.move()


@pytest.mark.parametrize("place", ["auto", "lr", "update"])
def test_an_optimizer_that_cannot_be_tried_is_refused(place: Any) -> None:
    model = network()
    before = weights(model)
    optimizer = CannotBeCopied(model.parameters())
    with pytest.raises(
        ValueError, match=r"cannot be tried on toy parameters .*use apply='gradient', or .*param_groups"
    ):
        layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply=place)
    give_gradients(model, 0)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="gradient")
    optimizer.step()
    gradients = [p.grad for p in model.parameters()]
    assert close(weights(model), [w - 0.1 * g for w, g in zip(before, gradients, strict=True)])


class Rests(optim.Optimizer):
    """Takes steps that move nothing."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        return None


def test_an_optimizer_that_moves_nothing_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"the toy parameters did not move"):
        layerwise.LayerwiseLR(Rests(model.parameters()), Constant(FACTORS), model)


# --- Steps inside backward --------------------------------------------------------------------------------------------


def release(model: nn.Module, step: Callable[[Tensor], None]) -> None:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)


def test_an_optimizer_that_steps_in_backward_is_refused_at_attachment() -> None:
    model = network()
    optimizer = Momentum(model.parameters())
    release(model, lambda p: optimizer.step())
    with pytest.raises(ValueError, match=r"takes its step inside backward\(\).*layerwise\.step_in_backward"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)


def test_a_step_in_backward_raises_before_weights_move() -> None:
    model = network()
    held: dict[str, optim.Optimizer] = {}
    optimizer = held["one"] = Momentum(model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    release(model, lambda p: held["one"].step())
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"takes its step inside backward\(\)"):
        model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    assert close(before, weights(model))


def test_an_optimizer_of_one_parameter_may_step_in_backward() -> None:
    model = network(1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant({"0": 2.0}), model)
    before = weights(model)
    release(model, lambda p: optimizer.step())
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    assert close(weights(model), [before[0] - 0.2 * p.grad for p in model.parameters()])


# --- Groups that a step replaces --------------------------------------------------------------------------------------


class Blocks(optim.Optimizer):
    """Steps one parameter at a time, which its groups then hold alone; the next one before or after the step."""

    def __init__(self, params: Any, first: bool, lr: float = 0.1) -> None:
        self.every = list(params)
        super().__init__(self.every, {"lr": lr})
        self.first, self.turn = first, 0
        if not first:
            self.choose()

    def choose(self) -> None:
        self.param_groups = [{**self.param_groups[0], "params": [self.every[self.turn % len(self.every)]]}]
        self.turn += 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.first:
            self.choose()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * torch.ones_like(p))
        if not self.first:
            self.choose()


@pytest.mark.parametrize("first", [True, False])
def test_groups_that_a_step_replaces_are_carried_over(first: bool) -> None:
    model = network(3)
    optimizer = Blocks(model.parameters(), first)
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model)
    start = weights(model)
    for step in range(6):
        give_gradients(model, step)
        optimizer.step()
    moved = [float((a - b).mean()) for a, b in zip(start, weights(model), strict=True)]
    assert adapter.apply == "update"
    assert moved == pytest.approx([0.1, 0.2, 0.2])
    assert len(optimizer.param_groups) == len(optimizer.param_groups[0]["params"]) == 1
    model = network(3)
    with pytest.raises(ValueError, match=r"replaces its parameter groups.*use apply='update'"):
        layerwise.LayerwiseLR(Blocks(model.parameters(), first), Constant({"0": 0.5}), model, apply="lr")
