"""LayerDecay: depths from names, and the warning where names do not tell them."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import layerwise
from layerwise.lab.models.resnet import ResNet
from layerwise.lab.models.vgg import VGG19
from layerwise.lab.models.vit import VisionTransformer
from layerwise.rules import Constant, LayerDecay, chain


def linear():
    return nn.Linear(4, 4)


def mlp(*widths):
    layers = [module for pair in pairwise(widths) for module in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def block():
    return nn.ModuleDict({"norm": nn.LayerNorm(4), "query": linear(), "mlp": mlp(4, 8, 4)})


def named(**modules):
    return nn.ModuleDict(modules)


def attach(model, rule=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return layerwise.LayerwiseLR(optimizer, rule or LayerDecay(0.5), model)


def transformer(kind, **sizes):
    """Build a network of the transformers library."""
    transformers = pytest.importorskip("transformers")
    name, configuration = kind
    return getattr(transformers, name)(getattr(transformers, configuration)(**sizes))


HIDDEN = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}

TOWERS = {"text_config": HIDDEN, "vision_config": HIDDEN, "projection_dim": 4}
SEQUENCES = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 9, "encoder_ffn_dim": 8}

PLAIN = {
    "linear": linear,
    "a sequence": lambda: mlp(4, 8, 8, 2),
    "a sequence with a sequence as head": lambda: named(features=mlp(4, 8, 8), classifier=mlp(8, 8, 2)),
    "names without numbers": lambda: named(conv1=linear(), conv2=linear(), fc1=linear(), fc2=linear()),
    "fc before another name": lambda: named(fc=linear(), out=linear()),
    "blocks": lambda: named(embedding=nn.Embedding(3, 4), blocks=nn.ModuleList([block(), block()]), head=linear()),
    "experts": lambda: named(
        embed=linear(),
        layers=nn.ModuleList(
            named(router=linear(), experts=nn.ModuleList(named(w1=linear(), w2=linear()) for _ in range(2)))
            for _ in range(2)
        ),
    ),
    "VGG": lambda: VGG19(0, width=2),
    "vision transformer": lambda: VisionTransformer(0),
    "PyTorch's encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
    "ViT": lambda: transformer(("ViTForImageClassification", "ViTConfig"), **HIDDEN, image_size=8, patch_size=4),
    "BERT": lambda: transformer(("BertForSequenceClassification", "BertConfig"), **HIDDEN, vocab_size=9),
    "RoBERTa": lambda: transformer(("RobertaForMaskedLM", "RobertaConfig"), **HIDDEN, vocab_size=9),
    "GPT-2": lambda: transformer(("GPT2LMHeadModel", "GPT2Config"), n_layer=2, n_embd=8, n_head=2, vocab_size=9),
    "Llama": lambda: transformer(("LlamaForCausalLM", "LlamaConfig"), **HIDDEN, vocab_size=9),
    "CLIP": lambda: transformer(("CLIPModel", "CLIPConfig"), **TOWERS),
    "BART": lambda: transformer(
        ("BartModel", "BartConfig"),
        **SEQUENCES,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    ),
    "T5": lambda: transformer(
        ("T5Model", "T5Config"), num_layers=2, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=9
    ),
    "Swin": lambda: transformer(
        ("SwinModel", "SwinConfig"), embed_dim=8, depths=[2, 2], num_heads=[2, 2], image_size=32, window_size=2
    ),
    "ResNet of transformers": lambda: transformer(
        ("ResNetModel", "ResNetConfig"), embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"
    ),
    "ResNet": lambda: ResNet(18, 0, width=4),
    "PyTorch's decoder": lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
    "a numbered stem": lambda: named(stem=mlp(4, 4, 4), blocks=nn.ModuleList([block(), block()]), head=linear()),
    "two heads in a list": lambda: named(
        embed=linear(), blocks=nn.ModuleList([block(), block()]), heads=nn.ModuleList([linear(), linear()])
    ),
    "a list of heads alone": lambda: named(conv1=linear(), conv2=linear(), heads=nn.ModuleList([linear(), linear()])),
}

DOUBTFUL = {
    "OPT": (
        lambda: transformer(
            ("OPTForCausalLM", "OPTConfig"),
            hidden_size=8,
            num_attention_heads=2,
            num_hidden_layers=2,
            ffn_dim=8,
            vocab_size=9,
            word_embed_proj_dim=8,
        ),
        "final_layer_norm",
    ),
    "sequences in a sequence": (lambda: nn.Sequential(mlp(4, 4, 4), mlp(4, 4, 4)), "numbers at two levels"),
    "a backbone in a sequence": (
        lambda: nn.Sequential(named(blocks=nn.ModuleList([block(), block()])), linear()),
        "several numbered stacks",
    ),
    "numbers in words": (
        lambda: named(**{f"block_{i}": named(a=linear(), b=linear()) for i in range(2)}),
        "numbers within words",
    ),
    "twin towers without numbers": (
        lambda: named(left=named(a=linear(), b=linear()), right=named(a=linear(), b=linear())),
        "layers of the same names",
    ),
    "actor and critic": (lambda: named(actor=mlp(4, 4, 2), critic=mlp(4, 4, 1)), "several numbered stacks"),
    "head first": (
        lambda: named(head=linear(), blocks=nn.ModuleList([block(), block()])),
        "'head' by name next to the loss",
    ),
    "head first, no numbers": (
        lambda: named(classifier=linear(), first=linear(), second=linear()),
        "'classifier' by name next to the loss",
    ),
    "two heads, no numbers": (
        lambda: named(body=linear(), policy_head=linear(), value_head=linear()),
        "'policy_head' by name next to the loss",
    ),
    "two heads in a list called head": (
        lambda: named(blocks=nn.ModuleList([block(), block()]), head=nn.ModuleList([nn.Linear(4, 2) for _ in "ab"])),
        "several numbered stacks",
    ),
    "a sequence and layers after it": (
        lambda: named(features=mlp(4, 4, 4), fc1=linear(), fc2=linear()),
        "'fc1', 'fc2' have no number",
    ),
    "embeddings last": (
        lambda: named(blocks=nn.ModuleList([block(), block()]), patch_embed=linear()),
        "'patch_embed' by name next to the input",
    ),
    "blocks out of order": (
        lambda: named(blocks=nn.ModuleDict({"1": block(), "0": block()})),
        "not in their order",
    ),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_plain_names_give_no_warning(make):
    attach(make())


@pytest.mark.parametrize(("make", "reason"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_doubtful_names_give_a_warning_with_the_depths(make, reason):
    with pytest.warns(UserWarning, match="leave room for doubt") as caught:
        adapter = attach(make())
    (warning,) = caught
    text, head, *table = str(warning.message).splitlines()
    assert warning.filename == __file__
    assert reason in text
    assert head.split() == ["depth", "factor", "layers"]
    factors = adapter.layer_table()
    assert [int(row.split()[0]) for row in table] == sorted({int(row.split()[0]) for row in table})
    assert len(table) <= len(factors)
    assert table[-1].split()[1] == "1"


@pytest.mark.parametrize(("make", "reason"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_depths_that_are_given_leave_no_doubt(make, reason):
    attach(make(), LayerDecay(0.5, depth=lambda name: len(name)))


def test_the_remedy_gives_both_heads_the_full_rate():
    model = named(body=nn.ModuleList([linear(), linear()]), heads=nn.ModuleList([linear(), linear()]))
    depth = {"body.0": 0, "body.1": 1, "heads.0": 2, "heads.1": 2}.__getitem__
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.5, depth=depth), model)
    optimizer.step()
    assert adapter.get_last_factors() == {"body.0": 0.25, "body.1": 0.5, "heads.0": 1.0, "heads.1": 1.0}


COMBINED = {
    "bounds": lambda rule: {"rule": rule, "bounds": (0.1, 1)},
    "chain": lambda rule: {"rule": chain(Constant({"*": 1.0}), rule)},
}


@pytest.mark.parametrize("combine", COMBINED.values(), ids=COMBINED)
def test_a_combined_rule_warns_as_well(combine):
    model = nn.Sequential(mlp(4, 4, 4), mlp(4, 4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="leave room for doubt"):
        layerwise.LayerwiseLR(optimizer, model=model, **combine(LayerDecay(0.5)))


def test_stepping_in_backward_warns_as_well():
    model = nn.Sequential(mlp(4, 4, 4), mlp(4, 4, 4))
    with pytest.warns(UserWarning, match="leave room for doubt") as caught:
        layerwise.step_in_backward(torch.optim.SGD(model.parameters(), lr=0.1), model, LayerDecay(0.5))
    assert caught[0].filename == __file__


def test_a_warning_comes_once_and_not_in_steps():
    model = nn.Sequential(mlp(4, 4, 4), mlp(4, 4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="room for doubt"):
        layerwise.LayerwiseLR(optimizer, LayerDecay(0.5), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()


def test_diagnose_prints_the_depths_and_no_warning():
    model = named(embedding=linear(), blocks=nn.ModuleList([block(), block()]), head=linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = layerwise.diagnose(optimizer, model, LayerDecay(0.5), seconds=0)
    table = [line.split() for line in text.splitlines() if line.startswith("    ")]
    assert table == [
        ["0", "0.125", "embedding"],
        ["1", "0.25", "blocks.0.norm,", "…", "blocks.0.mlp.2", "(4)"],
        ["2", "0.5", "blocks.1.norm,", "…", "blocks.1.mlp.2", "(4)"],
        ["3", "1", "head"],
    ]
    assert "problems  none found" in text


def test_diagnose_prints_doubts_as_problems():
    model = named(head=linear(), blocks=nn.ModuleList([block(), block()]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = layerwise.diagnose(optimizer, model, LayerDecay(0.5), seconds=0)
    assert "problem   LayerDecay takes the depths from the layers' names" in text
    assert text.count("depth  factor") == 1
    assert "depth  factor" in layerwise.diagnose(optimizer, model, LayerDecay(0.5, depth=len), seconds=0)
    assert "depth  factor" not in layerwise.diagnose(optimizer, model, seconds=0)
