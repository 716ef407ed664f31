"""A decoder-only transformer: pre-norm, rotary or learned positions, scaled-dot-product attention, tied head.

References:
    Radford et al. 2019 (pre-norm decoder, residual projections scaled by 1/sqrt(2 depth)); Su et al. 2021,
    arXiv 2104.09864 (rotary positions); Xiong et al. 2020, arXiv 2002.04745 (pre-norm).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from landscape_ray.config import Model

INIT_STD = 0.02


class GPTConfig(Model):
    """The table [train.model] of a sweep file."""

    name: Literal["gpt"] = "gpt"
    depth: int = Field(default=4, ge=1, le=256)
    """Number of blocks."""
    width: int = Field(default=64, ge=8, le=65536)
    """Size of the residual stream."""
    num_heads: int = Field(default=4, ge=1)
    mlp_ratio: int = Field(default=4, ge=1, le=16)
    """Hidden size of the MLP divided by the width."""
    positions: Literal["rotary", "learned"] = "rotary"
    tied_head: bool = True
    """Whether the output layer shares the token embedding."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPTConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
        if self.positions == "rotary" and (self.width // self.num_heads) % 2:
            raise ValueError(
                "width / num_heads must be even for rotary positions, "
                f"got {self.width} / {self.num_heads}; use positions = 'learned' or other sizes"
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
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.rotary = config.positions == "rotary"
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.cos: Tensor
        self.sin: Tensor
        if self.rotary:
            cos, sin = rotary_table(context_length, config.width // config.num_heads)
            # not persistent: a function of the configuration, so checkpoints stay free of it
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return attention of x (B, T, width), same shape."""
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            cos, sin = self.cos[:T].to(q.dtype), self.sin[:T].to(q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, width))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, context_length: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config, context_length)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x (B, T, width), same shape."""
        x = x + self.drop(self.attention(self.norm1(x)))
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


class GPT(nn.Module):
    """The whole model: (B, T) token indices to (B, T, vocab_size) logits.

    Args:
        config: sizes and options.
        vocab_size: number of tokens.
        context_length: the longest T.
        generator: draws the initial weights; the global generator is not touched.
    """

    def __init__(self, config: GPTConfig, *, vocab_size: int, context_length: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.context_length = context_length
        # The layers' own initial draws come from the global generator and are overwritten below: it must not advance.
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(vocab_size, config.width)
            self.position = nn.Embedding(context_length, config.width) if config.positions == "learned" else None
            self.drop = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config, context_length) for _ in range(config.depth))
            self.norm = nn.LayerNorm(config.width)
            self.head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal(0, 0.02) weights; projections into the residual stream divided by sqrt(2 depth); norms at identity."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.depth)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = residual_std if name.endswith(("out.weight", "down.weight")) else INIT_STD
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, vocab_size) for tokens (B, T)."""
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def num_params(self, *, embedding: bool = True) -> int:
        """Return the number of parameters; without `embedding`, less the token and position tables and an untied head.

        A tied head is counted once, with the embedding.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        if embedding:
            return total
        tables = self.embedding.weight.numel() + (self.position.weight.numel() if self.position is not None else 0)
        return total - tables - (0 if self.config.tied_head else self.head.weight.numel())

    def flops_per_token(self) -> float:
        """Return training FLOPs per token: 3 x forward; a multiply-add is 2 FLOPs.

        Counted: every matrix product with weights (the head too) and the two attention products over the causal half
        of a full context. Not counted: norms, activations, softmax, the embedding look-up.
        """
        weights = sum(p.numel() for b in self.blocks for p in b.parameters() if p.dim() > 1) + self.head.weight.numel()
        attention = (
            self.config.depth * self.config.width * (self.context_length + 1)
        )  # 2 products x mean length (T+1)/2
        return 3.0 * 2.0 * (weights + attention)
