"""What is printed before training, and that telling it changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import LARS, ByRole, Constant, Directionality, GradientAmplification, LayerDecay


@pytest.fixture
def printed(capsys):
    """Return a function that runs `diagnose` and returns its text, which it must also have printed."""

    def run(*arguments, **named):
        text = layerwise.diagnose(*arguments, **named)
        assert capsys.readouterr().out == text + "\n"
        return text

    return run


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_layers_are_listed_with_their_size_rate_and_decay(make_model, printed):
    model = make_model()
    groups = layerwise.param_groups(model)
    groups[1]["lr"] = 0.5
    groups[2]["weight_decay"] = 0.01
    text = printed(torch.optim.SGD(groups, lr=0.1), model)
    assert text.splitlines()[0] == "LayerAdaptive on SGD: 3 layers, 6 parameter tensors, 47 numbers"
    assert line_of(text, "0 ").split() == ["0", "2", "24", "0.1", "0", "other", "0"]
    assert line_of(text, "2 ").split() == ["2", "2", "15", "0.5", "0", "other", "1"]
    assert line_of(text, "4 ").split() == ["4", "2", "8", "0.1", "0.01", "other", "2"]
    assert "problems  none found" in text


@pytest.mark.parametrize(
    ("kind", "options", "place", "reason"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "gradient", "inside the momentum"),
        (torch.optim.SGD, {}, "lr", "for SGD as it is set, the same as multiplying the gradient"),
        (torch.optim.Adam, {}, "lr", "Adam divides out what multiplies the gradient"),
        (torch.optim.Rprop, {}, "update", "Rprop reads its rate only when it creates its step sizes"),
    ],
    ids=["momentum", "plain descent", "Adam", "Rprop"],
)
def test_it_prints_where_the_factor_acts_and_its_cost(make_model, printed, kind, options, place, reason):
    model = make_model()
    text = printed(kind(model.parameters(), lr=0.1, **options), model)
    assert line_of(text, "acts on").startswith(f"acts on   {place!r}: ")
    assert reason in line_of(text, "because")
    assert ("scaled writes" in line_of(text, "route")) == (place == "update")
    assert "1 pass over the gradients" in line_of(text, "costs")


def test_the_rule_and_its_arguments_decide(make_model, printed):
    model = make_model()
    text = printed(torch.optim.SGD(model.parameters(), lr=0.1), model, LARS(), apply="update")
    assert text.startswith("LARS on SGD: 6 layers")
    assert "acts on   'update'" in text


def test_it_prints_parameters_outside_frozen_missing_or_without_effect(printed):
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 1), "aside": nn.Linear(1, 1)})
    model["body"].requires_grad_(False)
    stranger = nn.Parameter(torch.zeros(1))
    held = [*model["body"].parameters(), *model["head"].parameters(), stranger]
    text = printed(torch.optim.AdamW(held), model, apply="gradient")
    assert line_of(text, "body").endswith("frozen")
    assert not line_of(text, "head").endswith("frozen")
    assert "1 parameter tensor of the optimizer in no layer; the factor there is 1" in text
    assert "2 trainable parameters not in the optimizer: aside.weight, aside.bias" in text
    assert "AdamW divides by the size of the gradients it has seen" in text
    assert "none found" not in text


def test_it_notes_decoupled_decay_that_a_factor_scales(make_model, printed):
    model = make_model()
    assert "decoupled weight decay" in printed(torch.optim.AdamW(model.parameters()), model)
    assert "decoupled weight decay" not in printed(torch.optim.AdamW(model.parameters(), weight_decay=0), model)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        self.norm = nn.LayerNorm(4)


def transformer(blocks):
    parts = {"embed_tokens": nn.Embedding(8, 4), "layers": nn.ModuleList(Block() for _ in range(blocks))}
    return nn.ModuleDict({**parts, "norm": nn.LayerNorm(4), "lm_head": nn.Linear(4, 8)})


@pytest.mark.parametrize("rule", [None, LARS(), ByRole("blockwise"), LayerDecay(0.5)], ids=repr)
def test_every_rule_shows_role_and_depth_of_each_layer(printed, rule):
    model = transformer(2)
    text = printed(torch.optim.AdamW(model.parameters()), model, rule, layers="module")
    rows = {line.split()[0]: line.split()[5:] for line in text.split("\n\n")[1].splitlines()}
    assert rows == {
        "layer": ["role", "depth"],
        "embed_tokens": ["embedding", "0"],
        "layers.0.attn.qkv": ["qkv", "1"],
        "layers.0.attn.proj": ["vo", "1"],
        "layers.0.mlp.fc1": ["ffn", "1"],
        "layers.0.mlp.fc2": ["ffn", "1"],
        "layers.0.norm": ["norm", "1"],
        "layers.1.attn.qkv": ["qkv", "2"],
        "layers.1.attn.proj": ["vo", "2"],
        "layers.1.mlp.fc1": ["ffn", "2"],
        "layers.1.mlp.fc2": ["ffn", "2"],
        "layers.1.norm": ["norm", "2"],
        "norm": ["norm", "3"],
        "lm_head": ["head", "3"],
    }
    assert max(map(len, text.split("\n\n")[1].splitlines())) <= 80


def test_a_rule_told_other_roles_or_depths_shows_these(make_model, printed):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    by_role = ByRole({"mine": 2.0}, role={"0.*": "mine"})
    assert line_of(printed(optimizer, model, by_role), "0.weight").split()[-2:] == ["mine", "0"]
    decay = LayerDecay(0.5, depth=lambda name: 7 - int(name[0]))
    assert line_of(printed(optimizer, model, decay), "2 ").split()[-2:] == ["other", "5"]


def test_a_doubtful_depth_is_marked_and_explained_once(printed):
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "head": nn.Linear(2, 2), "last": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reason = "'head' by name next to the loss, but not last in the model's order"
    for rule, kind in ((None, "note"), (LayerDecay(0.5), "problem")):
        text = printed(optimizer, model, rule)
        assert line_of(text, "layer").split()[-1] == "depth?"
        assert text.count(reason) == 1
        assert reason in line_of(text, kind)
    assert "depth?" not in printed(optimizer, model, LayerDecay(0.5, depth=len))


def test_a_long_network_is_listed_by_role_too(printed):
    model = transformer(12)
    optimizer = torch.optim.AdamW(model.parameters())
    text = printed(optimizer, model)
    assert text.split("\n\n")[2].splitlines() == [
        "role       depth  number  layers",
        "embedding      0       1  embed_tokens",
        "qkv         1…12      12  layers.0.attn.qkv … 11.attn.qkv",
        "vo          1…12      12  layers.0.attn.proj … 11.attn.proj",
        "ffn         1…12      24  layers.0.mlp.fc1 … 11.mlp.fc2",
        "norm        1…13      13  layers.0.norm … norm",
        "head          13       1  lm_head",
    ]
    assert "\nrole " not in printed(optimizer, model, most=100)
    # The rule's own table has the roles already.
    assert printed(optimizer, model, ByRole("blockwise")).count("\nrole ") == 1


def test_lines_of_roles_keep_to_80_columns_and_to_the_ends_of_names(printed):
    model = nn.ModuleDict({"a" * 60: transformer(2), "b" * 60: transformer(2)})
    table = printed(torch.optim.AdamW(model.parameters()), model, most=3).split("\n\n")[2].splitlines()
    assert max(map(len, table)) <= 80
    assert re.search(r" …a+\.layers\.0\.attn\.proj … …b+\.layers\.1\.attn\.proj$", table[3])


def test_a_long_list_is_cut_and_names_the_argument(printed):
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    optimizer = torch.optim.SGD(model.parameters())
    assert "… and 10 more (most=50 lists all)" in printed(optimizer, model)
    assert "more (most=" not in printed(optimizer, model, most=50)


def test_frozen_layers_come_last_in_a_cut_list(printed):
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    model[:48].requires_grad_(False)
    text = printed(torch.optim.SGD(model.parameters()), model, most=3)
    listed = [line.split()[0] for line in text.splitlines()[3:6]]
    assert listed == ["48", "49", "0"]
    assert "… and 47 more" in text


def test_long_names_are_whole_since_their_ends_tell_layers_apart(printed):
    model = nn.Module()
    model.deep = nn.ModuleDict({"part" * 20: nn.ModuleDict({"first": nn.Linear(1, 1), "last": nn.Linear(1, 1)})})
    text = printed(torch.optim.SGD(model.parameters()), model)
    rows = text.splitlines()[2:5]
    assert [line.split()[0] for line in rows[1:]] == [f"deep.{'part' * 20}.{end}" for end in ("first", "last")]
    assert len({len(line) for line in rows}) == 1


def test_the_root_layer_has_a_name_that_can_be_read(printed):
    model = nn.Linear(2, 1)
    assert line_of(printed(torch.optim.SGD(model.parameters()), model), "(root)").split()[1:3] == ["2", "3"]


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (torch.optim.LBFGS, {}, "use a first-order optimizer"),
        (torch.optim.Rprop, {"apply": "lr"}, "use apply='update'"),
        (torch.optim.SGD, {"exclude": ["fc"]}, "exclude pattern 'fc' matches none of '0', '2', '4'"),
        (torch.optim.SGD, {"rule": LARS}, "LARS is a class"),
    ],
    ids=["LBFGS", "the rate of Rprop", "an unknown layer", "a rule class"],
)
def test_what_cannot_be_attached_is_printed_and_does_not_raise(make_model, printed, kind, arguments, words):
    model = make_model()
    text = printed(kind(model.parameters()), model, **arguments)
    assert "cannot be attached" in text
    assert words in text


def test_what_is_no_optimizer_raises():
    with pytest.raises(TypeError, match=r"no torch\.optim\.Optimizer"):
        layerwise.diagnose("sgd", nn.Linear(1, 1))


def test_what_is_no_model_raises():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        layerwise.diagnose(torch.optim.SGD(nn.Linear(1, 1).parameters()), "net")


def test_nothing_changes_not_even_beside_an_adapter(make_model, train, weights, assert_same_bits, printed):
    results = []
    for diagnosed in (False, True):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        layerwise.LayerwiseLR(optimizer, Constant({"2": 3.0}), model)
        before = dict(vars(optimizer)), dict(optimizer._optimizer_step_pre_hooks), optimizer.state_dict()
        if diagnosed:
            printed(optimizer, model)
        after = dict(vars(optimizer)), dict(optimizer._optimizer_step_pre_hooks), optimizer.state_dict()
        assert before == after
        train(model, optimizer)
        results.append(weights(model))
    assert_same_bits(*results)
    model = make_model()
    bare = torch.optim.SGD(model.parameters())
    assert "none found" in printed(bare, model)
    assert not bare._optimizer_step_pre_hooks
    assert not bare._optimizer_step_post_hooks


def test_a_rule_that_counts_epochs_notes_end_epoch_and_its_analysis(make_model, printed):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    text = printed(optimizer, model, GradientAmplification(Directionality()))
    assert "call adapter.end_epoch() after each" in text
    assert "in epochs of analysis one number a parameter for G" in text


def test_beside_an_adapter_it_does_not_say_to_attach_another(printed):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    next_line = "next      adapter = layerwise.LayerwiseLR(optimizer, rule, model)\n"
    assert (printed(optimizer, model, seconds=0) + "\n").endswith(next_line)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), model)
    assert "next      nothing: an adapter is attached already" in printed(optimizer, model, seconds=0)
    adapter.detach()
    assert (printed(optimizer, model, seconds=0) + "\n").endswith(next_line)


def test_the_reason_for_a_rule_that_scales_rates(make_model, printed):
    model = make_model()
    text = printed(torch.optim.SGD(model.parameters(), lr=0.1), model, Constant({"0": 2.0}))
    assert line_of(text, "because") == "because   the rule scales rates"


@pytest.mark.filterwarnings("ignore:the optimizer's parameters hold no values")
def test_on_a_device_it_names_the_capturable_form(make_model, printed):
    model = make_model().to("meta")
    note = "note      factors are read from the device once a step; capturable=True avoids it, at a launch a tensor"
    assert note in printed(torch.optim.AdamW(model.parameters()), model).splitlines()
    assert note not in printed(torch.optim.AdamW(model.parameters(), capturable=True), model).splitlines()
