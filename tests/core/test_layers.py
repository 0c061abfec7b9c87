"""Which parameters form a layer, and what the layer is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from layerwise.layers import check_patterns, clean_name, make_layers, named_parameters_of, owner_name


def layers_of(model, specification="module", names_from=None):
    """Return layer name to parameter names, found through an optimizer as an adapter finds them."""
    optimizer = torch.optim.SGD((names_from or model).parameters(), lr=0.1)
    found = make_layers(named_parameters_of(optimizer, model), specification, model)
    return {layer.name: list(layer.parameter_names) for layer in found}


def test_a_module_is_a_layer_of_its_weight_and_bias_and_the_order_is_the_models(make_model):
    model = make_model()
    optimizer = torch.optim.SGD(list(reversed(list(model.parameters()))), lr=0.1)
    found = make_layers(named_parameters_of(optimizer, model), "module", model)
    assert [layer.name for layer in found] == ["0", "2", "4"]
    assert found[0].parameter_names == ("0.weight", "0.bias")
    assert found[1].parameters[0] is model[2].weight
    assert found[1].parameters[1] is model[2].bias
    assert [layer.module for layer in found] == [model[0], model[2], model[4]]


def test_a_parameter_is_a_layer_when_asked(make_model):
    assert list(layers_of(make_model(), "parameter")) == [
        *("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"),
    ]


def test_a_pattern_is_a_layer_and_the_first_match_wins():
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert layers_of(model, ["*.bias", "stem", "*"]) == {
        "stem": ["stem.weight"],
        "*.bias": ["stem.bias", "body.bias", "head.bias"],
        "*": ["body.weight", "head.weight"],
    }


def test_a_parameter_that_no_pattern_matches_is_in_no_layer():
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert layers_of(model, ["head"]) == {"head": ["head.weight", "head.bias"]}


def test_patterns_distinguish_upper_and_lower_case():
    model = nn.ModuleDict({"Head": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert layers_of(model, ["h*"]) == {"h*": ["head.weight", "head.bias"]}


def test_a_callable_names_the_layer_or_leaves_the_parameter_out(make_model):
    def matrices(name, parameter):
        return "matrices" if parameter.ndim > 1 else None

    assert layers_of(make_model(), matrices) == {"matrices": ["0.weight", "2.weight", "4.weight"]}


def test_a_callable_that_returns_something_else_is_told_so(make_model):
    with pytest.raises(
        TypeError, match=r"layers\('0\.weight', parameter\) returned 3; it must return a string or None"
    ):
        layers_of(make_model(), lambda name, parameter: 3)


def test_a_specification_that_puts_nothing_into_a_layer_is_refused(make_model):
    with pytest.raises(ValueError, match="puts no parameter into a layer"):
        layers_of(make_model(), lambda name, parameter: None)


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("module.encoder.weight", "encoder.weight"),
        ("module.module.encoder.weight", "encoder.weight"),
        ("_orig_mod.encoder.weight", "encoder.weight"),
        ("module._orig_mod.encoder.weight", "encoder.weight"),
        ("_orig_mod.module.encoder.weight", "encoder.weight"),
        ("encoder._orig_mod.0.weight", "encoder.0.weight"),
        ("_forward_module.encoder.weight", "encoder.weight"),
        ("encoder._fsdp_wrapped_module._checkpoint_wrapped_module.0.weight", "encoder.0.weight"),
        ("encoder.parametrizations.weight.original", "encoder.weight"),
        ("encoder.parametrizations.weight.original1", "encoder.weight1"),
        ("parametrizations.weight.original", "weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("modules.0.weight", "modules.0.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("original.weight", "original.weight"),
        ("", ""),
    ],
)
def test_the_prefixes_of_wrappers_are_stripped_and_nothing_else(wrapped, bare):
    assert clean_name(wrapped) == bare
    assert clean_name(bare) == bare


@pytest.fixture
def distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_changes_no_layer(make_model, distributed_data_parallel):
    assert layers_of(distributed_data_parallel(make_model())) == layers_of(make_model())


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "an averaged model": AveragedModel,
    "activation checkpointing": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
    "torch.compile around data parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_changes_no_layer(make_model, wrap):
    assert layers_of(wrap(make_model())) == layers_of(make_model())


def test_a_compiled_model_without_a_length_keeps_its_layers_and_modules():
    model = Vision()
    compiled = torch.compile(model, backend="eager")
    assert list(layers_of(compiled)) == list(layers_of(model))


def test_a_model_whose_length_is_zero_still_gives_its_layers_their_modules():
    class Registry(nn.Linear):
        def __len__(self):
            return 0

    model = Registry(2, 1)
    assert make_layers(dict(model.named_parameters()), "module", model)[0].module is model


def test_wrappers_inside_the_model_change_no_layer_and_the_module_is_the_bare_one(make_model):
    model = make_model()
    linear = model[2]
    model[0] = torch.compile(model[0], backend="eager")
    model[2] = checkpoint_wrapper(linear)
    assert layers_of(model) == layers_of(make_model())
    found = make_layers({clean_name(n): p for n, p in model.named_parameters()}, "module", model)
    assert found[1].module is linear


def test_names_that_a_compiled_models_optimizer_carries_are_cleaned(make_model):
    optimizer = torch.optim.SGD(torch.compile(make_model(), backend="eager").named_parameters(), lr=0.1)
    assert list(named_parameters_of(optimizer, None))[:2] == ["0.weight", "0.bias"]


def test_weight_norm_keeps_magnitude_direction_and_bias_in_one_layer():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 1))
    assert layers_of(model) == {"0": ["0.bias", "0.weight0", "0.weight1"], "1": ["1.weight", "1.bias"]}
    found = make_layers({clean_name(n): p for n, p in model.named_parameters()}, "module", model)
    assert found[0].module is model[0]


def test_the_own_parameters_of_a_parametrization_belong_to_the_module_it_is_put_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, weight):
            return weight * self.scale

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    parametrize.register_parametrization(model[0], "weight", Scaled())
    found = layers_of(model)
    assert list(found) == ["0", "1"]
    assert set(found["0"]) == {"0.bias", "0.weight", "0.parametrizations.weight.0.scale"}
    assert owner_name("0.parametrizations.weight.0.scale") == "0"
    assert owner_name("parametrizations.weight.0.scale") == ""


def test_tied_weights_belong_to_their_first_owner():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    expected = {"embed": ["embed.weight"], "body": ["body.weight", "body.bias"], "head": ["head.bias"]}
    assert layers_of(model) == expected


def test_a_shared_module_is_one_layer():
    shared = nn.Linear(3, 3)
    assert list(layers_of(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]


class Vision(nn.Module):
    """Parameters on the root, in a list, and on modules with more than a weight and a bias."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 2, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.gates = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))])
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.LSTM(4, 3, num_layers=2)
        self.norm = nn.LayerNorm(4)


def test_root_parameters_lists_attention_and_recurrence_form_the_layers_of_their_owners():
    found = layers_of(Vision())
    assert list(found) == ["", "gates", "attention", "recurrent", "norm"]
    assert found[""] == ["position", "token"]
    assert found["gates"] == ["gates.0", "gates.1"]
    projections = [f"attention.{name}" for name in ("out_proj.weight", "out_proj.bias")]
    assert found["attention"] == ["attention.in_proj_weight", "attention.in_proj_bias", *projections]
    assert len(found["recurrent"]) == 8


def test_the_root_layer_has_the_root_module():
    model = Vision()
    found = make_layers(dict(model.named_parameters()), "module", model)
    assert found[0].module is model
    assert found[1].module is model.gates


def test_without_a_model_the_names_and_the_order_are_the_optimizers(make_model):
    model = make_model()
    head, body = list(model[4].named_parameters("4")), list(model[0].named_parameters("0"))
    optimizer = torch.optim.SGD([{"params": head}, {"params": body}], lr=0.1)
    found = make_layers(named_parameters_of(optimizer, None), "module")
    assert [layer.name for layer in found] == ["4", "0"]
    assert found[0].parameters[0] is model[4].weight
    assert found[0].module is None


def test_only_the_parameters_that_the_optimizer_holds_are_in_layers(make_model):
    model = make_model()
    assert list(layers_of(model, names_from=model[2:])) == ["2", "4"]


def test_two_parameters_with_one_clean_name_are_refused_and_not_merged():
    class Ambiguous(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.module = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"two parameters are called 'weight'.*rename one"):
        layers_of(Ambiguous())


def test_an_unknown_pattern_names_the_near_one():
    with pytest.raises(
        ValueError, match=r"exclude pattern 'conv_1' matches none of 'conv1', 'fc'\. Did you mean 'conv1'\?"
    ):
        check_patterns(["conv_1"], ["conv1", "fc"], "exclude")
    check_patterns(["conv*", "fc"], ["conv1", "fc"], "exclude")
