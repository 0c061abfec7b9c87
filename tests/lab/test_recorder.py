import io

import polars
import pytest
import torch

from layerwise.lab.runs.record import SCHEMA_COLUMNS, Recorder


@pytest.fixture
def filled():
    recorder = Recorder()
    for step in (1, 2, 3):
        recorder.add("training_loss", step, 1, 1.0 / step)
        recorder.add_layers("factor", step, 1, {"a": 2.0 * step, "b": 1.0 * step})
    recorder.add("test_error", 3, 1, 12.5)
    return recorder


def test_the_table_holds_every_number_with_its_place(filled):
    frame = filled.frame()
    assert tuple(frame.columns) == SCHEMA_COLUMNS
    assert frame.height == 3 + 6 + 1
    row = frame.filter((polars.col("layer") == "a") & (polars.col("step") == 2)).row(0)
    assert row == (2, 1, "factor", "a", 4.0)
    assert frame.filter(polars.col("quantity") == "test_error")["layer"].to_list() == [None]


def test_an_empty_recorder_has_an_empty_table():
    assert Recorder().frame().height == 0
    assert tuple(Recorder().frame().columns) == SCHEMA_COLUMNS


def test_means_and_spread_of_layers(filled):
    assert filled.layer_means("factor") == {"a": 4.0, "b": 2.0}
    assert filled.spread("factor") == 2.0
    assert filled.spread("rate") is None
    filled.add_layers("factor", 4, 1, {"a": float("nan"), "b": float("inf")})
    assert filled.layer_means("factor") == {"a": 4.0, "b": 2.0}
    assert filled.spread("factor") == 2.0


def test_the_state_is_loaded_without_running_anything(filled):
    buffer = io.BytesIO()
    torch.save(filled.state_dict(), buffer)
    buffer.seek(0)
    again = Recorder()
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.frame().equals(filled.frame())
    again.add("test_error", 4, 2, 1.0)
    assert again.last("test_error") == (4, 1.0)
    assert filled.last("test_error") == (3, 12.5)


def test_rows_only_grow_so_that_a_checkpoint_need_only_add_the_new_ones(filled):
    before = filled.state_dict()["rows"]
    kept = before.clone()
    for step in range(4, 4000):  # more than there was room for
        filled.add("training_loss", step, 1, 0.5)
    after = filled.state_dict()["rows"]
    assert torch.equal(before, kept)
    assert torch.equal(after[: len(kept)], kept)
    assert len(after) == 24 * (10 + 3996)


def test_a_state_without_rows_is_loaded_and_given_again():
    state = Recorder().state_dict()
    for _ in range(2):
        recorder = Recorder()
        recorder.load_state_dict(state)
        state = recorder.state_dict()
    assert len(state["rows"]) == 0
    recorder.add("training_loss", 1, 1, 2.5)
    assert recorder.frame()["value"].to_list() == [2.5]


def test_rows_of_no_series_are_refused(filled):
    with pytest.raises(ValueError, match="unknown series"):
        Recorder().load_state_dict({**filled.state_dict(), "series": []})
