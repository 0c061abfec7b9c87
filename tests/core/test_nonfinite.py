"""on_nonfinite="raise": which gradients are not finite, what the error names, and that nothing has changed by then."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import layerwise
from layerwise.layers import Layer
from layerwise.rules import Constant, LayerAdaptive
from layerwise.statistics import FiniteGradients


def layers_with(gradients: dict[str, Tensor | None]) -> list[Layer]:
    """One layer for each gradient, with one parameter of its shape and type."""
    layers: list[Layer] = []
    for name, gradient in gradients.items():
        weight = nn.Parameter(torch.zeros((2,)) if gradient is None else torch.zeros_like(gradient.to_dense()))
        weight.grad = gradient
        layers.append(Layer(name, (weight,), (f"{name}.weight",)))
    return layers


def complaint(gradients: dict[str, Tensor | None]) -> str:
    """Return which layers and parameters the error names; nothing if there is no error."""
    try:
        finite = FiniteGradients()
        finite.look_at(layers_with(gradients))
        finite.check()
    except FloatingPointError as error:
        pattern = r"step 1: the gradient of (layers? .*?) is not finite \((.*?)\), so no step.*"
        return re.sub(pattern, r"\1; \2", str(error))
    return ""


def sparse(values: list[float], positions: list[int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([positions]), torch.tensor(values), (4,), check_invariants=True)


# Made anew by each test: the tests of memory look at every tensor that there is.
def finite() -> dict[str, Tensor | None]:
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {
        "none": None,
        "empty": torch.zeros(0, 3),
        "zero": torch.zeros(3),
        **{
            f"largest {str(dtype).removeprefix('torch.')}": torch.full((300,), torch.finfo(dtype).max, dtype=dtype)
            for dtype in types
        },
        "complex": torch.full((3,), complex(3e38, -3e38)),
        "sparse": sparse([3e38, -3e38], [0, 2]),
        "sparse without entries": sparse([], []),
    }


BROKEN: dict[str, Callable[[], Tensor]] = {
    "NaN": lambda: torch.tensor([1.0, math.nan]),
    "infinity": lambda: torch.tensor([math.inf, 1.0]),
    "minus infinity": lambda: torch.tensor([1.0, -math.inf]),
    "half": lambda: torch.tensor([1.0, math.inf], dtype=torch.float16),
    "brain": lambda: torch.tensor([math.nan, 1.0], dtype=torch.bfloat16),
    "double": lambda: torch.tensor([[1.0], [math.nan]], dtype=torch.float64),
    "imaginary": lambda: torch.tensor([1 + 1j, complex(1, math.inf)]),
    "sparse": lambda: sparse([1.0, math.nan], [0, 3]),
    "sparse, in the sum of its entries": lambda: sparse([3e38, 3e38], [1, 1]),
}


def test_gradients_of_any_kind_are_finite_as_long_as_each_of_their_numbers_is() -> None:
    """Their norms are not: 300 of the largest numbers, or the modulus of a complex one, are beyond their types."""
    assert complaint(finite()) == ""


@pytest.mark.parametrize("kind", BROKEN)
def test_one_broken_number_of_any_kind_is_found_among_all_others(kind: str) -> None:
    others = {f"other {name}": gradient for name, gradient in finite().items()}
    assert complaint({**others, kind: BROKEN[kind](), "last": torch.ones(2)}) == f"layer {kind!r}; {kind}.weight"


FIVE = "'a', 'b', 'c', 'd', 'e'"
FIVE_WEIGHTS = "a.weight, b.weight, c.weight, d.weight, e.weight"


@pytest.mark.parametrize(
    ("count", "named"),
    [
        (1, "layer 'a'; a.weight"),
        (2, "layers 'a', 'b'; a.weight, b.weight"),
        (5, f"layers {FIVE}; {FIVE_WEIGHTS}"),
        (6, f"layers {FIVE}, … (6 in all); {FIVE_WEIGHTS}, … (6 in all)"),
        (8, f"layers {FIVE}, … (8 in all); {FIVE_WEIGHTS}, … (8 in all)"),
    ],
)
def test_five_are_named_and_the_rest_is_counted(count: int, named: str) -> None:
    gradients = {name: torch.full((2,), math.nan if i < count else 1.0) for i, name in enumerate("abcdefgh")}
    assert complaint(gradients) == named


def test_a_layer_is_named_once_and_each_of_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    for p in model[1].parameters():
        p.grad = torch.full_like(p, math.inf)
    with pytest.raises(FloatingPointError, match=re.escape("of layer '1' is not finite (1.weight, 1.bias), so no")):
        optimizer.step()


def test_the_root_module_is_called_so() -> None:
    model = nn.Linear(2, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    model(torch.full((1, 2), math.nan)).sum().backward()
    with pytest.raises(FloatingPointError, match=re.escape("layer '(root)' is not finite (weight), so no step")):
        optimizer.step()


# --- Attached ---------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def put_gradients(model: nn.Module, step: int, broken: str = "") -> None:
    """Gradients that are other ones at each step; one number of one parameter is NaN."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if name == broken:
            p.grad.view(-1)[-1] = math.nan


def seen(model: nn.Module, optimizer: optim.Optimizer, adapter: layerwise.LayerwiseLR) -> dict[str, Any]:
    """Everything that a failed step must leave as it was."""
    return copy.deepcopy(
        {
            "weights": model.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": optimizer.state_dict()["state"],
            "rule": adapter.state_dict()["state"],
            "factors": adapter.get_last_factors(),
            "rates": adapter.get_last_lr(),
        }
    )


@pytest.mark.parametrize("kind", ["plain numbers", "tensors", "fused"])
def test_whatever_way_the_factors_come_to_be_the_step_is_refused_and_those_before_it_stay(
    kind: str, assert_same_bits: Any
) -> None:
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.1, fused=kind == "fused")
    rule = layerwise.rules.bounds(LayerAdaptive(), 0, 9) if kind == "tensors" else LayerAdaptive()
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, on_nonfinite="raise")
    assert (adapter._attached.found.in_numbers is None) == (kind == "tensors")
    put_gradients(model, 0)
    optimizer.step()
    put_gradients(model, 1, broken="2.bias")
    before = seen(model, optimizer, adapter)
    with pytest.raises(FloatingPointError, match=re.escape("step 2: the gradient of layer '2' is not finite (2.bias)")):
        optimizer.step()
    assert_same_bits(seen(model, optimizer, adapter), before)
    put_gradients(model, 1)  # zeroed and computed anew
    optimizer.step()
    assert adapter.get_last_factors() != before["factors"]


def test_a_parameter_in_no_layer_is_looked_at_too(weights: Any, assert_same_bits: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers=["0"], on_nonfinite="raise")
    put_gradients(model, 0, broken="1.weight")
    before = weights(model)
    with pytest.raises(FloatingPointError, match=re.escape("layer '(in no layer)' is not finite (1.weight)")):
        optimizer.step()
    assert_same_bits(weights(model), before)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    put_gradients(model, 1)
    optimizer.param_groups[1]["params"][0].grad = torch.full((1,), math.inf)
    with pytest.raises(FloatingPointError, match=re.escape("is not finite (parameter 4 of the optimizer)")):
        optimizer.step()


def test_what_one_adapter_refuses_leaves_the_rule_of_another_as_it_was(assert_same_bits: Any) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    counting = layerwise.rules.GradientAmplification(layerwise.rules.Directionality("G"))
    first = layerwise.LayerwiseLR(optimizer, counting, model)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), model, on_nonfinite="raise")
    put_gradients(model, 0)
    optimizer.step()
    before = seen(model, optimizer, first)
    put_gradients(model, 1, broken="0.weight")
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(FloatingPointError, match="step 2"):
        optimizer.step()
    assert_same_bits(seen(model, optimizer, first), {**before, "gradients": gradients})


def test_a_layer_that_is_excluded_is_looked_at_too(make_model: Any, backward: Any) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, exclude=["2"], on_nonfinite="raise")
    backward(model)
    model[2].weight.grad[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="layer '2' is not finite"):
        optimizer.step()


def test_a_rule_that_reads_no_gradient_is_held_to_it_too(make_model: Any, backward: Any) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), model, on_nonfinite="raise")
    backward(model)
    model[0].bias.grad[0] = math.nan
    with pytest.raises(FloatingPointError, match=re.escape("layer '0' is not finite (0.bias)")):
        optimizer.step()


def test_it_is_the_gradients_of_the_closure_that_count(make_model: Any, weights: Any, assert_same_bits: Any) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")

    def closure(value: float) -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.full((2, 5), value, dtype=torch.float64)).sum()
        loss.backward()
        return loss

    before = weights(model)
    with pytest.raises(FloatingPointError, match="step 1: "):
        optimizer.step(lambda: closure(math.inf))
    assert_same_bits(weights(model), before)
    optimizer.step(lambda: closure(1.0))  # the broken gradients of the last step are still there when it begins
    with pytest.raises(FloatingPointError, match="step 2: "):
        optimizer.step(lambda: closure(math.nan))


def test_while_paused_nothing_raises_and_no_step_is_counted(make_model: Any, backward: Any) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    backward(model)
    model[0].weight.grad.fill_(math.nan)
    with adapter.paused():
        optimizer.step()
    with pytest.raises(FloatingPointError, match="step 1: "):
        optimizer.step()


def test_of_two_adapters_one_is_enough_and_neither_has_acted(make_model: Any, backward: Any) -> None:
    """The first has multiplied nothing, though it comes first; a gradient scaled twice would show it."""
    for first, second in (("ignore", "raise"), ("raise", "ignore")):
        model = make_model()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for rule, on_nonfinite in ((Constant({"*": 2.0}), first), (Constant({"*": 3.0}), second)):
            layerwise.LayerwiseLR(optimizer, rule, model, apply="gradient", on_nonfinite=on_nonfinite)
        backward(model)
        model[4].bias.grad[0] = math.nan
        before = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(FloatingPointError, match="layer '4' is not finite"):
            optimizer.step()
        for p, gradient in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0, equal_nan=True)
