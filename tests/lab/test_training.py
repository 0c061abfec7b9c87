import math
from dataclasses import replace

import pytest
import torch

import layerwise
from layerwise.lab import data, solvers, training
from layerwise.lab.models.lenet import LeNet
from layerwise.lab.training import ARMS, CHANCE_ERROR, Run, StoppedError, train

RUN = Run(
    dataset="digits5k",
    solver="sgd",
    arm="plain",
    seed=0,
    iterations=4,
    record_at=(2, 4),
    loss_every=2,
    rate_every=2,
)


@pytest.fixture(scope="module")
def small():
    whole = data.load("digits5k")
    return replace(
        whole,
        train_images=whole.train_images[:100],
        train_labels=whole.train_labels[:100],
        test_images=whole.test_images[:60],
        test_labels=whole.test_labels[:60],
    )


@pytest.fixture
def watched(monkeypatch):
    """Record the initial weights and the batches that runs see."""
    seen = {"weights": [], "batches": []}
    build, batch = solvers.build, data.training_batch

    def watching_build(solver, model, rate_factor=1.0):
        seen["weights"].append([parameter.detach().clone() for parameter in model.parameters()])
        return build(solver, model, rate_factor)

    def watching_batch(dataset, iteration):
        images, labels = batch(dataset, iteration)
        seen["batches"].append((images.clone(), labels.clone()))
        return images, labels

    monkeypatch.setattr(solvers, "build", watching_build)
    monkeypatch.setattr(training, "training_batch", watching_batch)
    return seen


def test_the_arms_of_a_seed_share_initial_weights_and_batches(small, watched):
    for arm in ARMS:
        train(replace(RUN, arm=arm, rate_factor=1.5 if arm == "control" else 1.0), small)
    first, *others = watched["weights"]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    batches = watched["batches"]
    assert len(batches) == 12
    for number in range(4):
        for arm in (1, 2):
            assert torch.equal(batches[number][0], batches[4 * arm + number][0])
            assert torch.equal(batches[number][1], batches[4 * arm + number][1])


def test_seeds_differ_in_weights_and_not_in_batches(small, watched):
    train(RUN, small)
    train(replace(RUN, seed=1), small)
    assert not torch.equal(watched["weights"][0][0], watched["weights"][1][0])
    assert torch.equal(watched["batches"][0][1], watched["batches"][4][1])


def test_a_run_is_the_plain_loop_it_says_it_is(small):
    model = LeNet(0).to(memory_format=torch.channels_last)
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "lr": 0.01}, {"params": biases, "lr": 0.02}], momentum=0.9, weight_decay=5e-4
    )
    losses = []
    for iteration in range(4):
        for group, base in zip(optimizer.param_groups, (0.01, 0.02), strict=True):
            group["lr"] = base * (1 + 1e-4 * iteration) ** -0.75
        index = torch.arange(64 * iteration, 64 * iteration + 64) % 100
        images = small.train_images[index].float() / 256
        scores = model(images.contiguous(memory_format=torch.channels_last))
        loss = torch.nn.functional.cross_entropy(scores, small.train_labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    record = train(RUN, small)
    expected = [[2, sum(losses[:2]) / 2], [4, sum(losses[2:]) / 2]]
    assert record["training_loss"] == [pytest.approx(pair, rel=1e-5) for pair in expected]
    scores = model((small.test_images.float() / 256).contiguous(memory_format=torch.channels_last))
    wrong = (scores.argmax(1) != small.test_labels).double().mean().item()
    assert record["test_error"][-1] == [4, pytest.approx(100 * wrong)]


def test_a_run_repeated_gives_the_same_numbers(small):
    for arm in ("plain", "layer-adaptive"):
        first, second = (train(replace(RUN, arm=arm), small) for _ in range(2))
        for key in ("test_error", "training_loss", "rates", "factor"):
            assert first[key] == second[key]


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_the_rates_of_the_layer_adaptive_arm_are_the_policy_times_the_factor(small, solver):
    record = train(replace(RUN, solver=solver, arm="layer-adaptive", rate_every=1), small)
    rates = record["rates"]
    assert rates["iterations"] == [1, 2, 3, 4]
    assert list(rates["rate"]) == ["conv1", "conv2", "ip1", "ip2"]
    for layer in rates["rate"]:
        for done, rate, factor in zip(rates["iterations"], rates["rate"][layer], rates["factor"][layer], strict=True):
            assert factor > 1
            assert rate == pytest.approx(0.01 * solvers.inv_policy(done - 1) * factor, rel=1e-6)


def test_the_mean_factor_is_over_layers_and_all_iterations(small):
    every = train(replace(RUN, arm="layer-adaptive", rate_every=1), small)
    values = [factor for layer in every["rates"]["factor"].values() for factor in layer]
    assert every["factor"]["mean"] == pytest.approx(sum(values) / len(values), rel=1e-12)
    seldom = train(replace(RUN, arm="layer-adaptive", rate_every=2), small)
    assert seldom["factor"] == every["factor"]
    for layer, summary in every["factor"]["layers"].items():
        assert summary["lowest"] == min(every["rates"]["factor"][layer])
        assert summary["highest"] == max(every["rates"]["factor"][layer])


def test_the_first_factors_are_equation_9(small):
    record = train(replace(RUN, arm="layer-adaptive", rate_every=1, iterations=1, record_at=(1,)), small)
    model = LeNet(0)
    images, labels = data.training_batch(small, 0)
    torch.nn.functional.cross_entropy(model(data.pixels(images)), labels).backward()
    for name, layer in model.named_children():
        norm = math.hypot(layer.weight.grad.norm().item(), layer.bias.grad.norm().item())
        assert record["rates"]["factor"][name][0] == pytest.approx(1 + math.log(1 + 1 / norm), rel=1e-4)


def test_the_rates_of_the_other_arms_are_the_same_for_all_layers(small):
    plain, control = train(RUN, small), train(replace(RUN, arm="control", rate_factor=1.5), small)
    for layer in ("conv1", "conv2", "ip1", "ip2"):
        assert plain["rates"]["factor"][layer] == [1.0, 1.0]
        assert plain["rates"]["rate"][layer] == pytest.approx([0.01 * solvers.inv_policy(k) for k in (1, 3)])
        expected = [1.5 * rate for rate in plain["rates"]["rate"][layer]]
        assert control["rates"]["rate"][layer] == pytest.approx(expected)


def test_a_run_that_diverges_is_flagged_and_counts_as_chance(small):
    record = train(replace(RUN, arm="control", rate_factor=1e12), small)
    assert record["diverged_at"] in (1, 2, 3)
    assert record["test_error"][-1] == [4, CHANCE_ERROR]
    assert [done for done, _ in record["test_error"]] == [2, 4]
    assert all(math.isfinite(value) for _, value in record["training_loss"])


def test_a_layer_adaptive_run_that_diverges_is_flagged(small, monkeypatch):
    monkeypatch.setattr(solvers, "BASE_RATE", 1e10)
    record = train(replace(RUN, arm="layer-adaptive"), small)
    assert record["diverged_at"] is not None
    assert math.isfinite(record["factor"]["mean"])


def test_a_run_stops_when_told_to(small):
    with pytest.raises(StoppedError):
        train(RUN, small, stop=lambda: True)


def test_progress_is_told_the_iterations_done(small):
    told = []
    train(RUN, small, progress=told.append)
    assert told == [2, 4]


def test_the_configuration_tells_runs_apart():
    assert RUN.configuration() != replace(RUN, seed=1).configuration()
    assert RUN.configuration() != replace(RUN, rate_factor=1.1).configuration()
    assert RUN.configuration()["record_at"] == [2, 4]
    assert RUN.name == "sgd-plain-seed0"


def test_nothing_is_left_attached_to_the_rule(small):
    """Two runs in one process do not meet: the second plain run is the first."""
    before = train(RUN, small)
    train(replace(RUN, arm="layer-adaptive"), small)
    assert train(RUN, small)["training_loss"] == before["training_loss"]
    assert isinstance(layerwise.__version__, str)
