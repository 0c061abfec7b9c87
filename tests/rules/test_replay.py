"""Recorded factors, replayed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import layerwise
import reference
from layerwise.layers import Layer
from layerwise.rules import LayerAdaptive, Replay, load_factors, save_factors
from layerwise.statistics import Statistics

from .samples import bits, quadratic_step

HEADER = json.dumps({"format": "layerwise-factors", "version": 1, "layers": ["a", "b"]})
ROWS = [{"a": 2.0, "b": 0.5}, {"a": 3.0, "b": 0.25}, {"a": 4.0, "b": 0.125}]
FACTORS = st.floats(0, 1e300)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_factors(tmp_path / "factors.jsonl", ROWS)
    return tmp_path / "factors.jsonl"


def layers(*names: str) -> list[Layer]:
    return [Layer(name, (torch.zeros(1),)) for name in names]


def model_of(*names: str) -> nn.ModuleDict:
    """A model with one float64 layer of two parameters a name."""
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in names}).double()


def set_gradients(model: nn.Module, value: float | None) -> None:
    for p in model.parameters():
        p.grad = None if value is None else torch.full_like(p, value)


def replayed(rule: Replay, counts: list[bool], names: tuple[str, ...] = ("a", "b")) -> list[list[float]]:
    state, rows = rule.init(layers(*names), torch.device("cpu")), []
    for count in counts:
        factors, state = rule.factors(Statistics(counts=torch.tensor(count)), state)
        rows.append(factors.tolist())
    return rows


# --- The recording ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(FACTORS, FACTORS, FACTORS), min_size=1, max_size=6))
@settings(deadline=None)
def test_file_gives_back_what_was_written_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, ...]]
) -> None:
    file = tmp_path_factory.mktemp("replay") / "factors.jsonl"
    names = ["", "encoder.0", "schön\u2028\n"]
    save_factors(file, [dict(zip(names, row, strict=True)) for row in rows])
    assert load_factors(file) == (names, [list(row) for row in rows])
    assert [path.name for path in file.parent.iterdir()] == ["factors.jsonl"]


def test_new_recording_replaces_the_old_one(file: Path) -> None:
    save_factors(file, [{"c": 7.0}])
    assert load_factors(file) == (["c"], [[7.0]])


def test_refused_recording_leaves_the_old_one(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(ValueError, match="step 1, layer 'a': factor nan must be a finite number of at least 0"):
        save_factors(file, [{"a": 1.0}, {"a": math.nan}])
    assert file.read_bytes() == before


def test_recording_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"steps is empty; record at least one result of get_last_factors\(\)"):
        save_factors(tmp_path / "file", [])


@pytest.mark.parametrize("second", [{"a": 1.0}, {"b": 1.0, "a": 1.0}, {"a": 1.0, "c": 1.0}], ids=str)
def test_recording_whose_layers_change_is_refused(tmp_path: Path, second: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"step 1 has the layers .*, step 0 has \['a', 'b'\]; record one adapter"):
        save_factors(tmp_path / "file", [{"a": 1.0, "b": 1.0}, second])


@pytest.mark.parametrize("factor", [-1.0, math.inf, "2", None, True], ids=repr)
def test_recorded_factor_out_of_range_is_refused(tmp_path: Path, factor: Any) -> None:
    with pytest.raises(ValueError, match=r"step 0, layer 'a': factor .* must be a finite number of at least 0"):
        save_factors(tmp_path / "file", [{"a": factor}])


# --- Damaged files ----------------------------------------------------------------------------------------------------

BAD_HEADERS = {
    "an_empty_file": "",
    "no_json": "hello\n",
    "a_list": "[1, 2]\n[1, 1]\n",
    "another_format": HEADER.replace("layerwise-factors", "factors") + "\n[1, 1]\n",
    "another_version": HEADER.replace("1", "2") + "\n[1, 1]\n",
    "no_layers": '{"format": "layerwise-factors", "version": 1}\n[1, 1]\n',
    "layers_that_are_no_strings": HEADER.replace('"a"', "1") + "\n[1, 1]\n",
    "layers_that_are_one_string": HEADER.replace('["a", "b"]', '"ab"') + "\n[1, 1]\n",
    "a_layer_named_twice": HEADER.replace('"b"', '"a"') + "\n[1, 1]\n",
    "half_a_header": HEADER[:20],
}
BAD_LINES = {
    "no_json": "hello",
    "half_a_line": "[1.0, 0.",
    "an_empty_line": "",
    "too_few": "[1.0]",
    "too_many": "[1.0, 2.0, 3.0]",
    "a_number": "2",
    "a_mapping": '{"a": 1.0, "b": 1.0}',
    "a_string": '["1.0", 1.0]',
    "negative": "[-1.0, 1.0]",
    "not_a_number": "[NaN, 1.0]",
    "infinite": "[1.0, Infinity]",
}


@pytest.mark.parametrize("text", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_file_with_a_damaged_header_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "damaged.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"file='.*damaged\.jsonl' does not start with the header .*save_factors"):
        Replay(file)


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_damaged_line_is_refused_by_file_and_number(file: Path, line: str, number: int) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"file='.*factors\.jsonl', line {number} is damaged \(.*record the factors"):
        Replay(file)


def test_bytes_that_are_no_text_are_refused_by_line(file: Path) -> None:
    lines = file.read_bytes().split(b"\n")
    lines[2] = b"[\xff\xfe, 1.0]"
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"file='.*factors\.jsonl', line 3 is damaged"):
        Replay(file)


def test_file_without_a_step_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text(HEADER + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"file='.*empty\.jsonl' holds no step; record at least one"):
        Replay(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        Replay(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c"), ("a", "c")], ids=str)
def test_recording_of_other_layers_is_refused_when_attached(file: Path, names: tuple[str, ...]) -> None:
    model, rule = model_of(*names), Replay(file)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"file='.*factors\.jsonl' was recorded of other layers: it lacks \["):
        layerwise.LayerwiseLR(optimizer, rule, model)


# --- The replay -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_steps_that_count_and_no_others_move_the_recording_on(
    tmp_path_factory: pytest.TempPathFactory, counts: list[bool]
) -> None:
    file = tmp_path_factory.mktemp("replay") / "factors.jsonl"
    save_factors(file, ROWS)
    expected = reference.replay(ROWS, ["b", "a"], counts)
    assert replayed(Replay(file), counts, ("b", "a")) == expected.tolist()


def test_last_factors_stay_after_the_last_recorded_step(file: Path) -> None:
    assert replayed(Replay(file), [True] * 6) == [[2.0, 0.5], [3.0, 0.25]] + 4 * [[4.0, 0.125]]


def test_factors_come_by_name_and_not_by_position(file: Path) -> None:
    assert replayed(Replay(file), [True], ("b", "a")) == [[0.5, 2.0]]


def test_steps_without_a_usable_gradient_do_not_move_the_recording_on(file: Path) -> None:
    model = model_of("a", "b")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Replay(file), model)
    seen = []
    for gradient in [1.0, 0.0, math.nan, math.inf, None, 1.0, 1.0]:
        set_gradients(model, gradient)
        optimizer.step()
        seen.append(adapter.get_last_factors())
    assert seen == [ROWS[0], *5 * [ROWS[1]], ROWS[2]]


def test_one_nan_among_the_gradients_stops_the_count(file: Path) -> None:
    model = model_of("a", "b")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Replay(file), model)
    set_gradients(model, 1.0)
    model["b"].bias.grad[0] = math.nan
    for _ in range(2):
        optimizer.step()
        assert adapter.get_last_factors() == ROWS[0]


def test_one_layer_with_a_gradient_is_a_step_to_count(file: Path) -> None:
    model = model_of("a", "b")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Replay(file), model)
    model["a"].weight.grad = torch.ones(2, 2).double()
    for row in ROWS:
        optimizer.step()
        assert adapter.get_last_factors() == row


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"momentum": 0.9, "weight_decay": 0.1}, "gradient"),
        ({"momentum": 0.9}, "lr"),
        ({"weight_decay": 0.1}, "lr"),
    ],
    ids=["inside_momentum", "on_the_rate", "without_momentum"],
)
def test_replayed_run_is_the_recorded_run_to_the_bit(tmp_path: Path, options: dict[str, float], place: Any) -> None:
    file = tmp_path / "factors.jsonl"
    first, second = model_of("a", "b"), model_of("a", "b")
    second.load_state_dict(first.state_dict())
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, **options)
    recorder = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), first, apply=place)
    recorded = []
    for step in range(6):
        quadratic_step(first, optimizer, step)
        recorded.append(recorder.get_last_factors())
    assert len({row["a"] for row in recorded}) == 6
    save_factors(file, recorded)

    again = torch.optim.SGD(second.parameters(), lr=0.1, **options)
    layerwise.LayerwiseLR(again, Replay(file), second, apply=place)
    for step in range(6):
        quadratic_step(second, again, step)
    assert bits(first) == bits(second)
