"""A small decoder-only transformer for text, byte by byte, with the layout of GPT-2.

Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3: normalisation before attention
and before the feed-forward part, one more after the last block, learned positions, and output weights that are those
of the embedding (Press and Wolf 2017, arXiv 1608.05859).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models import check_sizes, seeded

DEVIATION = 0.1
"""Standard deviation of the initial embeddings and positions. PyTorch's own, 1, is too much for weights that give the
scores too; GPT-2's 0.02 is for its width of 768 and more."""


class Attention(nn.Module):
    """Multi-head self-attention: each head mixes the values of other places by softmax(q·k / √(width / heads)).

    ``causal``: a place sees those before it alone.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix the places; shape (n, places, width), before and after."""
        split = self.query_key_value(hidden).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (n, heads, places, width / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """The same by four matrices without biases, so that each part can have a rate of its own. 4 w² parameters."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix the places; shape (n, places, width), before and after."""
        parts = (part(hidden).unflatten(2, (self.heads, -1)) for part in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in parts)  # each (n, heads, places, width / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x ← x + attention(norm1(x)); x ← x + contract(gelu(expand(norm2(x)))). 12 w² + 13 w parameters at width w.

    With separate attention 4 w fewer.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, separate: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = (SeparateAttention if separate else Attention)(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the block; shape (n, places, width), before and after."""
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.contract(functional.gelu(self.expand(self.norm2(hidden))))


def blocks(depth: int, width: int, heads: int, *, causal: bool, separate: bool = False) -> nn.ModuleList:
    """Chain blocks, or refuse heads that do not divide the width."""
    if width % heads:
        raise UsageError(f"heads={heads!r} with width={width!r}: use a number of heads that divides the width")
    return nn.ModuleList(Block(width, heads, causal=causal, separate=separate) for _ in range(depth))


class TransformerLanguageModel(nn.Module):
    """Embedding and positions, causal blocks, normalisation, and scores by the embedding's own weights.

    Modules that own parameters: embedding, position, six a block, norm. ``head`` shares ``embedding.weight``, which is
    one parameter, and has none of its own. v w + c w + depth (12 w² + 13 w) + 2 w parameters for a vocabulary of v,
    a context of c and a width w: 112,384 with the defaults. ``separate`` takes 4 w depth of these away: each block has
    matrices of its own for queries, keys, values and output. ``tied=False`` adds v w: the head has its own weights.
    """

    def __init__(
        self,
        seed: int,
        *,
        vocabulary: int = 128,
        context: int = 64,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        separate: bool = False,
        tied: bool = True,
    ) -> None:
        check_sizes(vocabulary=vocabulary, context=context, width=width, depth=depth, heads=heads)
        super().__init__()
        with seeded(seed):
            self.embedding = nn.Embedding(vocabulary, width)
            self.position = nn.Embedding(context, width)
            for table in (self.embedding, self.position):
                nn.init.normal_(table.weight, std=DEVIATION)
            self.blocks = blocks(depth, width, heads, causal=True, separate=separate)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """Score what follows each of int64 symbols, shape (n, length): (n, length, vocabulary)."""
        if symbols.shape[1] > len(self.position.weight):
            raise UsageError(f"length={symbols.shape[1]}: use at most the context, {len(self.position.weight)}")
        hidden = self.embedding(symbols) + self.position.weight[: symbols.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))
