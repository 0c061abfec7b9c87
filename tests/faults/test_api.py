"""Any sequence of calls on any small network: a state machine beside the explicit model of `shadow.py`."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from exact import same_bits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from shadow import CHOOSING, KINDS, SPECIFICATIONS, Attached, Shadow, automatic
from small import NETWORKS, OPTIMIZERS, Small
from torch import Tensor, nn, optim

import layerwise

pytestmark = pytest.mark.full

taken = 0
"""Steps of machines since the program began."""


def close(actual: Any, expected: Any, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9, msg=lambda text: f"{what}: {text}")


class Sequences(RuleBasedStateMachine):
    """Calls in any order; after each, everything that a person can see is as the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.adapters: list[tuple[Any, Attached]] = []
        self.scheduler: Any = None
        self.foreign: Any = None

    @initialize(network=st.sampled_from(NETWORKS), kind=st.sampled_from(sorted(OPTIMIZERS)), groups=st.booleans())
    def build(self, network: str, kind: str, groups: bool) -> None:
        torch.manual_seed(5)
        self.model = Small(network)
        make, options, form = OPTIMIZERS[kind]
        names = [n for n, p in self.model.named_parameters() if not n.startswith("later")]
        parts = [names[:1], names[1:]] if groups else [names]
        named = dict(self.model.named_parameters())
        self.shadow = Shadow(copy.deepcopy(self.model), make)
        self.groups = [{**options, "lr": options["lr"] * (i + 1)} for i in range(len(parts))]
        self.optimizer = make(
            [{"params": [named[n] for n in part], **g} for part, g in zip(parts, self.groups, strict=True)], **form
        )
        self.shadow.add(parts, self.groups)
        self.options, self.form, self.kind, self.parts = options, form, kind, parts
        self.type, self.own = type(self.optimizer), set(vars(self.optimizer))

    # --- Calls --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.adapters) < 3)
    @rule(
        kind=st.sampled_from(sorted(KINDS)),
        layers=st.sampled_from(sorted(SPECIFICATIONS)),
        apply=st.sampled_from(["auto", "auto", "gradient", "lr", "update"]),
    )
    def attach(self, kind: str, layers: str, apply: str) -> None:
        adapter = layerwise.LayerwiseLR(
            self.optimizer, KINDS[kind].make(), self.model, layers=SPECIFICATIONS[layers], apply=apply
        )
        known = Attached(kind, layers, automatic(kind, self.optimizer) if apply == "auto" else apply)
        known.resolve(self.shadow.held())
        assert adapter.apply == known.place
        assert adapter.layers == list(known.layers)
        self.adapters.append((adapter, known))

    @rule()
    def backward(self) -> None:
        self.step += 1
        for model in (self.model, self.shadow.model):
            model.loss(self.step).backward()

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)
        self.shadow.optimizer.zero_grad(set_to_none=to_none)

    @rule(largest=st.sampled_from([0.01, 0.5]))
    def clip(self, largest: float) -> None:
        for model in (self.model, self.shadow.model):
            nn.utils.clip_grad_norm_(model.parameters(), largest)

    @rule()
    def take_step(self) -> None:
        self.arrived = self._gradients()
        self.optimizer.step()
        self.shadow.step([known for _, known in self.adapters])
        self._compare_step([known for _, known in self.adapters])

    @rule()
    def take_step_with_closure(self) -> None:
        self.step += 1

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.model.loss(self.step)
            loss.backward()
            self.arrived = self._gradients()
            return loss

        loss = self.optimizer.step(closure)
        self.shadow.optimizer.zero_grad()
        expected = self.shadow.model.loss(self.step)
        expected.backward()
        self.shadow.step([known for _, known in self.adapters])
        close(loss.detach(), expected.detach(), "loss")
        self._compare_step([known for _, known in self.adapters])

    @rule()
    def fail_in_closure(self) -> None:
        def closure() -> Tensor:
            raise OverflowError("as a loss may")

        with pytest.raises(OverflowError):
            self.optimizer.step(closure)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def take_step_paused(self, data: st.DataObject) -> None:
        pausing = data.draw(st.integers(0, len(self.adapters) - 1))
        others = [known for i, (_, known) in enumerate(self.adapters) if i != pausing]
        self.arrived = self._gradients()
        with self.adapters[pausing][0].paused():
            self.optimizer.step()
        self.shadow.step(others)
        self._compare_step(others)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def end_epoch(self, data: st.DataObject) -> None:
        adapter, known = data.draw(st.sampled_from(self.adapters))
        adapter.end_epoch()
        there = {}
        if known.kind in CHOOSING:
            there = {n: one.selected for n, one in adapter.get_last_selection().items()}
        known.end_epoch(self.shadow.held(), there)
        if known.kind in CHOOSING:
            assert there == {layer: known.selected.get(layer, False) for layer in known.layers}
            for layer, one in adapter.get_last_selection().items():
                value, z = known.measured.get(layer, (math.nan, math.nan))
                assert one.value == pytest.approx(value, rel=1e-6, abs=1e-7, nan_ok=True)
                assert one.z == pytest.approx(z, rel=1e-4, abs=1e-5, nan_ok=True)
        assert adapter.epoch == known.epoch

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        adapter, _ = data.draw(st.sampled_from(self.adapters))
        before, file = adapter.state_dict(), io.BytesIO()
        torch.save(before, file)
        file.seek(0)
        adapter.load_state_dict(torch.load(file, weights_only=True))
        same_bits(adapter.state_dict(), before)

    @rule()
    def save_and_load_optimizer(self) -> None:
        before, file = self.optimizer.state_dict(), io.BytesIO()
        torch.save(before, file)
        file.seek(0)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        same_bits(self.optimizer.state_dict(), before)

    @precondition(lambda self: self.kind != "Adagrad")  # torch's cannot step parameters that were added later
    @precondition(lambda self: "later.weight" not in self.shadow.names)
    @rule()
    def add_param_group(self) -> None:
        group = {**self.options, "lr": 0.03}
        self.optimizer.add_param_group({"params": list(self.model.later.parameters()), **group})
        names = ["later.weight", "later.bias"]
        self.shadow.add([names], [group])
        self.groups.append(group)
        self.parts = [*self.parts, names]

    @precondition(lambda self: self.scheduler is None)
    @rule()
    def schedule(self) -> None:
        self.scheduler = optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.optimizer._opt_called = False
        self.own = set(vars(self.optimizer))
        self.groups = [{"initial_lr": group["lr"], **group} for group in self.groups]

    @precondition(lambda self: self.scheduler is not None and self.optimizer._opt_called)
    @rule()
    def take_scheduler_step(self) -> None:
        self.scheduler.step()
        for group in (*self.groups, *self.shadow.optimizer.param_groups):
            group["lr"] *= 0.9

    @rule(trained=st.booleans(), first=st.booleans())
    def freeze(self, trained: bool, first: bool) -> None:
        for model in (self.model, self.shadow.model):
            (model.first if first else model.between).requires_grad_(trained)

    @rule()
    def hook_of_somebody_else(self) -> None:
        if self.foreign is None:
            self.foreign = self.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: None)
        else:
            self.foreign.remove()
            self.foreign = None

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        adapter, known = data.draw(st.sampled_from(self.adapters))
        adapter.detach()
        self.adapters.remove((adapter, known))
        if not self.adapters:
            assert len(self.optimizer._optimizer_step_pre_hooks) == (self.foreign is not None)
            assert not self.optimizer._optimizer_step_post_hooks
            self._step_as_the_bare_one()

    @precondition(lambda self: all(list(a.layer_table()) and self._current(a) for a, _ in self.adapters))
    @rule()
    def go_on_with_a_copy(self) -> None:
        gradients = self._gradients()
        states = [adapter.state_dict() for adapter, _ in self.adapters]
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        self.scheduler = self.foreign = None
        self.own = set(vars(self.optimizer))
        for name, p in self.model.named_parameters():
            p.grad = gradients.get(name)
        for i, (state, (old, known)) in enumerate(zip(states, self.adapters, strict=True)):
            adapter = layerwise.LayerwiseLR(
                self.optimizer, old.rule, self.model, layers=SPECIFICATIONS[known.specification], apply=known.place
            )
            adapter.load_state_dict(state)
            same_bits(adapter.state_dict(), state)
            self.adapters[i] = (adapter, known)

    # --- What must be true --------------------------------------------------------------------------------------------

    @invariant()
    def nothing_shows_outside_a_step(self) -> None:
        global taken
        taken += 1
        assert type(self.optimizer) is self.type
        assert set(vars(self.optimizer)) == self.own
        named = dict(self.model.named_parameters())
        assert len(self.optimizer.param_groups) == len(self.groups)
        for group, expected, names in zip(self.optimizer.param_groups, self.groups, self.parts, strict=True):
            assert all(p is named[name] for p, name in zip(group["params"], names, strict=True))
            assert {name: group[name] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert set(self.optimizer.state) <= set(named.values())

    @invariant()
    def weights_and_states_are_those_of_the_model(self) -> None:
        shadows = dict(self.shadow.model.named_parameters())
        for name, p in self.model.named_parameters():
            close(p.detach(), shadows[name].detach(), name)
            state, expected = self.optimizer.state.get(p, {}), self.shadow.optimizer.state.get(shadows[name], {})
            assert {k for k, v in state.items() if v is not None} == {k for k, v in expected.items() if v is not None}
            for key, value in expected.items():
                if isinstance(value, Tensor):
                    close(torch.as_tensor(state[key], dtype=value.dtype), value, f"{name} {key}")

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def _current(self, adapter: Any) -> bool:
        """Tell whether an adapter has taken a step since parameters were added."""
        return adapter._attached.found.holds(self.optimizer.param_groups, adapter._attached._request)

    def _compare_step(self, stepped: list[Attached]) -> None:
        rates = {name: group["lr"] for name, group in self.shadow.group_of().items()}
        for adapter, known in self.adapters:
            if known in stepped:
                assert adapter.layers == list(known.layers)
                assert adapter.get_last_factors() == pytest.approx(known.factors, rel=1e-7)
                expected = {n: rates[known.layers[n][0]] * f for n, f in known.factors.items()}
                assert adapter.get_last_lr() == pytest.approx(expected, rel=1e-7)
        # "gradient" may leave a gradient scaled, or reach the same numbers without touching it.
        shadows = dict(self.shadow.model.named_parameters())
        for name, p in self.model.named_parameters():
            if p.grad is None:
                assert shadows[name].grad is None
            elif any(known.place == "gradient" for known in stepped):
                self._one_of_the_products(name, p.grad, stepped)
                shadows[name].grad = p.grad.clone()
            else:
                close(p.grad, self.arrived[name], f"gradient of {name}")

    def _one_of_the_products(self, name: str, gradient: Tensor, stepped: list[Attached]) -> None:
        products = {1.0}
        for known in stepped:
            if known.place == "gradient":
                factor = next((known.factors[n] for n, members in known.layers.items() if name in members), 1.0)
                products |= {product * factor for product in products}
        assert any(torch.allclose(gradient, self.arrived[name] * x, rtol=1e-7, atol=1e-9) for x in products), name

    def _step_as_the_bare_one(self) -> None:
        """Take a step without adapters, to the bit that of a copy that has no hooks."""
        gradients = self._gradients()
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        for name, p in model.named_parameters():
            p.grad = gradients.get(name)
        self.take_step()
        optimizer.step()
        same_bits(dict(self.model.named_parameters()), dict(model.named_parameters()))
        same_bits(self.optimizer.state_dict()["state"], optimizer.state_dict()["state"])


def run(examples: int, calls: int, **options: Any) -> int:
    """Run machines; return how many calls were checked."""
    before = taken
    chosen = settings(
        max_examples=examples,
        stateful_step_count=calls,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    run_state_machine_as_test(Sequences, settings=chosen)
    return taken - before


def test_a_few_hundred_calls_in_any_order_do_what_the_model_says():
    assert run(12, 40, derandomize=True) >= 300


@pytest.mark.faults
def test_ten_thousand_calls_in_any_order_do_what_the_model_says(record_testsuite_property):
    calls = run(400, 60, print_blob=True)
    record_testsuite_property("calls", calls)
    assert calls >= 10_000
