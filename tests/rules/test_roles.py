"""Roles of the layers of networks that people train, and the rules that go by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
from layerwise import LayerwiseLR
from layerwise.layers import Layer, make_layers
from layerwise.rules import ByRole, LoRAPlus
from layerwise.rules.roles import roles_of
from layerwise.rules.shapes import shape_of

# Names without .weight, and roles; a name with .bias is one-dimensional, and so is one under "norm".
NANOGPT = {
    "transformer.wte": "embedding",
    "transformer.wpe": "position",
    "transformer.h.0.ln_1": "norm",
    "transformer.h.0.attn.c_attn": "qkv",
    "transformer.h.0.attn.c_proj": "vo",
    "transformer.h.0.ln_2": "norm",
    "transformer.h.0.mlp.c_fc": "ffn",
    "transformer.h.0.mlp.c_proj": "ffn",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}
VIT = {
    "cls_token": "position",
    "pos_embed": "position",
    "reg_token": "position",
    "patch_embed.proj": "stem",
    "blocks.0.norm1": "norm",
    "blocks.0.attn.qkv": "qkv",
    "blocks.0.attn.proj": "vo",
    "blocks.0.ls1.gamma": "norm",
    "blocks.0.norm2": "norm",
    "blocks.0.mlp.fc1": "ffn",
    "blocks.0.mlp.fc2": "ffn",
    "norm": "norm",
    "head": "head",
}
SWIN = {
    "patch_embed.proj": "stem",
    "patch_embed.norm": "norm",
    "layers.0.blocks.0.norm1": "norm",
    "layers.0.blocks.0.attn.relative_position_bias_table": "position",
    "layers.0.blocks.0.attn.qkv": "qkv",
    "layers.0.blocks.0.attn.proj": "vo",
    "layers.0.blocks.0.mlp.fc1": "ffn",
    "layers.1.downsample.norm": "norm",
    "layers.1.downsample.reduction": "other",
    "layers.1.blocks.0.attn.qkv": "qkv",
    "norm": "norm",
    "head.fc": "head",
}
CONVNEXT = {
    "stem.0": "stem",
    "stages.0.blocks.0.gamma": "norm",
    "stages.0.blocks.0.conv_dw": "conv",
    "stages.0.blocks.0.norm": "norm",
    "stages.0.blocks.0.mlp.fc1": "ffn",
    "stages.1.downsample.1": "conv",
    "head.norm": "norm",
    "head.fc": "head",
}
RESNET = {
    "conv1": "conv",
    "bn1": "norm",
    "layer1.0.conv1": "conv",
    "layer1.0.bn1": "norm",
    "layer1.0.downsample.0": "conv",
    "layer4.1.conv2": "conv",
    "fc": "head",
}
HUGGING_FACE = {  # T5, DeBERTa-v2, ConvNeXt and ALBERT
    "encoder.block.0.layer.0.SelfAttention.q.weight": "qk",
    "encoder.block.0.layer.0.SelfAttention.o.weight": "vo",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "ffn",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": "ffn",
    "encoder.layer.0.attention.self.query_proj.weight": "qk",
    "encoder.layer.0.attention.self.value_proj.weight": "vo",
    "encoder.stages.0.layers.0.pwconv1.weight": "ffn",
    "encoder.layers.0.ffn_output.weight": "ffn",
}
FURTHER = {  # T5, Mamba, Segformer of two versions, wav2vec2, and a fused projection beside them
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "position",
    "backbone.layers.0.mixer.in_proj": "other",
    "backbone.layers.0.mixer.out_proj": "other",
    "blocks.0.attn.in_proj": "qkv",
    "segformer.stages.0.blocks.0.attention.q_proj": "qk",
    "decode_head.linear_c.0.proj": "head",
    "decode_head.linear_projections.1.proj": "head",
    "decode_head.linear_fuse": "head",
    "decode_head.batch_norm": "norm",
    "decode_head.classifier": "head",
    "wav2vec2.masked_spec_embed": "position",
}
EXPERTS = {
    "layers.0.attn.wq": "qk",
    "layers.0.attn.wo": "vo",
    "layers.0.block_sparse_moe.gate": "router",
    "layers.0.block_sparse_moe.experts.0.w1": "ffn",
    "layers.0.mlp.gate": "ffn",
}


def layers_named(names: dict[str, str], dimensions: int = 2) -> list[Layer]:
    made: list[Layer] = []
    for name, role in names.items():
        shape = [3] if role == "norm" else [3] * (4 if role == "conv" or "conv" in name else dimensions)
        leaf = name if name.rpartition(".")[2] in ("gamma", "relative_position_bias_table") else f"{name}.weight"
        leaf = name if name in ("cls_token", "pos_embed", "reg_token", "wav2vec2.masked_spec_embed") else leaf
        made.append(Layer(leaf, (torch.zeros(shape),), (leaf,)))
    return made


EVERY = [NANOGPT, VIT, SWIN, CONVNEXT, RESNET, EXPERTS, HUGGING_FACE, FURTHER]


@pytest.mark.parametrize("names", EVERY, ids=list("nvscrehf"))
def test_roles_from_names(names: dict[str, str]) -> None:
    layers = layers_named(names)
    assert dict(zip(names, roles_of(layers), strict=True)) == names


def hugging_face(kind: str) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.device("meta"):
        if kind == "gpt2":
            config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, tie_word_embeddings=True)
            return transformers.GPT2LMHeadModel(config)
        if kind == "bert":
            return transformers.BertForSequenceClassification(transformers.BertConfig(**small))
        if kind == "llama":
            config = transformers.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=False)
            return transformers.LlamaForCausalLM(config)
        if kind == "t5":
            config = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
            return transformers.T5Model(config)
        text, vision = transformers.CLIPTextConfig(**small), transformers.CLIPVisionConfig(**small)
        return transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
        )


EXPECTED: dict[str, dict[str, str]] = {
    "gpt2": {
        "transformer.wte": "embedding",  # tied to the head
        "transformer.wpe": "position",
        "transformer.h.1.attn.c_attn": "qkv",
        "transformer.h.1.attn.c_proj": "vo",
        "transformer.h.1.mlp.c_fc": "ffn",
        "transformer.h.1.mlp.c_proj": "ffn",
        "transformer.ln_f": "norm",
    },
    "bert": {
        "bert.embeddings.word_embeddings": "embedding",
        "bert.embeddings.position_embeddings": "position",
        "bert.embeddings.LayerNorm": "norm",
        "bert.encoder.layer.0.attention.self.query": "qk",
        "bert.encoder.layer.0.attention.self.value": "vo",
        "bert.encoder.layer.0.attention.output.dense": "vo",
        "bert.encoder.layer.0.attention.output.LayerNorm": "norm",
        "bert.encoder.layer.0.intermediate.dense": "ffn",
        "bert.encoder.layer.1.output.dense": "ffn",
        "bert.pooler.dense": "head",
        "classifier": "head",
    },
    "llama": {
        "model.embed_tokens": "embedding",
        "model.layers.0.self_attn.q_proj": "qk",
        "model.layers.0.self_attn.v_proj": "vo",
        "model.layers.0.self_attn.o_proj": "vo",
        "model.layers.0.mlp.gate_proj": "ffn",
        "model.layers.0.mlp.down_proj": "ffn",
        "model.layers.0.input_layernorm": "norm",
        "model.norm": "norm",
        "lm_head": "head",
    },
    "t5": {
        "shared": "embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "position",  # an nn.Embedding
        "encoder.block.0.layer.0.SelfAttention.q": "qk",
        "encoder.block.0.layer.1.DenseReluDense.wi": "ffn",
        "encoder.final_layer_norm": "norm",
    },
    "clip": {
        "text_model.embeddings.token_embedding": "embedding",
        "text_model.embeddings.position_embedding": "position",
        "text_model.encoder.layers.0.self_attn.k_proj": "qk",
        "text_model.encoder.layers.0.self_attn.out_proj": "vo",
        "text_model.encoder.layers.0.mlp.fc1": "ffn",
        "vision_model.embeddings.patch_embedding": "stem",
        "vision_model.pre_layrnorm": "norm",
        "vision_model.encoder.layers.1.mlp.fc2": "ffn",
        "text_projection": "head",
        "visual_projection": "head",
    },
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_roles_of_hugging_faces_networks(kind: str) -> None:
    model = hugging_face(kind)
    layers = make_layers(dict(model.named_parameters()), "module", model)
    found = {layer.name: role for layer, role in zip(layers, roles_of(layers), strict=True)}
    assert {name: found[name] for name in EXPECTED[kind]} == EXPECTED[kind]
    assert "other" not in {role for name, role in found.items() if name}


def test_a_transformer_of_pytorch() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    layers = make_layers(dict(model.named_parameters()), "parameter", model)
    found = {layer.name: role for layer, role in zip(layers, roles_of(layers), strict=True)}
    own = {name.removeprefix("layers.1."): role for name, role in found.items() if name.startswith("layers.1.")}
    assert {own[name] for name in ("self_attn.in_proj_weight", "self_attn.in_proj_bias")} == {"qkv"}
    assert own["self_attn.out_proj.weight"] == own["self_attn.out_proj.bias"] == "vo"
    assert own["linear1.weight"] == own["linear2.bias"] == "ffn"
    assert own["norm2.bias"] == "norm"


def test_a_user_may_say_the_roles() -> None:
    layers = layers_named({"a.x": "other", "a.y": "other"})
    assert roles_of(layers, {"a.x*": "mine"}) == ["mine", "other"]
    assert roles_of(layers, lambda name: "mine" if "y" in name else None) == ["other", "mine"]
    with pytest.raises(ValueError, match="matches none"):
        roles_of(layers, {"b*": "mine"})
    with pytest.raises(TypeError, match="must be a string"):
        roles_of(layers, lambda name: 3)
    rule = ByRole({"mine": 3.0}, role={"a.x*": "mine"})
    assert rule.init(layers, torch.device("cpu"))["_factors"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (5, 3)),
        (nn.Conv2d(6, 4, 3, groups=2), (4, 27)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), (4, 27)),
        (nn.Embedding(7, 3), (7, 3)),
        (nn.LayerNorm(5), (5, 1)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_shapes(module: nn.Module, shape: tuple[int, int]) -> None:
    assert shape_of(Layer("", tuple(module.parameters()), module=module)) == shape


def test_a_conv1d_of_hugging_face_is_read_the_other_way_round() -> None:
    conv: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 3)
    assert shape_of(Layer("", tuple(conv.parameters()), module=conv)) == (5, 3)


# --- ByRole -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class GPT(nn.Module):
    def __init__(self, width: int = 128, blocks: int = 4, vocabulary: int = 128) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.h = nn.ModuleList(Block(width) for _ in range(blocks))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)


def test_the_weighted_mean_of_the_blockwise_ratios() -> None:
    model = GPT()
    layers = make_layers(dict(model.named_parameters()), "parameter", model)
    factors = ByRole("blockwise").init(layers, torch.device("cpu"))["_factors"]
    sizes = torch.tensor([layer.parameters[0].numel() for layer in layers])
    assert sizes.sum() == 840_448
    assert float((factors * sizes).sum() / sizes.sum()) == pytest.approx(6.220225403594274, rel=1e-15)


class NanoChat(nn.Module):
    """The names and kinds of nanochat's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(8, 4), "h": nn.ModuleList([Block(4), Block(4)])})
        self.value_embeds = nn.ModuleDict({"1": nn.Embedding(8, 4)})
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))


def test_the_rates_of_nanochat() -> None:
    model = NanoChat()
    groups = layerwise.param_groups(model, ByRole("nanochat"), lr=0.02, weight_decay=0.0)
    name_of = {id(p): name for name, p in model.named_parameters()}
    rates = {name_of[id(p)]: group["lr"] for group in groups for p in group["params"]}
    expected = {"transformer.wte.weight": 0.2, "value_embeds.1.weight": 0.1, "lm_head.weight": 0.004,
                "resid_lambdas": 0.005, "x0_lambdas": 0.5}  # fmt: skip
    assert rates == pytest.approx({name: expected.get(name, 0.02) for name in rates}, rel=1e-15)
    own = ByRole("nanochat", role={"lm_head*": "wte"})
    layers = make_layers(dict(model.named_parameters()), "parameter", model)
    assert max(layer.name for layer, f in zip(layers, own.init(layers, torch.device("cpu"))["_factors"], strict=True)
               if f == 10) == "lm_head.weight"  # fmt: skip


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "permanent groups"])
def test_by_role_is_permanent_groups_by_hand_to_the_bit(attached: bool) -> None:
    ratios = {"embedding": 10.0, "norm": 0.5, "ffn": 2.0}
    model, alike = GPT(8, 1, 8).double(), GPT(8, 1, 8).double()
    alike.load_state_dict(model.state_dict())
    made: dict[str, Any] = {"weight_decay": 0.1}
    if attached:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **made)
        LayerwiseLR(optimizer, ByRole(ratios), model)
    else:
        groups = layerwise.param_groups(model, ByRole(ratios), lr=0.01, weight_decay=0.1, no_decay=None)
        optimizer = torch.optim.AdamW(groups)
        assert len(groups) == 4
    own = {"wte": 10.0, "ln_1": 0.5, "ln_2": 0.5, "ln_f": 0.5, "mlp": 2.0}
    by_hand = [
        {"params": [p], "lr": 0.01 * next((f for part, f in own.items() if part in name), 1.0)}
        for name, p in alike.named_parameters()
    ]
    theirs = torch.optim.AdamW(by_hand, **made)
    for step in range(5):
        for net, each in ((model, optimizer), (alike, theirs)):
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            each.step()
    assert all(map(torch.equal, model.parameters(), alike.parameters()))


def test_biases_of_a_role_and_of_all() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adapter = LayerwiseLR(optimizer, ByRole("airbench"), model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {n: f for n, f in adapter.get_last_factors().items() if f != 1} == {"1.bias": 64.0}
    adapter.detach()
    adapter = LayerwiseLR(optimizer, ByRole("fixup"), model)
    optimizer.step()
    assert [n for n, f in adapter.get_last_factors().items() if f == 0.1] == ["0.bias", "1.bias", "3.bias"]


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_shared_schedule_is_that_of_the_code(warmup: int) -> None:
    total, largest = 100, 6e-4

    def rate(step: int, ratio: float) -> float:
        """get_lr of train_llama_bw.py, from its description."""
        least = largest / 20
        if step < ratio * warmup:
            return ratio * largest * step / (ratio * warmup)
        share = (step - ratio * warmup) / (total - ratio * warmup)
        return least + 0.5 * (1 + math.cos(math.pi * share)) * (ratio * largest - least)

    model = GPT(8, 1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=largest)
    adapter = LayerwiseLR(optimizer, ByRole("blockwise", schedule="shared", warmup=warmup, total=total), model)
    for step in range(total + 1):
        optimizer.param_groups[0]["lr"] = rate(step, 1.0)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        if step or not warmup:
            rates = adapter.get_last_lr()
            assert rates["wte.weight"] == pytest.approx(rate(step, 10.0), rel=1e-12)
            assert rates["ln_f.weight"] == pytest.approx(rate(step, 1.0), rel=1e-12)
    assert rates["wte.weight"] == pytest.approx(rates["ln_f.weight"], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ratios": "blockwide"}, "allowed: 'blockwise'"),
        ({"ratios": {}}, "give at least one role"),
        ({"ratios": {"embeding": 2}}, "allowed: bias, and with or without .bias embedding"),
        ({"ratios": {"ffn": -1}}, "finite number of at least 0"),
        ({"ratios": "blockwise", "schedule": "cosine"}, "allowed: 'constant', 'shared'"),
        ({"ratios": "blockwise", "schedule": "shared", "warmup": 10, "total": 100}, "above the longest warm-up"),
        ({"ratios": "blockwise", "schedule": "shared"}, "the number of all steps"),
    ],
)
def test_arguments_out_of_their_range(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ByRole(**arguments)
    with pytest.raises(TypeError, match="a preset or a mapping"):
        ByRole(3)


def test_the_table_says_which_roles_have_no_ratio() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
    lines = ByRole("blockwise").table(make_layers(dict(model.named_parameters()), "parameter", model))
    assert lines[1].split() == ["embedding", "10", "0.weight"]
    assert lines[2].endswith("1.weight, 1.bias  no ratio")
    optimizer = torch.optim.AdamW(model.parameters())
    assert LayerwiseLR(optimizer, ByRole("blockwise"), model).roles == {
        "0.weight": "embedding",
        "1.weight": "other",
        "1.bias": "other",
    }


# --- LoRA+ ------------------------------------------------------------------------------------------------------------


def test_lora_plus_is_that_of_peft() -> None:
    peft: Any = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def made() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], bias="all")
        return peft.get_peft_model(model, config).double()

    model, alike = made(), made()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    adapter = LayerwiseLR(optimizer, LoRAPlus(16), model)
    theirs = create_loraplus_optimizer(alike, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16, weight_decay=0.0)
    for step in range(5):
        for net, each in ((model, optimizer), (alike, theirs)):
            generator = torch.Generator().manual_seed(step)
            each.zero_grad()
            net(torch.randn(8, 4, generator=generator, dtype=torch.float64)).square().mean().backward()
            each.step()
    for ours, other in zip(model.parameters(), alike.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-15)
    factors = adapter.get_last_factors()
    assert {name.split("lora_")[1][0] if "lora_" in name else "bias": f for name, f in factors.items()} == {
        "A": 1.0,
        "B": 16.0,
        "bias": 16.0,
    }


def test_a_network_without_lora_is_refused() -> None:
    model = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="attach it to the model that PEFT has made"):
        LayerwiseLR(torch.optim.AdamW(model.parameters()), LoRAPlus(), model)
