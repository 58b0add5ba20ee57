"""The baseline for training: an OLMo2-style model and loop as one writes them in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarlx.config.model import ModelConfig


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class PlainLayer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.q = nn.Linear(c.hidden_size, c.heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=False)
        self.o = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.heads * c.head_dim, eps=c.norm_eps)
        self.k_norm = nn.RMSNorm(c.kv_heads * c.head_dim, eps=c.norm_eps)
        self.gate = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.attention_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, length, count, self.head_dim).transpose(1, 2)

        q = heads(self.q_norm(self.q(x)), self.heads)
        k = heads(self.k_norm(self.k(x)), self.kv_heads)
        v = heads(self.v(x), self.kv_heads)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_norm(self.o(y.transpose(1, 2).reshape(batch, length, -1)))
        return x + self.mlp_norm(self.down(F.silu(self.gate(x)) * self.up(x)))


class PlainModel(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.frequencies = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=c.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(tokens.shape[1]), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


class PlainLoop:
    """AdamW in its fused form, gradient clipping, one micro-batch a step."""

    def __init__(self, config: ModelConfig, samples: Tensor) -> None:
        self.model, self.samples = PlainModel(config), samples
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self) -> Tensor:
        tokens, targets = self.samples[:, :-1], self.samples[:, 1:]
        logits = self.model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()
