"""After an optimizer was made anew, or a model's parameters were, the old adapter says so and tells no old values."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise.rules import GradientAmplification, LayerAdaptive, RandomLayers


class Net:
    """Makes module and optimizer anew at each fit, as skorch does."""

    def __init__(self, attach: Any) -> None:
        self.attach = attach

    def initialize(self) -> None:
        self.module_ = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.optimizer_ = optim.SGD(self.module_.parameters(), lr=0.1, momentum=0.9)

    def fit(self, on_train_begin: Any = lambda net: None) -> None:
        self.initialize()
        on_train_begin(self)
        for _ in range(2):
            self.optimizer_.zero_grad()
            self.module_(torch.ones(1, 3)).square().sum().backward()
            self.optimizer_.step()


def adapter_of(net: Net, rule: Any = None) -> Any:
    return layerwise.LayerwiseLR(net.optimizer_, rule or LayerAdaptive(), net.module_)


READINGS = {
    "get_last_factors": lambda adapter: adapter.get_last_factors(),
    "get_last_lr": lambda adapter: adapter.get_last_lr(),
    "get_last_selection": lambda adapter: adapter.get_last_selection(),
    "end_epoch": lambda adapter: adapter.end_epoch(),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_the_adapter_of_an_optimizer_that_is_gone_raises_with_the_remedy(read: Any) -> None:
    rule = GradientAmplification(RandomLayers(1, seed=0))
    net = Net(None)
    kept: list[Any] = []
    net.fit(lambda net: kept.append(adapter_of(net, rule)))
    read(kept[0])
    net.fit()
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists; attach to the one in use, after each time"):
        read(kept[0])
    assert "on an optimizer that no longer exists" in repr(kept[0])
    # The remedy: attach at the beginning of each fit, and carry the state over.
    state = kept[0].state_dict()
    net.fit(lambda net: kept.append(adapter_of(net, rule)))
    kept[1].load_state_dict(state)
    read(kept[1])


def test_a_monitor_and_a_handle_of_an_optimizer_that_is_gone_raise() -> None:
    net = Net(None)
    kept: list[Any] = []
    net.fit(lambda net: kept.append(layerwise.Monitor(net.optimizer_, net.module_, every=1)))
    assert kept[0].get_last_record().step == 2
    net.fit(lambda net: kept.append(layerwise.step_in_backward(net.optimizer_, net.module_, LayerAdaptive())))
    assert kept[1].get_last_factors()["0"] != 1
    net.fit()
    gc.collect()
    with pytest.raises(RuntimeError, match="optimizer of this Monitor no longer exists"):
        kept[0].get_last_record()
    for read in (kept[1].get_last_factors, kept[1].get_last_lr, kept[1].end_epoch):
        with pytest.raises(RuntimeError, match="no longer exists; call step_in_backward with the one in use"):
            read()
    for one in kept:
        assert "an optimizer that no longer exists" in repr(one)
    assert kept[0].state_dict() == {"version": 1, "steps": 2}


@pytest.mark.parametrize("kind", ["adapter", "monitor", "handle"])
def test_detached_in_time_they_keep_their_last_values(kind: str) -> None:
    net = Net(None)
    kept: list[Any] = []
    make = {
        "adapter": adapter_of,
        "monitor": lambda net: layerwise.Monitor(net.optimizer_, net.module_, every=1),
        "handle": lambda net: layerwise.step_in_backward(net.optimizer_, net.module_, LayerAdaptive()),
    }[kind]
    net.fit(lambda net: kept.append(make(net)))
    read = kept[0].get_last_record if kind == "monitor" else kept[0].get_last_factors
    last = read()
    kept[0].detach()
    net.fit()
    gc.collect()
    assert read() == last
    assert "detached" in repr(kept[0])


def test_a_model_whose_parameters_are_others_now_is_said() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model[1] = nn.Linear(4, 2)  # a part of it may change: a head for another task
    assert set(adapter.get_last_factors()) == {"0", "1"}
    model[0] = nn.Linear(3, 4)
    with pytest.raises(RuntimeError, match=r"other parameters now than the optimizer .* make an optimizer"):
        adapter.get_last_factors()
    other = optim.SGD(model.parameters(), lr=0.1)
    anew = layerwise.LayerwiseLR(other, LayerAdaptive(), model)  # the remedy
    model(torch.ones(1, 3)).sum().backward()
    other.step()
    assert anew.get_last_factors()["1"] != 1
