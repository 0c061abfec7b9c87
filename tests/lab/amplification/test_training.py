import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from amplification.conftest import TINY
from layerwise.lab.amplification import images, training
from layerwise.lab.amplification.training import ARMS, RANDOM_RATIO, RECORD_FIELDS, Protocol, Run, train
from layerwise.lab.data.augmentation import shuffled_batches
from layerwise.lab.evaluation import StoppedError
from layerwise.lab.models.resnet import ResNet

RUN = Run(dataset="digits5k", arm="plain", seed=0, weight_decay=5e-4, protocol=TINY)
MODULES = 25
"""Layers of ResNet-10."""


@pytest.fixture
def watched(monkeypatch):
    """Record the inputs of every step and the weights at the end of every epoch."""
    seen = {"inputs": [], "weights": []}
    to_train, measure = images.to_train, training.measure_error

    def watching_inputs(*arguments):
        inputs = to_train(*arguments)
        seen["inputs"].append(inputs.clone())
        return inputs

    def watching_weights(model, *rest):
        seen["weights"].append([parameter.detach().clone() for parameter in model.parameters()])
        return measure(model, *rest)

    monkeypatch.setattr(images, "to_train", watching_inputs)
    monkeypatch.setattr(training, "measure_error", watching_weights)
    return seen


def by_hand(dataset, amplified):
    """Train with every gradient doubled in some epochs; give the losses and the gradients of epoch 4."""
    model = ResNet(10, 0, width=2, channels=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    losses, gradients = [], {}
    for epoch in range(1, TINY.epochs + 1):
        optimizer.param_groups[0]["lr"] = 0.1 if epoch <= 5 else 0.01
        recent = []
        for index in shuffled_batches(TINY.train_count, TINY.batch_size, generator):
            inputs = images.to_test(dataset, dataset.train_images[index])
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            loss = torch.nn.functional.cross_entropy(model(inputs), dataset.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in model.named_parameters():
                if epoch == 4:
                    layer = name.rpartition(".")[0]
                    gradients.setdefault(layer, {}).setdefault(name, []).append(parameter.grad.numpy().ravel().copy())
                if epoch in amplified:
                    parameter.grad.mul_(2)
            optimizer.step()
            recent.append(loss.item())
        losses.append([epoch, sum(recent) / len(recent)])
    return losses, {
        layer: np.concatenate([np.stack(steps) for steps in found.values()], axis=1)
        for layer, found in gradients.items()
    }


def test_the_phases_are_those_of_the_paper_at_a_tenth():
    protocol = Protocol()
    phases = [(phase.until, phase.amplify, phase.factor) for phase in protocol.phases]
    assert phases == [(5, False, 2.0), (10, True, 2.0), (13, True, 2.0), (15, False, 2.0)]
    assert protocol.analysis_epochs == (6, 11)
    recipe = protocol.recipe(5e-4)
    assert (recipe.epochs, recipe.milestones, recipe.rate, recipe.rate_decay) == (15, (10,), 0.1, 0.1)
    assert (protocol.batches, protocol.iterations) == (63, 945)


def test_the_arms_of_a_seed_are_one_training_until_the_first_amplified_epoch(tiny_images, watched):
    for arm in ARMS:
        train(replace(RUN, arm=arm), tiny_images)
    steps, epochs = TINY.iterations, TINY.epochs
    assert len(watched["inputs"]) == len(ARMS) * steps
    assert len(watched["weights"]) == len(ARMS) * epochs
    for number, arm in enumerate(ARMS):
        ours = watched["inputs"][number * steps : (number + 1) * steps]
        assert all(torch.equal(a, b) for a, b in zip(ours, watched["inputs"], strict=False))
        same = [
            all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
            for mine, plain in zip(
                watched["weights"][number * epochs : (number + 1) * epochs], watched["weights"], strict=False
            )
        ]
        assert same[:4] == [True] * 4, arm
        assert all(same) == (arm == "plain"), arm


def test_seeds_differ_in_weights_batches_and_draws(tiny_images, watched):
    first = train(replace(RUN, arm="random"), tiny_images)
    second = train(replace(RUN, arm="random", seed=1), tiny_images)
    assert not torch.equal(watched["weights"][0][0], watched["weights"][TINY.epochs][0])
    assert not torch.equal(watched["inputs"][0], watched["inputs"][TINY.iterations])
    assert first["selections"] != second["selections"]


@pytest.mark.parametrize(("arm", "amplified"), [("plain", ()), ("all", (5, 7))])
def test_a_run_is_the_loop_it_says_it_is(tiny_images, arm, amplified):
    losses, _ = by_hand(tiny_images, amplified)
    assert train(replace(RUN, arm=arm), tiny_images)["training_loss"] == [
        pytest.approx(pair, rel=1e-4) for pair in losses
    ]


@pytest.mark.parametrize("arm", ["G", "G_prime"])
def test_value_z_and_choice_are_those_of_the_papers_equations(tiny_images, arm):
    _, gradients = by_hand(tiny_images, ())
    values = {}
    for layer, steps in gradients.items():
        summed, absolute = np.abs(steps.sum(0, dtype=np.float64)), np.abs(steps).sum(0, dtype=np.float64)
        each = np.divide(summed, absolute, out=np.zeros_like(summed), where=absolute > 0)
        values[layer] = summed.sum() / absolute.sum() if arm == "G" else each.mean()
    spread = np.array(list(values.values()))
    record = train(replace(RUN, arm=arm), tiny_images)
    found = record["selections"][0]
    assert found["epoch"] == 4
    assert list(found["layers"]) == list(values)
    for layer, (value, z, chosen) in found["layers"].items():
        assert value == pytest.approx(values[layer], rel=2e-3)
        assert z == pytest.approx((values[layer] - spread.mean()) / spread.std(), abs=2e-2)
        assert chosen == (z > training.THRESHOLD)


def test_the_share_is_that_of_the_chosen_layers_in_the_amplified_epochs(tiny_images):
    for arm in ARMS:
        record = train(replace(RUN, arm=arm), tiny_images)
        assert set(record) >= RECORD_FIELDS
        chosen = [sum(row[2] for row in choice["layers"].values()) for choice in record["selections"]]
        assert len(chosen) == (0 if arm == "plain" else 2)
        if arm == "all":
            assert chosen == [MODULES, MODULES]
        if arm == "random":
            assert chosen == [round(RANDOM_RATIO * MODULES)] * 2
            assert all(row[:2] == [None, None] for row in record["selections"][0]["layers"].values())
        expected = dict.fromkeys(range(1, 9), 0.0)
        expected |= {epoch: count / MODULES for epoch, count in zip((5, 7), chosen, strict=False)}
        assert dict(record["share"]) == pytest.approx(expected)


def test_a_run_repeated_gives_the_same_numbers(tiny_images):
    first, second = (train(replace(RUN, arm="G_prime"), tiny_images) for _ in range(2))
    for key in ("accuracy", "training_loss", "share", "selections"):
        assert first[key] == second[key]


def test_a_run_that_diverges_is_flagged_and_counts_as_chance(tiny_images, monkeypatch):
    build = training.cifar_recipe.build

    def explosive(model, recipe):
        return build(model, replace(recipe, rate=1e30))

    monkeypatch.setattr(training.cifar_recipe, "build", explosive)
    record = train(replace(RUN, arm="all"), tiny_images)
    assert record["diverged_at"] is not None
    assert record["accuracy"][-1] == [8, 10.0]
    assert [epoch for epoch, _ in record["accuracy"]] == list(range(1, 9))
    assert all(math.isfinite(loss) for _, loss in record["training_loss"])


def test_a_run_stops_when_told_to(tiny_images):
    with pytest.raises(StoppedError):
        train(RUN, tiny_images, stop=lambda: True)


def test_progress_is_told_the_iterations_done(tiny_images):
    told = []
    train(RUN, tiny_images, progress=told.append)
    assert told == [10, 20, 30]


def test_the_configuration_tells_runs_apart():
    plain = RUN.configuration()
    assert plain["rule"] == "None"
    for other in ({"arm": "G"}, {"seed": 1}, {"weight_decay": 0.0}, {"protocol": replace(TINY, width=4)}):
        assert replace(RUN, **other).configuration() != plain
    assert "Directionality" in replace(RUN, arm="G").configuration()["rule"]
    assert (RUN.name, RUN.key) == ("plain-seed0", ("plain", 0))
