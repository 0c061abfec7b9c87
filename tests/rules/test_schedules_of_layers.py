"""Rules that follow a schedule: FreezeOut, and random blocks that train in turn."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import reference
from layerwise import LayerwiseLR
from layerwise.layers import Layer
from layerwise.rules import FreezeOut, RandomTraining
from layerwise.statistics import Statistics

CPU = torch.device("cpu")
NAMES = ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]


def layers(names: list[str] = NAMES) -> list[Layer]:
    return [Layer(name, (torch.zeros(1),)) for name in names]


def network(blocks: int = 6) -> nn.Module:
    body = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(blocks))
    return nn.ModuleDict({"embed": nn.Linear(2, 2), "blocks": body, "head": nn.Linear(2, 1)})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Take a step with gradients of 1; return how far each parameter's first entry went."""
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [float((old - p.detach()).abs().max()) for p, old in zip(model.parameters(), before, strict=True)]


# --- FreezeOut --------------------------------------------------------------------------------------------------------


def test_freeze_out_at_the_first_step_and_in_the_middle() -> None:
    rule = FreezeOut(1000)
    state = rule.init(layers(), CPU)
    first, _ = rule.factors(Statistics(), state)
    assert [round(f, 6) for f in first.tolist()] == [1.953125, 1.628333, 1.371742, 1.166351, 1]
    middle, _ = rule.factors(Statistics(), {**state, "step": 500})
    assert [round(f, 6) for f in middle.tolist()] == [0.002646, 0.134853, 0.307745, 0.432518, 0.5]
    ends = [line.split()[0] for line in rule.table(layers())[1:]]
    assert ends == ["512", "614.125", "729", "857.375", "1000"]


@pytest.mark.parametrize(("scaling", "power"), [("linear", 1), ("squared", 2), ("cubic", 3)])
@pytest.mark.parametrize("rescale", [True, False])
def test_freeze_out_over_a_training(scaling: Any, power: int, rescale: bool) -> None:
    rule = FreezeOut(40, 0.5, scaling, rescale)
    state = rule.init(layers(), CPU)
    for at in range(45):
        expected = [reference.freeze_out(at, 40, i / 4, 0.5, power, rescale=rescale) for i in range(5)]
        factors, state = rule.factors(Statistics(), state)
        assert factors.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert set(factors.tolist()) == {0.0}


def test_on_a_cosine_the_rate_is_that_of_the_method() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adapter = LayerwiseLR(optimizer, FreezeOut(20, base="cosine"), model)
    for at in range(20):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * at / 20))
        step(model, optimizer)
        rates = adapter.get_last_lr()
        assert rates["embed"] == pytest.approx(reference.freeze_out(at, 20, 0), rel=1e-12)
        assert rates["head"] == pytest.approx(reference.freeze_out(at, 20, 1), rel=1e-12)


def test_freeze_out_with_depths_of_ones_own() -> None:
    rule = FreezeOut(100, depth={"a": 1, "b": 0}.__getitem__)
    factors = rule.factors(Statistics(), rule.init(layers(["a", "b"]), CPU))[0]
    assert factors.tolist() == pytest.approx([1, 1.953125], rel=1e-15)
    alone = FreezeOut(100, depth=lambda name: 0)
    assert alone.factors(Statistics(), alone.init(layers(["a"]), CPU))[0].tolist() == [1]
    with pytest.raises(ValueError, match=r"depth\('a'\) returned -1"):
        FreezeOut(100, depth=lambda name: -1).init(layers(["a"]), CPU)


def test_names_that_leave_the_depths_in_doubt_are_said() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"FreezeOut takes the depths from the layers' names(?s:.*)last step"):
        LayerwiseLR(optimizer, FreezeOut(100), model).detach()
    LayerwiseLR(optimizer, FreezeOut(100, depth=lambda name: int(name[0])), model)
    with pytest.raises(TypeError, match="must be a function"):
        FreezeOut(100, depth=3)


# --- Random blocks ----------------------------------------------------------------------------------------------------


def test_blocks_train_in_turn_and_the_ends_always() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adapter = LayerwiseLR(optimizer, RandomTraining(2, every=3), model)
    drawn = []
    for _ in range(60):
        moved = step(model, optimizer)
        factors = adapter.get_last_factors()
        assert round(moved[0]) == round(moved[-1]) == factors["embed"] == factors["head"] == 1
        of_block = [{factors[f"blocks.{b}.{part}"] for part in "ab"} for b in range(6)]
        assert all(len(one) == 1 for one in of_block)
        drawn.append([b for b, one in enumerate(of_block) if one == {1.0}])
        assert list(map(round, moved[2:-2:4])) == [int(b in drawn[-1]) for b in range(6)]
    assert all(len(one) == 2 for one in drawn)
    assert all(drawn[i] == drawn[i - i % 3] for i in range(60))
    assert {b for one in drawn for b in one} == set(range(6))


def test_the_stream_is_its_own_and_continues_from_a_checkpoint() -> None:
    def run(rule: RandomTraining, steps: int, saved: Any = None) -> tuple[list[Any], Any]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        adapter = LayerwiseLR(optimizer, rule, model)
        if saved is not None:
            adapter.load_state_dict(saved)
        seen = []
        for _ in range(steps):
            step(model, optimizer)
            seen.append(adapter.get_last_factors())
        buffer = io.BytesIO()
        torch.save(adapter.state_dict(), buffer)
        buffer.seek(0)
        return seen, torch.load(buffer, weights_only=True)

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    whole, _ = run(RandomTraining(2, every=2, seed=5), 0)
    torch.random.set_rng_state(before)
    whole, _ = run(RandomTraining(2, every=2, seed=5), 20)
    first, saved = run(RandomTraining(2, every=2, seed=5), 7)
    rest, _ = run(RandomTraining(2, every=2, seed=5), 13, saved)
    assert first + rest == whole
    other, _ = run(RandomTraining(2, every=2, seed=6), 20)
    assert other != whole
    rule, state = RandomTraining(), RandomTraining().init(layers(), CPU)
    before = torch.random.get_rng_state()
    rule.factors(Statistics(), state)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_block_of_excluded_layers_is_not_drawn() -> None:
    some = [replace(layer, included=layer.name not in ("blocks.1", "head")) for layer in layers()]
    rule = RandomTraining(1, every=1)
    state, drawn = rule.init(some, CPU), torch.zeros(5)
    for _ in range(40):
        factors, state = rule.factors(Statistics(), state)
        assert factors[1] + factors[3] == 1
        drawn += factors
    assert drawn[1] > 0 < drawn[3]


def test_draws_are_uniform() -> None:
    rule, counts = RandomTraining(1, every=1), torch.zeros(5)
    state = rule.init(layers(), CPU)
    for _ in range(3000):
        factors, state = rule.factors(Statistics(), state)
        counts += factors
    assert counts[0] == counts[4] == 3000
    assert counts[1:4].sum() == 3000
    assert float((counts[1:4] - 1000).abs().max()) < 100  # four standard deviations


def test_between_draws_the_factors_are_the_same_tensor() -> None:
    rule = RandomTraining(1, every=2)
    state = rule.init(layers(), CPU)
    first, state = rule.factors(Statistics(), state)
    second, state = rule.factors(Statistics(), state)
    assert second is first
    assert rule.factors(Statistics(), state)[0] is not first


def test_blocks_of_ones_own() -> None:
    rule = RandomTraining(1, block=lambda name: None if name == "head" else name[:5])
    lines = rule.table(layers())
    assert [line.split()[0] for line in lines] == ["block", "embed", "block", "(always)"]
    assert RandomTraining().table(layers(["h.0.a", "h.1.a", "x"]))[1].split() == ["h.0", "h.0.a"]
    with pytest.raises(TypeError, match="must be the name of a block"):
        RandomTraining(block=len).init(layers(), CPU)
    with pytest.raises(ValueError, match="pass block="):
        RandomTraining().init(layers(["a", "b"]), CPU)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FreezeOut(0),
        lambda: FreezeOut(10, 0),
        lambda: FreezeOut(10, 1.5),
        lambda: FreezeOut(10, scaling="quartic"),
        lambda: FreezeOut(10, base="linear"),
        lambda: RandomTraining(0),
        lambda: RandomTraining(every=0),
        lambda: RandomTraining(seed=-1),
    ],
)
def test_arguments_out_of_their_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|unknown"):
        make()
