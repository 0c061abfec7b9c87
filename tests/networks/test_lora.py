"""Low-rank adapters of PEFT on frozen transformers: which layers there are, their factors, and the frozen rest."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import layerwise
from layerwise.lab.data import text
from layerwise.lab.models.transformer import TransformerLanguageModel
from layerwise.rules import LayerAdaptive, LayerDecay

from .by_hand import CASES, OPTIMIZERS, ByHand, Layers, PermanentGroups, expected_factors, loss_of_text, named

pytest.importorskip("peft", reason="peft is not installed: adapters are not tested")

from peft import LoraConfig, get_peft_model

PREFIX = "base_model.model."
TARGETS = [f"{PREFIX}blocks.{i}.attention.query_key_value" for i in (0, 1)]
APART: Layers = {f"{t}.lora_{which}.default": [f"{t}.lora_{which}.default.weight"] for t in TARGETS for which in "AB"}
JOINED: Layers = {f"{t}.default": [f"{t}.lora_{which}.default.weight" for which in "AB"] for t in TARGETS}


def adapted(**options) -> nn.Module:
    """Return the small transformer in float64, frozen, with adapters of rank 3; the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LoraConfig(**{"r": 3, "target_modules": ["query_key_value"], **options})
        return get_peft_model(CASES["transformer"].build(), config)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    loss_of_text(model, step).backward()


def test_a_and_b_are_layers_of_their_own_unless_the_function_of_the_page_joins_them(shown):
    model = adapted()
    apart = layerwise.LayerwiseLR(torch.optim.AdamW(trained(model)), LayerAdaptive(), model)
    assert {layer.name: list(layer.parameter_names) for layer in apart.layer_table()} == APART
    joined = layerwise.LayerwiseLR(
        torch.optim.AdamW(trained(model)), LayerAdaptive(), model, layers=shown("one_layer_a_target")
    )
    assert {layer.name: list(layer.parameter_names) for layer in joined.layer_table()} == JOINED


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_factors_and_weights_are_those_of_the_equations_and_the_base_stays_to_the_bit(
    shown, optimizer, joined, assert_close, assert_same_bits
):
    model, twin = adapted(), adapted()
    layers = JOINED if joined else APART
    before = frozen(model)
    assert len(before) == 28
    ours = OPTIMIZERS[optimizer](trained(model))
    specification = shown("one_layer_a_target") if joined else "auto"
    adapter = layerwise.LayerwiseLR(ours, LayerAdaptive(), model, layers=specification)
    hand = ByHand(twin, layers, optimizer)
    for step in range(6):
        backward(model, step)
        backward(twin, step)
        factors = expected_factors(twin, layers)
        ours.step()
        hand.step(factors)
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
        for p, q in zip(trained(model), trained(twin), strict=True):
            assert_close(p, q)
    assert_same_bits({name: named(model)[name].detach() for name in before}, before)


def test_a_has_no_gradient_in_the_first_step_because_b_is_zero_and_its_factor_is_one():
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    seen = []
    for step in range(2):
        backward(model, step)
        optimizer.step()
        seen.append(adapter.get_last_factors())
    a, b = (f"{TARGETS[0]}.lora_{which}.default" for which in "AB")
    assert seen[0][a] == 1.0 < seen[0][b]
    assert seen[1][a] > seen[1][b] > 1.0


def test_an_optimizer_that_holds_the_frozen_base_too_gives_the_same_weights(assert_same_bits):
    model, twin = adapted(), adapted()
    everything = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(everything, LayerAdaptive(), model)
    some = torch.optim.AdamW(trained(twin), lr=0.01, weight_decay=0.1)
    layerwise.LayerwiseLR(some, LayerAdaptive(), twin)
    for step in range(4):
        for network, optimizer in ((model, everything), (twin, some)):
            backward(network, step)
            optimizer.step()
    assert_same_bits(named(model), named(twin))
    factors = adapter.get_last_factors()
    assert len(factors) == 19
    assert {name for name, factor in factors.items() if factor != 1.0} == set(APART)


def test_a_second_adapter_is_trained_alone_and_the_first_stays_to_the_bit(shown, assert_same_bits, assert_close):
    model, twin = adapted(), adapted()
    for network in (model, twin):
        with torch.random.fork_rng():
            torch.manual_seed(6)
            network.add_adapter("second", LoraConfig(r=2, target_modules=["expand", "query_key_value"]))
        network.set_adapter("second")
    before = frozen(model)
    assert {name for name in before if "lora" in name} == {name for names in APART.values() for name in names}
    targets = [f"{PREFIX}blocks.{i}.{part}" for i in (0, 1) for part in ("attention.query_key_value", "expand")]
    layers = {f"{t}.second": [f"{t}.lora_{which}.second.weight" for which in "AB"] for t in targets}
    ours = OPTIMIZERS["AdamW"](trained(model))
    adapter = layerwise.LayerwiseLR(ours, LayerAdaptive(), model, layers=shown("one_layer_a_target"))
    assert adapter.layers == list(layers)
    hand = ByHand(twin, layers, "AdamW")
    for step in range(4):
        backward(model, step)
        backward(twin, step)
        factors = expected_factors(twin, layers)
        ours.step()
        hand.step(factors)
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
    assert_close(trained(model), trained(twin))
    assert_same_bits({name: named(model)[name].detach() for name in before}, before)


def test_an_adapter_that_is_added_to_the_optimizer_later_is_found_at_the_next_step(shown):
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers=shown("one_layer_a_target"))
    backward(model, 0)
    optimizer.step()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["expand"]))
    model.set_adapter("second")
    optimizer.add_param_group({"params": trained(model)})
    second = {
        f"{PREFIX}blocks.{i}.expand.second": [f"{PREFIX}blocks.{i}.expand.lora_{which}.second.weight" for which in "AB"]
        for i in (0, 1)
    }
    backward(model, 1)
    factors = {**expected_factors(model, second), **dict.fromkeys(JOINED, 1.0)}
    optimizer.step()
    assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
    assert all(factors[name] > 1 for name in second)


def test_two_adapters_in_one_optimizer_are_layers_of_their_own_and_the_idle_one_has_factor_one(shown, assert_same_bits):
    model, twin = adapted(), adapted()
    for network in (model, twin):
        with torch.random.fork_rng():
            torch.manual_seed(6)
            network.add_adapter("second", LoraConfig(r=2, target_modules=["query_key_value"]))
    second = {f"{t}.second": [f"{t}.lora_{which}.second.weight" for which in "AB"] for t in TARGETS}
    layers = {name: names for pair in zip(JOINED.items(), second.items(), strict=True) for name, names in pair}
    of_both = [named(model)[name] for names in layers.values() for name in names]
    ours = torch.optim.AdamW(of_both, lr=0.01, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(ours, LayerAdaptive(), model, layers=shown("one_layer_a_target"))
    hand = PermanentGroups(twin, layers, "AdamW")
    for step in range(4):
        for network in (model, twin):
            network.set_adapter("default" if step < 2 else "second")
            backward(network, step)
        factors = expected_factors(twin, layers)
        idle = second if step < 2 else JOINED
        assert [factors[name] for name in idle] == [1.0, 1.0]
        ours.step()
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
        hand.step(adapter.get_last_factors())
        assert_same_bits(named(model), named(twin))


def test_the_function_of_the_page_takes_magnitudes_embeddings_and_whole_modules(shown):
    model = adapted(target_modules=["query_key_value", "position"], use_dora=False, modules_to_save=["norm"])
    groups = layerwise.param_groups(model, shown("one_layer_a_target"))
    assert {group["name"]: len(group["params"]) for group in groups} == {
        f"{PREFIX}position.default": 2,
        **dict.fromkeys(JOINED, 2),
        f"{PREFIX}norm.modules_to_save.default": 2,
    }
    magnitudes = layerwise.param_groups(adapted(use_dora=True), shown("one_layer_a_target"))
    assert {group["name"]: len(group["params"]) for group in magnitudes} == dict.fromkeys(JOINED, 3)


def test_layer_decay_counts_the_adapters_of_the_blocks(shown):
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.5), model)
    backward(model, 0)
    optimizer.step()
    assert list(adapter.get_last_lr().values()) == pytest.approx([0.05, 0.05, 0.1, 0.1])


def rows_of(told: str) -> list[list[str]]:
    return [line.split() for line in told.split("\n\n")[1].splitlines()[1:]]


def test_what_is_told_before_training_lists_the_adapters_with_names_that_differ(capsys):
    model = adapted()
    told = layerwise.diagnose(torch.optim.AdamW(trained(model)), model)
    assert capsys.readouterr().out == told + "\n"
    assert told.startswith("LayerAdaptive on AdamW: 4 layers, 4 parameter tensors, 192 numbers")
    assert [row[:3] for row in rows_of(told)] == [
        [name, "1", size] for name, size in zip(APART, ("24", "72") * 2, strict=True)
    ]
    assert "frozen" not in told
    assert "problems  none found" in told


def test_what_is_told_of_an_optimizer_of_everything_puts_the_frozen_layers_last_where_the_list_is_cut(capsys):
    model = adapted()
    rows = rows_of(layerwise.diagnose(torch.optim.AdamW(model.parameters()), model, most=6))
    assert [row[-1] == "frozen" for row in rows[:6]] == [False] * 4 + [True] * 2
    assert " ".join(rows[6]) == "… and 13 more (most=19 lists all)"


@pytest.mark.full
def test_adapters_teach_a_network_of_english_to_read_programs_while_its_base_stays_as_it_was():
    program = text.of(inspect.getsource(inspect))
    tests = text.windows(program.test, 64, 65, torch.Generator().manual_seed(1))

    def loss_on(windows: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def train(words: torch.Tensor, steps: int, lr: float, *, attach: bool) -> float:
        optimizer = torch.optim.AdamW(trained(model), lr=lr)
        if attach:
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_on(text.windows(words, 8, 65, generator)).backward()
            optimizer.step()
        with torch.no_grad():
            return loss_on(tests).item()

    model: nn.Module = TransformerLanguageModel(0, width=32)
    of_english = train(text.load().train, 120, 3e-3, attach=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["query_key_value", "expand", "contract"]))
    before = frozen(model)
    of_programs = train(program.train, 60, 3e-3, attach=True)
    assert of_programs < text.entropy(program.test) - 0.25
    assert of_programs < of_english - 0.1
    assert all(torch.equal(named(model)[name], p) for name, p in before.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_a_gpt2_of_transformers_have_the_layers_and_factors_of_the_equations(shown, assert_same_bits):
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        gpt2 = transformers.GPT2LMHeadModel(config).double().eval()
        model = get_peft_model(gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    targets = [f"base_model.model.transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    layers = {f"{t}.default": [f"{t}.lora_{which}.default.weight" for which in "AB"] for t in targets}
    before = frozen(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers=shown("one_layer_a_target"))
    assert {layer.name: list(layer.parameter_names) for layer in adapter.layer_table()} == layers
    for step in range(3):
        symbols = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scores = model(input_ids=symbols).logits[:, :-1]
        functional.cross_entropy(scores.flatten(0, 1), symbols[:, 1:].flatten()).backward()
        factors = expected_factors(model, layers)
        optimizer.step()
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
        assert min(factors.values()) > 1
    assert_same_bits({name: named(model)[name].detach() for name in before}, before)
    assert all(re.search(r"\.h\.\d\.attn\.c_attn\.default$", name) for name in adapter.layers)
