"""The writes of a step are scaled: each kind of write, each optimizer and form of torch's, and where it ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise import _writes
from layerwise._writes import CannotScaleError, ScaledWrites
from optimizer_cases import CASES, LATE, Case, network

torch.manual_seed(0)
D = torch.randn(3, 4, dtype=torch.float64)
E = torch.rand(3, 4, dtype=torch.float64) + 1
HALF = torch.tensor(0.5, dtype=torch.float64)
WRITES: dict[str, Callable[[Any], Any]] = {
    "p += d": lambda p: p.__iadd__(D),
    "p -= d": lambda p: p.__isub__(D),
    "p *= s": lambda p: p.__imul__(1.3),
    "p *= t": lambda p: p.mul_(E),
    "p *= mask": lambda p: p.mul_(D > 0),
    "p /= integers": lambda p: p.div_(torch.full((3, 4), 3)),
    "p /= s": lambda p: p.__itruediv__(1.7),
    "p /= t": lambda p: p.div_(E),
    "p **= 2": lambda p: p.__ipow__(2),
    "p //= s": lambda p: p.__ifloordiv__(0.3),
    "p[...] = s": lambda p: p.__setitem__(slice(0, 2), 0.5),
    "add alpha": lambda p: p.add_(D, alpha=0.3),
    "add number": lambda p: p.add_(2.0, alpha=0.5),
    "add named": lambda p: p.add_(other=D, alpha=2),
    "sub": lambda p: p.sub_(D, alpha=0.3),
    "mul named": lambda p: p.mul_(other=2.0),
    "div floor": lambda p: p.div_(0.3, rounding_mode="floor"),
    "addcdiv": lambda p: p.addcdiv_(D, E, value=0.3),
    "addcmul": lambda p: p.addcmul_(D, E, value=-0.3),
    "lerp": lambda p: p.lerp_(D, 0.3),
    "lerp tensor": lambda p: p.lerp_(D, E / 3),
    "copy": lambda p: p.copy_(D),
    "copy broadcast": lambda p: p.copy_(D[0]),
    "copy float32": lambda p: p.copy_(D.float()),
    "clamp": lambda p: p.clamp_(-0.1, 0.1),
    "zero": lambda p: p.zero_(),
    "index_add": lambda p: p.index_add_(0, torch.tensor([1]), D[:1]),
    "masked_scatter": lambda p: p.masked_scatter_(p.detach() > 0, D),
    "addmm": lambda p: p.addmm_(torch.eye(3, dtype=torch.float64), D),
    "data add": lambda p: p.data.add_(D),
    "data set": lambda p: setattr(p, "data", D.clone()),
    "detach": lambda p: p.detach().add_(D),
    "view": lambda p: p.view(-1)[2:5].add_(1.0),
    "row": lambda p: p[1].mul_(2),
    "out": lambda p: torch.add(p, D, out=p),
    "aten overload": lambda p: torch.ops.aten.add_.Tensor(p, D),
    "aten packet": lambda p: torch.ops.aten.mul_(p, 2.0),
    "foreach add": lambda p: torch._foreach_add_([p], [D], alpha=0.3),
    "foreach add number": lambda p: torch._foreach_add_([p], 0.3),
    "foreach add numbers": lambda p: torch._foreach_add_([p], [0.3]),
    "foreach add 0-dim": lambda p: torch._foreach_add_([p], HALF, alpha=2.0),
    "foreach sub": lambda p: torch._foreach_sub_([p], [D], alpha=0.3),
    "foreach mul number": lambda p: torch._foreach_mul_([p], 0.3),
    "foreach mul numbers": lambda p: torch._foreach_mul_([p], [0.3]),
    "foreach mul tensors": lambda p: torch._foreach_mul_([p], [E]),
    "foreach mul 0-dim": lambda p: torch._foreach_mul_([p], HALF),
    "foreach div": lambda p: torch._foreach_div_([p], [E]),
    "foreach div number": lambda p: torch._foreach_div_([p], 3.0),
    "foreach addcdiv": lambda p: torch._foreach_addcdiv_([p], [D], [E], 0.3),
    "foreach addcmul numbers": lambda p: torch._foreach_addcmul_([p], [D], [E], [0.3]),
    "foreach addcdiv packed": lambda p: torch._foreach_addcdiv_([p], [D], [E], torch.tensor([0.3])),
    "foreach lerp": lambda p: torch._foreach_lerp_([p], [D], 0.3),
    "foreach lerp tensors": lambda p: torch._foreach_lerp_([p], [D], [E / 3]),
    "foreach copy": lambda p: torch._foreach_copy_([p], [D]),
    "foreach clamp": lambda p: torch._foreach_clamp_max_([p], 0.1),
    "foreach neg": lambda p: torch._foreach_neg_([p]),
}


def parameter() -> nn.Parameter:
    generator = torch.Generator().manual_seed(1)
    return nn.Parameter(torch.randn(3, 4, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("write", WRITES)
def test_each_write_moves_by_factor_times_the_change(write: str, on_device: bool) -> None:
    for factor in (0.3, 1.0, 0.0, 2.5):
        bare, scaled, other = parameter(), parameter(), parameter()
        start = bare.detach().clone()
        mode = ScaledWrites([scaled, other], {})
        mode.scale([(scaled, torch.tensor(factor, dtype=torch.float64) if on_device else factor)])
        with torch.no_grad():
            WRITES[write](bare)
            mode.begin()
            WRITES[write](scaled)
            mode.end()
        expected = start + factor * (bare.detach() - start)
        torch.testing.assert_close(scaled.detach(), expected, rtol=4e-15, atol=4e-15)
        assert torch.equal(other.detach(), start)
        if factor == 1 and not on_device:
            assert torch.equal(scaled.detach(), bare.detach())


def test_the_old_argument_order_of_add_works() -> None:
    torch.set_warn_always(True)  # else only the first time in a process
    try:
        with pytest.warns(UserWarning, match="deprecated"):
            bare = parameter().detach().add_(0.3, D)
    finally:
        torch.set_warn_always(False)
    scaled = parameter()
    mode = ScaledWrites([scaled], {})
    mode.scale([(scaled, 2.0)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode.begin()
        scaled.add_(0.3, D)
        mode.end()
    start = parameter().detach()
    torch.testing.assert_close(scaled.detach(), start + 2 * (bare - start), rtol=1e-14, atol=1e-14)


def scale(optimizer: torch.optim.Optimizer, factors: dict[int, float]) -> None:
    """Scale what each step of an optimizer writes; factors by the parameters' ids."""
    modes: list[ScaledWrites] = []

    def before(*_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        modes.append(ScaledWrites(parameters, optimizer.state))
        modes[-1].scale((p, factors[id(p)]) for p in parameters)
        modes[-1].begin()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: modes.pop().end())


FACTORS = {"first": 0.5, "second": 1.7, "third": 2.2}


def trained(case: Case, how: str, steps: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights at the end and at the start; `how` is attached, in permanent groups, or by hand."""
    model = network(case)
    layer_of = {id(p): name.partition(".")[0] for name, p in model.named_parameters()}
    start = [p.detach().clone() for p in model.parameters()]
    parameters = list(model.parameters())
    optimizer = case.make([{"params": [p]} for p in parameters] if how == "groups" else parameters)
    if how == "groups":
        for group in optimizer.param_groups:
            group["lr"] *= FACTORS[layer_of[id(group["params"][0])]]
    if how == "attached":
        scale(optimizer, {key: FACTORS[name] for key, name in layer_of.items()})
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(step).backward()
        old = [p.detach().clone() for p in parameters]
        optimizer.step()
        if how == "by hand":
            with torch.no_grad():
                for p, before in zip(parameters, old, strict=True):
                    p.copy_(before + FACTORS[layer_of[id(p)]] * (p - before))
    return [p.detach() for p in parameters], start


def distance(found: list[Tensor], wanted: list[Tensor], start: list[Tensor]) -> float:
    pairs = zip(found, wanted, start, strict=True)
    return max(float((a - b).abs().max() / (b - s).abs().max()) for a, b, s in pairs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaled_writes_equal_permanent_groups_and_hand_made_steps(case: Case) -> None:
    found, start = trained(case, "attached", 6)  # each step of RMSprop doubles what rounding has made different
    assert distance(found, trained(case, "by hand", 6)[0], start) < 1e-12
    found, start = trained(case, "attached")
    if case.optimizer not in LATE:  # whose rates a group's rate does not carry
        assert distance(found, trained(case, "groups")[0], start) < 1e-12


class Failing(torch.optim.SGD):
    """Raises in the middle of its step."""

    fails = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
                with torch.profiler.record_function("inside"):
                    if self.fails:
                        raise ZeroDivisionError


def linear() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False).double()
    model.weight.grad = torch.ones_like(model.weight)
    return model


def test_an_exception_in_a_step_ends_the_scaling() -> None:
    model = linear()
    optimizer = Failing(model.parameters(), lr=0.1)
    scale(optimizer, {id(model.weight): 3.0})
    optimizer.fails = True
    for _ in range(2):
        with torch.device("cpu"), pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert torch._C._len_torch_function_stack() == 0
        before = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.add_(1.0)
        assert torch.equal(model.weight.detach(), before + 1)
    optimizer.fails = False
    before = model.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.3, rtol=1e-14, atol=0)


class Unseen(torch.optim.Optimizer):
    """Writes into the weights' memory."""

    def __init__(self, params: Any, way: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.way = way

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in [p for group in self.param_groups for p in group["params"]]:
            if self.way == "numpy":
                p.numpy()[:] -= 0.1
            elif self.way == "set_":
                p.set_(p - 0.1 * p.grad)
            else:
                p.data_ptr()


@pytest.mark.parametrize("way", ["numpy", "set_", "data_ptr"])
def test_writes_that_are_not_seen_raise(way: str) -> None:
    model = linear()
    optimizer = Unseen(model.parameters(), way)
    scale(optimizer, {id(model.weight): 3.0})
    with pytest.raises(CannotScaleError, match=r"not seen|does not see"):
        optimizer.step()
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("foreach", [False, True])
def test_parameters_of_one_buffer_have_factors_of_their_own(foreach: bool) -> None:
    buffer = torch.ones(4, dtype=torch.float64)
    parameters = [nn.Parameter(buffer[:2]), nn.Parameter(buffer[2:])]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=foreach)
    scale(optimizer, {id(parameters[0]): 0.5, id(parameters[1]): 2.0})
    optimizer.step()
    assert buffer.tolist() == pytest.approx([0.95, 0.95, 0.8, 0.8], rel=1e-15)


def test_a_buffer_under_several_parameters_is_scaled_by_part() -> None:
    buffer, other = torch.ones(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    parameters = [nn.Parameter(buffer[:2]), nn.Parameter(buffer[2:])]
    mode = ScaledWrites(parameters, {})
    mode.scale([(parameters[0], 0.5), (parameters[1], 2.0)])
    with torch.no_grad():
        mode.begin()
        torch._foreach_add_([other, buffer], [torch.ones_like(other), torch.ones_like(buffer)], alpha=-0.1)
        mode.end()
    assert other.tolist() == [-0.1, -0.1]
    assert buffer.tolist() == pytest.approx([0.95, 0.95, 0.8, 0.8], rel=1e-15)


def test_this_pytorch_lets_writes_be_scaled() -> None:
    assert _writes.writes_can_be_scaled()
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_steps(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    scale(optimizer, {id(model.weight): 4.0})
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()  # a step of 0.005 is lost in bfloat16, one of 0.02 is not
    assert torch.equal(model.weight.detach(), torch.full((4, 4), 0.98, dtype=dtype))
