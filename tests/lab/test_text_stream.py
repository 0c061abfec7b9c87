"""Training on text: windows and what follows them, the loss by hand, tests on a text of their own."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.training import trial
from layerwise.lab.training.text_stream import TextStream
from layerwise.lab.training.trial import StoppedError

TEXT = torch.arange(100, dtype=torch.uint8)


def stream(**changes: Any) -> TextStream:
    given: dict[str, Any] = {
        "train": TEXT,
        "test": TEXT.flip(0),
        "context": 7,
        "batch_size": 3,
        "test_batch_size": 2,
        "test_count": 5,
        "seed": 0,
        "classes": 128,
    }
    return TextStream(**{**given, **changes})


def test_a_batch_is_windows_of_the_text_and_what_follows():
    batches = list(stream().batches(1))
    assert len(batches) == stream().epoch_length == 100 // 21
    for symbols, following in batches:
        assert symbols.shape == following.shape == (3, 7)
        assert symbols.dtype == following.dtype == torch.int64
        assert torch.equal(symbols[:, 1:], following[:, :-1])
        assert torch.equal(following, symbols + 1)  # of the text that counts


def test_an_epoch_can_begin_at_any_batch_and_seeds_and_epochs_differ():
    whole = list(stream().batches(2))
    for skip in range(len(whole) + 1):
        rest = list(stream().batches(2, skip))
        assert len(rest) == len(whole) - skip
        assert all(torch.equal(one[0], other[0]) for one, other in zip(rest, whole[skip:], strict=True))
    seen = {tuple(next(stream(seed=seed).batches(epoch))[0].flatten().tolist()) for seed in (0, 1) for epoch in (1, 2)}
    assert len(seen) == 4


def test_every_window_may_be_drawn_to_the_last_symbol():
    text = torch.arange(30, dtype=torch.uint8)
    made = stream(train=text, context=3, batch_size=10)
    drawn = torch.cat([symbols[:, 0] for epoch in range(1, 200) for symbols, _ in made.batches(epoch)])
    assert set(drawn.tolist()) == set(range(27))


@pytest.mark.parametrize(("count", "starts"), [(5, [0, 19, 39, 59, 79]), (1, [0]), (14, None), (None, None)])
def test_tests_are_spread_over_their_text_without_an_overlap(count, starts):
    made = stream(test=TEXT, test_count=count)
    batches = list(made.tests())
    assert len(batches) == made.test_length == math.ceil((count or 14) / 2)
    symbols = torch.cat([batch[0] for batch in batches])
    assert torch.equal(torch.cat([batch[1] for batch in batches]), symbols + 1)
    found = symbols[:, 0].tolist()
    assert found == (starts or found)
    assert len(found) == (count or 14)
    assert all(later - earlier >= 7 for earlier, later in pairwise(found))
    assert max(found) + 8 <= len(TEXT)


def test_windows_that_do_not_fit_are_told():
    with pytest.raises(UsageError, match=r"15 windows of context=7 to test: the text has 14; use fewer"):
        stream(test_count=15)
    with pytest.raises(UsageError, match="batch_size=15 windows of context=7 are longer than the text, 100 symbols"):
        stream(batch_size=15)
    stream(batch_size=14, test_count=14)


class Bigram(nn.Module):
    """Scores that depend on the last symbol alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        return self.table[symbols]


def test_the_loss_is_the_mean_over_symbols_in_nats_and_so_is_the_test():
    model, made = Bigram(), stream(test_count=5)
    table = model.table.detach().double()

    def slow(symbols: torch.Tensor, following: torch.Tensor) -> list[float]:
        pairs = zip(symbols.flatten().tolist(), following.flatten().tolist(), strict=True)
        return [math.log(float(table[one].exp().sum())) - float(table[one][two]) for one, two in pairs]

    batch = next(made.batches(1))
    losses = slow(*batch)
    assert trial.next_symbol_loss(model, batch).item() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    whole = [loss for test in made.tests() for loss in slow(*test)]
    assert len(whole) == 35  # batches of 2, 2 and 1 windows weigh by their symbols
    for measured, name in (("test", "test_loss"), ("validation", "validation_loss")):
        found = trial.language_model(made.tests, lambda batch: batch, measured)(model, lambda: False)
        assert found == {name: pytest.approx(math.fsum(whole) / 35, rel=1e-6)}
    with pytest.raises(StoppedError):
        trial.language_model(made.tests, lambda batch: batch)(model, lambda: True)
    assert model.training


def smoke(**constants: Any) -> Plan:
    content = recipe.load("roles-in-a-transformer").content
    scale = content["scales"]["smoke"]
    scale = {**scale, "constants": {**scale["constants"], **constants}}
    return recipe.Recipe("tiny", {**content, "scales": {"smoke": scale}}).plan("smoke", seeds=1)


def test_validation_and_test_read_texts_of_their_own():
    from layerwise.lab.data import library

    constants = smoke().runs[0].configuration.constants
    found = library.load()
    for measured, text in (("test", found.test), ("validation", found.validation)):
        given = {**Configuration.make(constants).trial, "measured": measured}
        made = trial.build(Configuration.make(Constants.of(given)))
        seen: list[torch.Tensor] = []
        made.model.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        assert list(made.evaluate(made.model, lambda: False)) == [f"{measured}_loss"]
        first = torch.cat(seen)[0].to(torch.uint8)
        assert torch.equal(first, text[:16])
        assert made.total == 12
        symbols, _ = next(made.batches(1, 0))
        assert bytes(symbols[0].tolist()) in bytes(found.train.tolist())


def test_the_arms_of_the_recipe_train_at_smoke_scale(carried_out):
    outcome = carried_out(smoke())
    assert outcome.complete
    for (_, arm, _), record in outcome.results.records.items():
        assert record.summary["iterations"] == 12
        assert 2.0 < record.summary["finals"]["test_loss"] < 6.0, arm
        assert record.summary["parameters"] == 128 * 32 * 2 + 16 * 32 + 12 * 32 * 32 + 9 * 32 + 2 * 32
    factors = outcome.results.records["gpt", "blockwise", 0].summary["factor"]["layers"]
    assert factors["blocks.0.attention.query.weight"] == 8.0
    assert factors["head.weight"] == 10.0
    spectral = outcome.results.records["gpt", "heavy-tail", 0].summary["factor"]["layers"]
    assert 1.0 <= min(spectral.values()) < max(spectral.values()) == spectral["head"] == spectral["embedding"] <= 5.0
    by_type = outcome.results.records["gpt", "type-only", 0].configuration.rule["factors"]
    feed_forward = (spectral["blocks.0.expand"] + spectral["blocks.0.contract"]) / 2
    assert by_type["blocks.0.expand"] == by_type["blocks.0.contract"] == pytest.approx(feed_forward)
    mean = outcome.results.records["gpt", "weighted-mean:blockwise", 0].configuration.rule["factors"]["*"]
    # norm 1, values and output 4, feed-forward 6, queries and keys 8, embedding, positions and head 10
    expected = (6 * 32 * 1 + 2 * 1024 * 4 + (8 * 1024 + 160) * 6 + 2 * 1024 * 8 + (2 * 4096 + 512) * 10) / 21_344
    assert mean == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "lenet", "width": None}, "a text is 'python-library' for a network whose name begins with 'gpt'"),
        ({"data": "digits5k"}, "data='digits5k' with model='gpt1', context=16"),
        ({"inputs": "scaled"}, "with a context, inputs='symbols' and order='shuffled'"),
        ({"context": None}, "context=None"),
        ({"order": "sequential"}, "order='sequential'"),
        ({"train_count": 5}, "train_count with data='python-library': a text takes none; leave it out"),
        ({"drawn_count": 5}, "drawn_count with data="),
        ({"shift": "inverted"}, "shift with data="),
        ({"training_accuracy": True}, "training_accuracy with data="),
    ],
)
def test_what_does_not_suit_a_text_is_refused(change, words):
    given = smoke().runs[0].configuration.trial
    trial.check(Constants.of(given))
    with pytest.raises(UsageError, match=words):
        trial.check(Constants.of({**given, **change}))
