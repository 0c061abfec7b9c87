import torch
from torch import nn

from layerwise.lab.training.measures import LayerMeasures


def test_norms_are_those_of_all_parameters_of_a_layer_and_nothing_is_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measures = LayerMeasures(optimizer, model)
    model(torch.randn(5, 4)).square().sum().backward()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.double().clone() for name, p in model.named_parameters()}
    measures.before()
    optimizer.step()
    stepped = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    found = measures.after()
    for layer in ("0", "2"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        gradient = torch.cat([gradients[name].flatten() for name in names]).norm().item()
        weight = torch.cat([before[name].flatten() for name in names]).norm().item()
        update = torch.cat([(stepped[name] - before[name]).flatten() for name in names]).norm().item()
        assert abs(found["gradient_norm"][layer] - gradient) < 1e-5 * gradient
        assert abs(found["weight_norm"][layer] - weight) < 1e-5 * weight
        assert abs(found["update_ratio"][layer] - update / weight) < 1e-4 * update / weight
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().double(), stepped[name])


def test_a_layer_without_gradient_has_norm_0():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    measures = LayerMeasures(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model[1](torch.randn(3, 2)).sum().backward()
    measures.before()
    found = measures.after()
    assert found["gradient_norm"]["0"] == 0.0
    assert found["update_ratio"] == {"0": 0.0, "1": 0.0}
