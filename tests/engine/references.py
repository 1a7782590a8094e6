"""Models that transformers lacks, written plainly from their papers, whole sequences at a time."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class SmallThinkerConfig(SimpleNamespace):
    """`window` 0: all layers see everything and have rope; else every fourth from the first does neither."""


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [heads, tokens, n]"""
    n = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(n) / n)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :n], x[..., n:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class _Layer(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        kv, q = c.num_key_value_heads * c.head_dim, c.num_attention_heads * c.head_dim
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(c.hidden_size, q, bias=False),
                "k_proj": nn.Linear(c.hidden_size, kv, bias=False),
                "v_proj": nn.Linear(c.hidden_size, kv, bias=False),
                "o_proj": nn.Linear(q, c.hidden_size, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(c.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size)
        experts = nn.Module()
        experts.gate_up_proj = nn.Parameter(torch.empty(c.experts, 2 * c.intermediate_size, c.hidden_size))
        experts.down_proj = nn.Parameter(torch.empty(c.experts, c.hidden_size, c.intermediate_size))
        gate = nn.Linear(c.hidden_size, c.experts, bias=False)
        self.mlp = nn.ModuleDict({"gate": gate, "experts": experts})


class SmallThinkerForCausalLM(nn.Module):
    """Song et al. 2025, https://arxiv.org/abs/2507.20984: the router before attention, ReLU-gated experts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.model.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, use_cache: bool = False) -> Any:
        c = self.config
        x = self.model.embed_tokens(tokens[0])
        for i, layer in enumerate(self.model.layers):
            scores = layer.mlp["gate"](x)
            h = norm(x, layer.input_layernorm.weight, c.rms_norm_eps)
            whole = c.window == 0 or i % 4 == 0
            x = x + self._attention(layer.self_attn, h, whole, rope=c.window == 0 or i % 4 > 0)
            h = norm(x, layer.post_attention_layernorm.weight, c.rms_norm_eps)
            x = x + self._experts(layer.mlp["experts"], h, scores)
        logits = self.lm_head(norm(x, self.model.norm.weight, c.rms_norm_eps))
        return SimpleNamespace(logits=logits[None])

    def _attention(self, attn: Any, h: torch.Tensor, whole: bool, rope: bool) -> torch.Tensor:
        c = self.config
        q, k, v = (
            attn[name](h).reshape(len(h), -1, c.head_dim).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if rope:
            q, k = rotate(q, c.rope_theta), rotate(k, c.rope_theta)
        k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        distance = torch.arange(len(h))[:, None] - torch.arange(len(h))
        hidden = (distance < 0) | (not whole) & (distance >= c.window)
        weights = (q @ k.transpose(1, 2) * c.head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        out: torch.Tensor = attn["o_proj"]((weights @ v).transpose(0, 1).flatten(1))
        return out

    def _experts(self, experts: Any, h: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        c = self.config
        top, chosen = scores.topk(c.top, -1)
        weights = top.softmax(-1) if c.softmax else top.sigmoid() / top.sigmoid().sum(-1, keepdim=True)
        out = torch.zeros_like(h)
        for t in range(len(h)):
            for w, e in zip(weights[t], chosen[t], strict=True):
                gate, up = (experts.gate_up_proj[e] @ h[t]).chunk(2)
                out[t] += w * (experts.down_proj[e] @ (F.relu(gate) * up))
        return out
