"""Parts of parameters that are layers, against networks in which each part is a parameter of its own."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from test_places import keep_on_device
from torch import Tensor, nn, optim

import layerwise
from layerwise.rules import LARS, BackMatching, Constant, LayerAdaptive, LayerDecay, NormalizedGradient, Trust
from optimizer_cases import CASES, Case, assert_same_bits, network, take_step
from rule_cases import RULES

NAMES = ("q", "k", "v")


class Conv1D(nn.Module):
    """A weight of inputs × outputs, as GPT-2's in Hugging Face's Transformers."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(0.3 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Attention(nn.Module):
    """One head over a fused projection of the given sizes, with tanh: under softmax the bias of k has no gradient."""

    def __init__(self, sizes: tuple[int, ...], kind: Any = nn.Linear) -> None:
        super().__init__()
        width = sizes[0]
        self.sizes = sizes
        self.qkv = kind(width, sum(sizes)) if kind is nn.Linear else kind(sum(sizes), width)
        self.proj = nn.Linear(width, 1)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).split(self.sizes, -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        repeated = [one.repeat(1, q.shape[1] // one.shape[1]) for one in (k, v)]
        return self.proj((q @ repeated[0].T).tanh() @ repeated[1])


class Separate(Attention):
    """The same network with three modules in place of the fused projection."""

    def __init__(self, fused: Attention, *, transposed: bool) -> None:
        super().__init__(fused.sizes)
        del self.qkv
        weight = fused.qkv.weight.detach()
        pieces = weight.split(fused.sizes, int(transposed))
        for name, piece, bias in zip(NAMES, pieces, fused.qkv.bias.detach().split(fused.sizes), strict=True):
            module: Any = Conv1D(*piece.shape[::-1]) if transposed else nn.Linear(*piece.shape[::-1])
            with torch.no_grad():
                module.weight.copy_(piece)
                module.bias.copy_(bias)
            setattr(self, name, module)
        self.proj = copy.deepcopy(fused.proj)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in NAMES)


def networks(sizes: tuple[int, ...] = (6, 6, 6), kind: Any = nn.Linear) -> tuple[Attention, Separate]:
    torch.manual_seed(0)
    fused = Attention(sizes, kind).double()
    return fused, Separate(fused, transposed=kind is not nn.Linear).double()


def train(model: nn.Module, optimizer: Any, steps: int = 6, *, closure: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, 6, dtype=torch.float64, generator=generator)

        def loss(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            value = (model(x) - x[:, :1]).square().sum()
            value.backward()
            return value

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()


def split_like(model: Attention, value: Any = NAMES) -> dict[str, Any]:
    return {"qkv.weight": value, "qkv.bias": value}


def difference(fused: Attention, separate: Separate) -> float:
    """The largest difference between the weights of the two networks."""
    dimension = int(not isinstance(fused.qkv, nn.Linear))
    pairs = [(fused.proj.weight, separate.proj.weight), (fused.proj.bias, separate.proj.bias)]
    modules: list[Any] = [getattr(separate, name) for name in NAMES]
    pairs.append((fused.qkv.weight, torch.cat([module.weight for module in modules], dimension)))
    pairs.append((fused.qkv.bias, torch.cat([module.bias for module in modules])))
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def constant(names: tuple[str, str, str], kind: str) -> dict[str, float]:
    return dict(zip((f"{name}.{kind}" for name in names), (0.5, 3.0, 0.0), strict=True))


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.003, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD Nesterov foreach": (
        optim.SGD,
        {"lr": 0.003, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": True},
    ),
    "SGD fused": (optim.SGD, {"lr": 0.003, "momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    "AdamW": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW foreach": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    "AdamW fused": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "AdamW amsgrad": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "RMSprop": (optim.RMSprop, {"lr": 0.001, "momentum": 0.9, "centered": True, "foreach": True}),
}


def rule_for(kind: str, *, separate: bool) -> layerwise.rules.Rule:
    if kind == "Constant":
        by_part = zip(NAMES, (0.5, 3.0, 0.0), strict=True)
        named = {name: (f"{name}.weight" if separate else f"qkv.weight[{name}]", f) for name, f in by_part}
        return Constant({"proj.weight": 2.0, **dict(named.values())})
    return LayerAdaptive() if kind == "LayerAdaptive" else Trust()


MATRIX = [
    (rule, place, optimizer)
    for rule in ("LayerAdaptive", "Constant", "Trust")
    for place in ("gradient", "update")
    for optimizer in OPTIMIZERS
    if rule != "Trust" or (place == "update" and "amsgrad" not in optimizer)
]


@pytest.mark.pairwise
@pytest.mark.parametrize(("rule", "place", "name"), MATRIX)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
def test_parts_equal_separate_parameters(rule: str, place: Any, name: str, kind: Any) -> None:
    fused, separate = networks(kind=kind)
    build, options = OPTIMIZERS[name]
    first, second = build(fused.parameters(), **options), build(separate.parameters(), **options)
    adapter = layerwise.LayerwiseLR(
        first, rule_for(rule, separate=False), fused, layers="parameter", apply=place, split=split_like(fused)
    )
    other = layerwise.LayerwiseLR(second, rule_for(rule, separate=True), separate, layers="parameter", apply=place)
    train(fused, first)
    train(separate, second)
    assert difference(fused, separate) <= 1e-12
    assert all(bool(p.abs().max() < 10) for p in fused.parameters())
    own, wanted = adapter.get_last_factors(), other.get_last_factors()
    for part in NAMES:
        for tensor in ("weight", "bias"):
            assert own[f"qkv.{tensor}[{part}]"] == pytest.approx(wanted[f"{part}.{tensor}"], rel=1e-12)
    assert len(set(own.values())) > 1


# These read depths, chains, blocks or the first matrix from names and order, in which the two networks differ.
BY_NAME = re.compile("LayerDecay|Unfreezing|BackMatching|FreezeOut|RandomTraining|HeavyTail$|chain_with_a_file")


@pytest.mark.full
@pytest.mark.parametrize("place", ["gradient", "update"])
@pytest.mark.parametrize("rule", [name for name in RULES if not BY_NAME.match(name)])
def test_every_rule_finds_the_factors_of_separate_parameters(rule: str, place: Any) -> None:
    kinds = ["qkv.weight[{}]", "qkv.bias[{}]"], ["{}.weight", "{}.bias"]
    found: list[list[list[float]]] = []
    for model, kind, split in zip(networks(), kinds, (split_like, lambda _: None), strict=True):
        names = [*(one.format(part) for one in kind for part in NAMES), "proj.weight", "proj.bias"]
        own = RULES[rule].make(names)
        if place not in own.places:
            return
        optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        adapter = layerwise.LayerwiseLR(
            optimizer,
            own,
            model,
            layers="parameter",
            apply=place,
            split=split(model),
        )
        found.append([])
        for step in range(8):
            train(model, optimizer, 1)
            found[-1].append(list(map(adapter.get_last_factors().__getitem__, names)))
            if step in (3, 5):
                adapter.end_epoch()
                adapter.load_state_dict(copy.deepcopy(adapter.state_dict()))
    for factors, wanted in zip(*found, strict=True):
        assert factors == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("place", ["gradient", "update"])
@pytest.mark.parametrize("capturing", [False, True])
def test_factors_on_a_device_act_on_parts(place: Any, capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if capturing:
        monkeypatch.setattr("layerwise.apply.has_capturable", lambda _: True)
    keep_on_device(monkeypatch)
    fused, separate = networks()
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "foreach": True}
    first, second = optim.SGD(fused.parameters(), **options), optim.SGD(separate.parameters(), **options)
    layerwise.LayerwiseLR(first, LayerAdaptive(), fused, layers="parameter", apply=place, split=split_like(fused))
    layerwise.LayerwiseLR(second, LayerAdaptive(), separate, layers="parameter", apply=place)
    train(fused, first)
    train(separate, second)
    assert difference(fused, separate) <= 1e-12
    assert all(bool(p.abs().max() < 10) for p in fused.parameters())


@pytest.mark.pairwise
@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer is not optim.SparseAdam], ids=str)
def test_every_optimizer_moves_each_part_by_its_factor(case: Case) -> None:
    """`w ← w_old + f (w_new − w_old)`, with w_new of a twin that has no adapter and the same weights at each step."""
    model, twin = network(case), network(case)
    optimizer, bare = case.make(model.parameters()), case.make(twin.parameters())
    split = {"first.weight": (2, 4), "second.weight": 2}
    factors = {"first.weight[0]": 0.3, "first.weight[1]": 1.7, "second.weight[1]": 0.0}
    layerwise.LayerwiseLR(optimizer, Constant(factors), model, layers="parameter", apply="update", split=split)
    for step in range(3):
        twin.load_state_dict(model.state_dict())
        old = model.first.weight.detach().clone(), model.second.weight.detach().clone()
        take_step(model, optimizer, step)
        take_step(twin, bare, step)
        halves = [[0.3] * 2 + [1.7] * 4, [1.0] * 2 + [0.0] * 2]
        by_row = [torch.tensor(rows, dtype=torch.float64)[:, None] for rows in halves]
        for name, f, before in zip(("first", "second"), by_row, old, strict=True):
            new = getattr(twin, name).weight.detach()
            wanted = before + f * (new - before)
            torch.testing.assert_close(getattr(model, name).weight.detach(), wanted, rtol=0, atol=1e-15)
        assert_same_bits(list(model.third.parameters()), list(twin.third.parameters()))


@pytest.mark.parametrize("place", ["gradient", "update"])
def test_sizes_of_grouped_queries(place: Any) -> None:
    fused, separate = networks((6, 2, 2))
    options = {"lr": 0.01, "momentum": 0.9}
    first, second = optim.SGD(fused.parameters(), **options), optim.SGD(separate.parameters(), **options)
    split = split_like(fused, (6, 2, 2))
    adapter = layerwise.LayerwiseLR(first, LayerAdaptive(), fused, layers="parameter", apply=place, split=split)
    layerwise.LayerwiseLR(second, LayerAdaptive(), separate, layers="parameter", apply=place)
    train(fused, first)
    train(separate, second)
    assert difference(fused, separate) <= 1e-12
    assert all(bool(p.abs().max() < 10) for p in fused.parameters())
    assert [tuple(layer.parameters[0].shape) for layer in adapter.layer_table()][:3] == [(6, 6), (2, 6), (2, 6)]


@pytest.mark.parametrize("place", ["gradient", "update"])
def test_closures(place: Any) -> None:
    fused, separate = networks()
    first, second = (optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (fused, separate))
    layerwise.LayerwiseLR(first, LayerAdaptive(), fused, layers="parameter", apply=place, split=split_like(fused))
    layerwise.LayerwiseLR(second, LayerAdaptive(), separate, layers="parameter", apply=place)
    train(fused, first, closure=True)
    train(separate, second, closure=True)
    assert difference(fused, separate) <= 1e-12
    assert all(bool(p.abs().max() < 10) for p in fused.parameters())


@pytest.mark.parametrize("place", ["gradient", "update"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factor_1_changes_no_bit(place: Any, name: str) -> None:
    (fused, _), (bare, _) = networks(), networks()
    build, options = OPTIMIZERS[name]
    first, second = build(fused.parameters(), **options), build(bare.parameters(), **options)
    # The bias has another factor, so that the weight's parts go through the place.
    rule = Constant({"qkv.weight*": 1.0, "proj.bias": 0.5})
    layerwise.LayerwiseLR(first, rule, fused, layers="parameter", apply=place, split={"qkv.weight": 3}, decay="plain")
    train(fused, first, 1)
    train(bare, second, 1)
    assert_same_bits([fused.qkv.weight, fused.proj.weight], [bare.qkv.weight, bare.proj.weight])
    assert not torch.equal(fused.proj.bias, bare.proj.bias) or (place == "gradient" and "SGD" not in name)


@pytest.mark.parametrize("place", ["gradient", "update"])
def test_a_state_goes_on_to_the_bit(place: Any) -> None:
    results: list[list[Tensor]] = []
    for resumes in (False, True):
        fused, _ = networks()
        optimizer = optim.SGD(fused.parameters(), lr=0.01, momentum=0.9)
        rule = layerwise.rules.refresh(LayerAdaptive(), every=4)
        adapter = layerwise.LayerwiseLR(optimizer, rule, fused, split=split_like(fused), apply=place)
        train(fused, optimizer, 3)
        if resumes:
            file = io.BytesIO()
            torch.save([fused.state_dict(), optimizer.state_dict(), adapter.state_dict()], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            fused, _ = networks()
            optimizer = optim.SGD(fused.parameters(), lr=0.01, momentum=0.9)
            rule = layerwise.rules.refresh(LayerAdaptive(), every=4)
            adapter = layerwise.LayerwiseLR(optimizer, rule, fused, split=split_like(fused), apply=place)
            for one, state in zip((fused, optimizer, adapter), saved, strict=True):
                one.load_state_dict(state)
        train(fused, optimizer, 3)
        results.append([p.detach() for p in fused.parameters()])
    assert_same_bits(*results)


def test_a_state_of_other_parts_is_refused() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.01)
    saved = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), fused, split={"qkv.weight": 3}).state_dict()
    other = layerwise.LayerwiseLR(optim.SGD(fused.parameters(), lr=0.01), LayerAdaptive(), fused)
    with pytest.raises(ValueError, match=re.escape("qkv.weight[0]")):
        other.load_state_dict(saved)


def test_names_of_layers_factors_and_records() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), fused, split={"qkv.weight": 3})
    monitor = layerwise.Monitor(optimizer, fused, every=1)
    names = ["qkv.weight[0]", "qkv.weight[1]", "qkv.weight[2]", "qkv", "proj"]
    before = [p.detach().clone() for p in fused.qkv.weight.split(6)]
    train(fused, optimizer, 1)
    assert adapter.layers == names
    assert list(adapter.get_last_factors()) == names
    assert fused.qkv.weight.grad is not None
    record = monitor.get_last_record()
    assert record is not None
    assert list(record.layers) == names
    assert list(record.factor) == list(adapter.get_last_factors().values())
    assert list(record.lr) == list(adapter.get_last_lr().values())
    for i, (old, new) in enumerate(zip(before, fused.qkv.weight.detach().split(6), strict=True)):
        assert record.weight_norm[i] == pytest.approx(float(old.norm()), rel=1e-12)
        assert record.update_norm[i] == pytest.approx(float((new - old).norm()), rel=1e-9)


def test_a_monitor_of_whole_parameters_has_no_factor_for_one_that_is_split() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.01)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), fused, layers="parameter", split={"qkv.weight": 3})
    monitor = layerwise.Monitor(optimizer, fused, every=1, layers="parameter")
    train(fused, optimizer, 1)
    record = monitor.get_last_record()
    assert record is not None
    assert record.factor[1:] == [2, 2, 2]
    assert record.factor[0] != record.factor[0]


def test_an_adapter_of_parts_alone() -> None:
    model = nn.Linear(4, 6, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = attach(model, optimizer=optimizer, split={"weight": 2})
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert list(adapter.get_last_factors()) == ["weight[0]", "weight[1]"]


def test_parts_are_views_and_keep_no_gradient() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), fused, split={"qkv.weight": 3})
    rows: Any = adapter.layer_table()[1].parameters[0]
    train(fused, optimizer, 1)
    assert rows.data_ptr() == fused.qkv.weight[6:].data_ptr()
    assert rows.grad.data_ptr() == fused.qkv.weight.grad[6:].data_ptr()
    optimizer.zero_grad()
    assert rows.grad is None


def test_auto_takes_the_update_in_place_of_the_rate() -> None:
    fused, separate = networks()
    first, second = (optim.AdamW(model.parameters(), lr=0.01) for model in (fused, separate))
    adapter = layerwise.LayerwiseLR(first, LayerAdaptive(), fused, layers="parameter", split=split_like(fused))
    other = layerwise.LayerwiseLR(second, LayerAdaptive(), separate, layers="parameter")
    assert (adapter.apply, other.apply) == ("update", "lr")
    train(fused, first)
    train(separate, second)
    assert difference(fused, separate) <= 1e-12
    sgd = optim.SGD(fused.parameters(), lr=0.01, momentum=0.9)
    assert layerwise.LayerwiseLR(sgd, LayerAdaptive(), fused, split={"qkv.*": 3}).apply == "gradient"


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_step() -> None:
    fused, separate = networks()
    first, second = (optim.SGD(model.parameters(), lr=0.01, foreach=True) for model in (fused, separate))
    split = split_like(fused)
    layerwise.LayerwiseLR(first, LayerAdaptive(), fused, layers="parameter", split=split, apply="update")
    layerwise.LayerwiseLR(second, LayerAdaptive(), separate, layers="parameter", apply="update")
    x = torch.randn(5, 6, dtype=torch.float64)
    step = torch.compile(first.step, backend="eager")
    for _ in range(3):
        for model in (fused, separate):
            model.zero_grad()
            model(x).square().sum().backward()
        step()
        second.step()
    assert difference(fused, separate) <= 1e-12


class OddSGD(optim.SGD):
    """Writes in ways that have no factor of their own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    p.t().sub_(group["lr"] * p.grad.t())  # other strides
                else:
                    p.data = p.data - group["lr"] * p.grad


def test_writes_in_other_forms() -> None:
    fused, separate = networks()
    first, second = (OddSGD(model.parameters(), lr=0.01) for model in (fused, separate))
    rules = [rule_for("Constant", separate=separate) for separate in (False, True)]
    adapter = layerwise.LayerwiseLR(first, rules[0], fused, layers="parameter", split=split_like(fused), apply="update")
    layerwise.LayerwiseLR(second, rules[1], separate, layers="parameter", apply="update")
    train(fused, first)
    train(separate, second)
    assert difference(fused, separate) <= 1e-12
    rows = next(layer.parameters[0] for layer in adapter.layer_table() if layer.name == "qkv.bias[k]")
    assert rows.data_ptr() == fused.qkv.bias[6:].data_ptr()


@pytest.mark.parametrize("splits_first", [False, True])
@pytest.mark.parametrize("place", ["gradient", "update"])
def test_factors_of_two_adapters_multiply(splits_first: bool, place: Any) -> None:
    results: list[list[Tensor]] = []
    for single in (False, True):
        fused, _ = networks()
        optimizer = optim.SGD(fused.parameters(), lr=0.01)
        parts = {f"qkv.weight[{i}]": float(i + 1) for i in range(3)}
        if single:
            rule = Constant({name: 2 * factor for name, factor in parts.items()})
            layerwise.LayerwiseLR(optimizer, rule, fused, split={"qkv.weight": 3}, apply=place, layers="parameter")
        else:
            for splits in (splits_first, not splits_first):
                rule = Constant(parts if splits else {"qkv.weight": 2.0})
                split = {"qkv.weight": 3} if splits else None
                layerwise.LayerwiseLR(optimizer, rule, fused, split=split, apply=place, layers="parameter")
        train(fused, optimizer, 1)
        results.append([p.detach() for p in fused.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["gradient", "update"])
def test_half_precision_equals_separate_parameters(dtype: torch.dtype, place: Any) -> None:
    weight = torch.randn(6, 4).to(dtype)
    gradient = torch.randn(6, 4).to(dtype)
    whole = nn.ParameterDict({"a": nn.Parameter(weight.clone())})
    parts = nn.ParameterDict({"a[0]": nn.Parameter(weight[:2].clone()), "a[1]": nn.Parameter(weight[2:].clone())})
    for model in (whole, parts):
        optimizer = optim.SGD(model.parameters(), lr=0.1, foreach=True)
        split = {"a": (2, 4)} if model is whole else None
        rule = Constant({"a[0]": 0.3, "a[1]": 1.7})
        layerwise.LayerwiseLR(optimizer, rule, model, layers="parameter", apply=place, split=split)
        for p, own in zip(model.values(), [gradient] if model is whole else [gradient[:2], gradient[2:]], strict=True):
            p.grad = own.clone()
        optimizer.step()
    assert torch.equal(whole["a"], torch.cat(list(parts.values())))


def test_memory_that_a_parameter_has_later() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), fused, split={"qkv.weight": 3}, apply="update")
    fused.qkv.weight.data = fused.qkv.weight.data.clone() * 2
    train(fused, optimizer, 1)
    assert all(
        torch.equal(layer.parameters[0], part)
        for layer, part in zip(adapter.layer_table(), fused.qkv.weight.detach().split(6), strict=False)
    )


def test_frozen_and_missing_gradients() -> None:
    fused, _ = networks()
    fused.qkv.weight.requires_grad_(False)
    optimizer = optim.SGD(fused.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), fused, split={"qkv.weight": 3})
    before = fused.qkv.weight.clone()
    train(fused, optimizer, 1)
    assert torch.equal(fused.qkv.weight, before)
    assert [adapter.get_last_factors()[f"qkv.weight[{i}]"] for i in range(3)] == [1, 1, 1]
    assert not adapter.layer_table()[0].parameters[0].requires_grad


def test_non_finite_gradients_name_the_part() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.01)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), fused, split={"qkv.weight": NAMES}, on_nonfinite="raise")
    fused(torch.ones(5, 6, dtype=torch.float64)).sum().backward()
    assert fused.qkv.weight.grad is not None
    fused.qkv.weight.grad[7, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=re.escape("'qkv.weight[k]'")):
        optimizer.step()


def test_roles_of_parts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
            self.mlp = nn.ModuleDict({"gate_up_proj": nn.Linear(4, 8)})

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    split = {"blocks.0.attn.qkv.*": NAMES, "blocks.1.attn.qkv.weight": 3, "*.gate_up_proj.weight": ("gate", "up")}
    adapter = layerwise.LayerwiseLR(optimizer, layerwise.rules.ByRole({"qk": 2.0, "bias": 5.0}), model, split=split)
    roles, factors = adapter.roles, adapter.get_last_factors()
    for kind in ("weight", "bias"):
        assert [roles[f"blocks.0.attn.qkv.{kind}[{name}]"] for name in NAMES] == ["qk", "qk", "vo"]
    assert [roles[f"blocks.1.attn.qkv.weight[{i}]"] for i in range(3)] == ["qkv"] * 3
    assert roles["blocks.1.mlp.gate_up_proj.weight[up]"] == roles["blocks.1.mlp.gate_up_proj.bias"] == "ffn"
    assert roles["blocks.1.attn.proj.weight"] == "vo"
    model["blocks"][0].attn["qkv"].weight.grad = torch.ones(12, 4)
    optimizer.step()
    factors = adapter.get_last_factors()
    assert [factors[f"blocks.0.attn.qkv.weight[{name}]"] for name in NAMES] == [2, 2, 1]
    assert [factors[f"blocks.0.attn.qkv.bias[{name}]"] for name in NAMES] == [5, 5, 5]


@pytest.mark.filterwarnings("ignore:LayerDecay takes the depths:UserWarning")
def test_depths_of_parts() -> None:
    attention = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), Attention((4, 4, 4))) for _ in range(3)])
    for model in (
        nn.ModuleDict({"embed": nn.Embedding(4, 4), "blocks": attention, "head": nn.Linear(4, 2)}),
        nn.Sequential(nn.Embedding(4, 4), *(nn.Linear(4, 12) for _ in range(3))),
        nn.ModuleDict({"embed": nn.Embedding(4, 4), "fc1": nn.Linear(4, 12), "fc2": nn.Linear(4, 12)}),
    ):
        factors: list[dict[str, float]] = []
        for split in (None, {"*1.qkv.*" if "blocks" in dict(model.named_children()) else "*1.weight": 3}):
            optimizer = optim.SGD(model.parameters(), lr=0.1)
            adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.5), model, layers="parameter", split=split)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            factors.append(adapter.get_last_factors())
            adapter.detach()
        whole, parts = factors
        assert {name.partition("[")[0]: factor for name, factor in parts.items()} == whole


def test_patterns_name_parts_as_they_are_written() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.1)
    split = split_like(fused)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), fused, split=split, exclude=["*.weight[q]"], apply="update")
    train(fused, optimizer, 1)
    factors = adapter.get_last_factors()
    assert factors["qkv.weight[q]"] == 1 != factors["qkv.weight[k]"]
    adapter.detach()
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), fused, split=split, apply="update")
    train(fused, optimizer, 1)
    factors = adapter.get_last_factors()  # without an argument LARS leaves out vectors
    assert factors["qkv.bias[q]"] == 1 != factors["qkv.weight[q]"]


def test_diagnose_says_why_and_where() -> None:
    fused, _ = networks()
    optimizer = optim.AdamW(fused.parameters())
    text = layerwise.diagnose(optimizer, fused, split={"qkv.weight": 3})
    assert "qkv.weight[0]" in text
    assert "4 parameter tensors" in text
    assert "acts on   'update'" in text
    assert "a parameter that is split has one rate" in text
    text = layerwise.diagnose(optim.SGD(fused.parameters(), lr=0.1, momentum=0.9), fused, split={"qkv.weight": 3})
    assert "the gradients are multiplied in place" in text


# --- What is refused --------------------------------------------------------------------------------------------------


def attach(model: nn.Module, rule: Any = None, optimizer: Any = None, **arguments: Any) -> layerwise.LayerwiseLR:
    held = optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if optimizer is None else optimizer
    return layerwise.LayerwiseLR(held, LayerAdaptive() if rule is None else rule, model, **arguments)


@pytest.mark.parametrize(
    ("split", "error", "words", "remedy"),
    [
        (3, TypeError, "must be a mapping", {"qkv.weight": 3}),
        ({}, ValueError, "pass None, or", None),
        ({"qkv.weigth": 3}, ValueError, "Did you mean 'qkv.weight'", {"qkv.weight": 3}),
        ({4: 3}, TypeError, "must be a string", {"qkv.weight": 3}),
        ({"qkv.weight": 1}, ValueError, "from 2", {"qkv.weight": 2}),
        ({"qkv.weight": True}, TypeError, "from 2", {"qkv.weight": 2}),
        ({"qkv.weight": 2.0}, TypeError, "from 2", {"qkv.weight": 2}),
        ({"qkv.weight": "qkv"}, TypeError, "two or more names", {"qkv.weight": tuple("qkv")}),
        ({"qkv.weight": ("q", 6)}, TypeError, "two or more names", {"qkv.weight": (6, 12)}),
        ({"qkv.weight": (18,)}, ValueError, "two or more sizes", {"qkv.weight": (9, 9)}),
        ({"qkv.weight": ()}, ValueError, "two or more sizes", {"qkv.weight": (9, 9)}),
        ({"qkv.weight": (0, 18)}, ValueError, "sizes from 1", {"qkv.weight": (1, 17)}),
        ({"qkv.weight": ("q", "q")}, ValueError, "different names", {"qkv.weight": ("q", "k")}),
        ({"qkv.weight": ("q.a", "k")}, ValueError, "different names of letters", {"qkv.weight": ("q_a", "k")}),
        ({"qkv.weight": 4}, ValueError, "18 rows of 'qkv.weight'", {"qkv.weight": 3}),
        ({"qkv.weight": (6, 6)}, ValueError, "add up to 18", {"qkv.weight": (6, 12)}),
        ({"qkv.*": 3, "*.weight": 3}, ValueError, "all match 'qkv.weight'", {"qkv.*": 3}),
        ({"proj.bias": 2}, ValueError, "1 rows", {"qkv.bias": 2}),
    ],
)
def test_wrong_arguments(split: Any, error: type[Exception], words: str, remedy: Any) -> None:
    fused, _ = networks()
    with pytest.raises(error, match=re.escape(words)):
        attach(fused, split=split)
    attach(fused, split=remedy)


def test_the_rate_is_refused() -> None:
    fused, _ = networks()
    with pytest.raises(ValueError, match="use apply='gradient' or apply='update', or leave split out"):
        attach(fused, split={"qkv.weight": 3}, apply="lr")
    optimizer = optim.SGD(fused.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="use apply='gradient', or leave split out"):
        attach(fused, NormalizedGradient(), optimizer, split={"qkv.weight": 3})
    assert attach(fused, NormalizedGradient(), optimizer, split={"qkv.weight": 3}, apply="gradient").apply == "gradient"
    for place in ("gradient", "update"):
        assert attach(fused, split={"qkv.weight": 3}, apply=place).apply == place

    class OnTheRate(Constant):
        places = ("lr",)

    with pytest.raises(ValueError, match="use another rule, or leave split out"):
        attach(fused, OnTheRate({"*": 2.0}), split={"qkv.weight": 3})
    attach(fused, OnTheRate({"*": 2.0}))


def test_tensors_without_rows_are_refused() -> None:
    scalar = nn.ParameterDict({"a": nn.Parameter(torch.ones(())), "b": nn.Parameter(torch.ones(4))})
    with pytest.raises(ValueError, match="leave it out of split"):
        attach(scalar, split={"a": 2})
    attach(scalar, split={"b": 2})
    grouped = nn.ConvTranspose1d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="2 groups"):
        attach(grouped, split={"weight": 2})
    whole = nn.ConvTranspose1d(4, 6, 3)
    assert attach(whole, split={"weight": 2}).layer_table()[0].parameters[0].shape == (4, 3, 3)


def test_sparse_gradients_are_refused_before_the_step() -> None:
    for sparse in (True, False):
        model = nn.Embedding(6, 2, sparse=sparse)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        attach(model, optimizer=optimizer, split={"weight": 2}, apply="update")
        model(torch.tensor([1])).sum().backward()
        before = model.weight.detach().clone()
        if sparse:
            with pytest.raises(ValueError, match="sparse=False"):
                optimizer.step()
            assert torch.equal(model.weight, before)
        else:
            optimizer.step()


def test_a_rule_of_a_chain_of_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="use another rule, or leave split out"):
        attach(model, BackMatching(), split={"0.weight": 2})
    attach(model, LayerAdaptive(), split={"0.weight": 2}).detach()
    attach(model, BackMatching())


def test_a_second_adapter_with_parts_is_refused() -> None:
    fused, _ = networks()
    optimizer = optim.SGD(fused.parameters(), lr=0.1)
    first = attach(fused, optimizer=optimizer, split={"qkv.weight": 3})
    with pytest.raises(ValueError, match=re.escape("attach chain(…) of both, or detach() one")):
        attach(fused, optimizer=optimizer, split={"qkv.weight": 3})
    first.detach()
    rule = layerwise.rules.chain(LayerAdaptive(), Constant({"qkv.weight[0]": 2.0}))
    attach(fused, rule, optimizer, split={"qkv.weight": 3})
