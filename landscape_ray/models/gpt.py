"""A decoder-only transformer: pre-norm, rotary or learned positions, scaled-dot-product attention, tied or own head.

References:
    Radford et al. 2019 (pre-norm decoder, residual projections scaled by 1/sqrt(2 depth)); Su et al. 2021,
    arXiv 2104.09864 (rotary positions); Xiong et al. 2020, arXiv 2002.04745 (pre-norm); Henry et al. 2020,
    arXiv 2010.04245, and Dehghani et al. 2023, arXiv 2302.05442 (normalised queries and keys); Yang et al. 2022,
    arXiv 2203.03466 (attention scaled by 1/head_size under muP).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from landscape_ray.errors import UserError
from landscape_ray.models.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm
from landscape_ray.models.network import Group, Network
from landscape_ray.models.parametrisation import Role, Rule, ScaledConfig
from landscape_ray.signature import Signature, Tokens

DEFAULT_NUM_HEADS = 4


class GPTConfig(ScaledConfig):
    """The table [train.model] of a sweep file."""

    name: Literal["gpt"] = "gpt"
    """gpt."""
    depth: int = Field(default=4, ge=1, le=256)
    """Number of blocks."""
    width: int = Field(default=64, ge=8, le=65536)
    """Size of the residual stream."""
    num_heads: int | None = Field(default=None, ge=1)
    """Number of attention heads, 4 by default. Wider models have larger heads."""
    head_size: int | None = Field(default=None, ge=1)
    """Size of an attention head, instead of their number. Wider models have more heads."""
    mlp_ratio: int = Field(default=4, ge=1, le=16)
    """Hidden size of the MLP divided by the width."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How a token knows its place: rotated queries and keys, or a table that is added to the embedding."""
    qk_norm: Literal["none", "layer", "rms"] = "none"
    """Normalisation of queries and keys, with a gain that all heads of a block share: no growing attention logits."""
    tied_head: bool = True
    """Whether the output layer shares the token embedding."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of initial weights; those of projections into the residual stream have it divided by
    sqrt(2 depth). 0.02 is usual; under muP it is what is drawn at base_width, and models that are narrow there learn
    faster from about 1 / sqrt(base_width)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the values that are dropped: of the embedding, and of what each attention and each MLP adds."""

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.num_heads or (self.width // self.head_size if self.head_size else DEFAULT_NUM_HEADS)

    @property
    def attention_scale(self) -> float:
        """What scores q . k are multiplied by: 1 / sqrt(size of a head), under muP 1 / size from the base width on.

        Trained queries and keys are aligned, so that q . k grows as the size of a head and not as its root. Where
        `head_size` is given, that size is the same at the base width; else it is base_width / heads there.
        """
        size = self.width / self.heads
        base_size = self.base_width / self.heads if self.parametrisation == "mup" and self.head_size is None else size
        return math.sqrt(base_size / size) / math.sqrt(size)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPTConfig:
        if self.num_heads is not None and self.head_size is not None:
            raise ValueError(
                f"num_heads must not be set together with head_size, got {self.num_heads} and {self.head_size}; "
                "remove one of them"
            )
        if self.head_size is not None and self.width % self.head_size:
            raise ValueError(f"width must be a multiple of head_size, got {self.width} and {self.head_size}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.heads}")
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(
                "width / num_heads must be even for rotary positions, "
                f"got {self.width} / {self.heads}; use positions = 'learned' or other sizes"
            )
        return self

    @model_validator(mode="after")
    def _one_rate_for_a_tied_table(self) -> GPTConfig:
        if self.tied_head and self.parametrisation == "ntk":
            raise ValueError(
                "tied_head must be false with parametrisation = 'ntk', got true; as embedding and as head the table "
                "would need two learning rates"
            )
        return self


def rotary_table(context_length: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles t * 10000^(-2 i / head_size), each (context_length, head_size / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.arange(context_length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (..., T, head_size) with each pair (x_i, x_{i + head_size/2}) rotated by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: GPTConfig, context_length: int) -> None:
        super().__init__()
        self.num_heads, self.scale = config.heads, config.attention_scale
        size = config.width // config.heads
        at = config.at(config.width, config.depth)
        self.qkv = Linear(
            config.width,
            3 * config.width,
            rule=at.rule("hidden", std=config.init_std, base_std=config.init_std, residual=True),
        )
        self.out = Linear(config.width, config.width, rule=_into_residual_stream(config))
        self.q_norm, self.k_norm = None, None
        if config.qk_norm != "none":
            # a gain over channels of a head: how many there are depends on the width only where heads grow with it
            role: Role = "vector" if config.head_size is None else "fixed"
            rule = at.rule(role, std=0.0, base_std=0.0, residual=True)
            self.q_norm, self.k_norm = (
                RMSNorm(size, rule=rule) if config.qk_norm == "rms" else LayerNorm(size, rule=rule, bias=False)
                for _ in range(2)
            )
        self.rotary = config.positions == "rotary"
        self.cos: Tensor
        self.sin: Tensor
        if self.rotary:
            cos, sin = rotary_table(context_length, size)
            # not persistent: a function of the configuration, so checkpoints stay free of it
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return attention of x (B, T, width), same shape; with stacked parameters of (K, B, T, width)."""
        T = x.shape[-2]
        # Cut before heads are told apart: the backward pass puts three (B, T, width) together again, and CUDA's kernel
        # for that knows four axes at most.
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # members and examples are one batch here: attention has no parameters
        q, k, v = (part.flatten(0, -4).transpose(1, 2) for part in (q, k, v))
        if self.rotary:
            cos, sin = self.cos[:T].to(q.dtype), self.sin[:T].to(q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        out: Tensor = self.out(y.transpose(1, 2).reshape(x.shape))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, context_length: int, index: int) -> None:
        super().__init__()
        at = config.at(config.width, config.depth)
        vector = at.rule("vector", std=0.0, base_std=0.0, residual=True)
        hidden = at.rule("hidden", std=config.init_std, base_std=config.init_std, residual=True)
        self.branch_multiplier = at.branch_multiplier
        self.norm1 = LayerNorm(config.width, rule=vector)
        self.attention = Attention(config, context_length)
        self.drop1 = Dropout(config.dropout, salt=2 * index + 1)
        self.norm2 = LayerNorm(config.width, rule=vector)
        self.up = Linear(config.width, config.mlp_ratio * config.width, rule=hidden)
        self.down = Linear(config.mlp_ratio * config.width, config.width, rule=_into_residual_stream(config))
        self.drop2 = Dropout(config.dropout, salt=2 * index + 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x (B, T, width), same shape; stacked likewise."""
        x = torch.add(x, self.drop1(self.attention(self.norm1(x))), alpha=self.branch_multiplier)
        return torch.add(x, self.drop2(self.down(F.gelu(self.up(self.norm2(x))))), alpha=self.branch_multiplier)


def _into_residual_stream(config: GPTConfig) -> Rule:
    """Return the rule of a projection whose output is added to the residual stream, 2 depth of them in all."""
    return config.at(config.width, config.depth).rule(
        "hidden",
        std=config.init_std / math.sqrt(2 * config.depth),
        base_std=config.init_std / math.sqrt(2 * (config.base_depth or config.depth)),
        residual=True,
    )


class GPT(Network):
    """Token indices (B, T) to logits (B, T, vocab_size), or with `num_classes` (B, num_classes) from the last position.

    Stacked parameters take stacked tokens (K, B, T). Dropout is that of branches and embedding only: that of attention
    probabilities would keep the fused attention kernels from being used.

    Initial weights (standard parametrisation) are normal with standard deviation 0.02, projections into the residual
    stream 0.02 / sqrt(2 depth).

    Args:
        config: sizes and options.
        signature: tokens; T is at most their context length.
        generator: draws the initial weights; the global generator is not touched.

    Raises:
        UserError: the signature is not one of tokens.
    """

    stackable = True

    def __init__(self, config: GPTConfig, signature: Signature, generator: torch.Generator) -> None:
        super().__init__(signature)
        if not isinstance(signature, Tokens):
            raise UserError(
                f"model.name must not be 'gpt' for data of {type(signature).__name__.lower()}, which have no tokens; "
                "use 'mlp', or another model that takes them"
            )
        self.config = config
        self.context_length = signature.context_length
        self.last_only = signature.num_classes is not None
        at = config.at(config.width, config.depth)
        table = at.rule("input", std=config.init_std, base_std=config.init_std)
        self.embedding = Embedding(signature.vocab_size, config.width, rule=table)
        learned = config.positions == "learned"
        self.position = Embedding(signature.context_length, config.width, rule=table) if learned else None
        self.drop = Dropout(config.dropout, salt=0)
        self.blocks = nn.ModuleList(Block(config, signature.context_length, index) for index in range(config.depth))
        self.norm = LayerNorm(config.width, rule=at.rule("vector", std=0.0, base_std=0.0))
        self.head = Linear(
            config.width, signature.num_outputs, rule=at.rule("output", std=config.init_std, base_std=config.init_std)
        )
        if self.tied:
            self.head.weight = self.embedding.weight
        self.initialise(generator)

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding: never where outputs are not tokens."""
        return self.config.tied_head and not self.last_only

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits for tokens (B, T), stacked for (K, B, T); see the class.

        Raises:
            UserError: T is above the context length.
        """
        if (T := tokens.shape[-1]) > self.context_length:
            raise UserError(
                f"a sequence must have at most context_length = {self.context_length} tokens, got {T}; cut it, or "
                "train with a longer data.context_length"
            )
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position.weight[..., None, :T, :]  # (1, T, width); stacked (K, 1, T, width)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        if self.last_only:
            x = x[..., -1, :]
        logits: Tensor = self.head(self.norm(x))
        return logits

    def group_of(self, name: str) -> Group:
        """Return the group of the parameter with this name."""
        if name in ("embedding.weight", "position.weight"):
            return "embedding"
        if name == "head.weight":
            return "head"
        return "norm" if "norm" in name else "hidden"

    def forward_flops_per_unit(self) -> float:
        """Return the FLOPs of a forward pass over a full context per token, or per sequence with `num_classes`.

        2 for each weight of the blocks and the head, and for each block two attention products over the causal half:
        a position sees (T + 1) / 2 others on average.
        """
        T = self.context_length
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1)
        attention = self.config.depth * self.config.width * (T + 1)
        per_token = 2.0 * (weights + attention)
        head = 2.0 * self.head.weight.numel()
        return T * per_token + head if self.last_only else per_token + head

    def uses_per_unit(self) -> int:
        """Return 1 per token; with `num_classes` a unit is a sequence, and weights are used at each position."""
        return self.context_length if self.last_only else 1
