"""Attention over paged KV for the torch executor: scores are materialised, one sequence at a time."""

import math
from dataclasses import dataclass

import torch

from ktransformers.engine.program import Attention, MlaAttention


@dataclass(frozen=True)
class Span:
    """A sequence's rows of the batch, and where its positions lie in the pool."""

    begin: int
    end: int
    cells: torch.Tensor
    """[positions so far] cells of the pool, by position"""

    @property
    def context(self) -> int:
        """Positions before this step."""
        return len(self.cells) - (self.end - self.begin)


def attention(
    op: Attention,
    spans: list[Span],
    pool: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """pool [2, cells, kv heads, head_dim]; q [T, heads * head_dim], k and v [T, kv_heads * head_dim]; sinks
    [heads]. Gives [T, heads * head_dim]."""
    keys, values = pool
    q = q.reshape(-1, op.kv_heads, op.heads // op.kv_heads, op.head_dim)
    k, v = (x.reshape(-1, op.kv_heads, op.head_dim) for x in (k, v))
    # The scale of the native executor's queries, whose scores are logarithms to base 2.
    queries = _as(pool.dtype, q, op.scale / op.softcap if op.softcap else op.scale * math.log2(math.e))
    out = torch.empty_like(q)
    for span in spans:
        here = slice(span.begin, span.end)
        new = span.cells[span.context :]
        keys[new], values[new] = k[here].to(keys.dtype), v[here].to(values.dtype)
        scores = torch.einsum("tkgd,ckd->kgtc", queries[here], keys[span.cells].float()) * op.scale
        scores = softcap(scores, op.softcap).masked_fill(_hidden(span, op.window, op.chunk), -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1)
        if sinks is not None:
            total += (sinks.reshape(op.kv_heads, -1, 1) - top.squeeze(-1)).exp()
        sums = torch.einsum("kgtc,ckd->tkgd", _as(keys.dtype, weights), values[span.cells].float())
        out[here] = sums / total.permute(2, 0, 1).unsqueeze(-1)
    return out.flatten(1)


def _as(dtype: torch.dtype, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x, but where keys are bfloat16 what is multiplied with them is, too: x after that scale."""
    return (x * scale).to(dtype).float() / scale if dtype == torch.bfloat16 else x


def mla_attention(
    op: MlaAttention,
    spans: list[Span],
    pool: torch.Tensor,
    q_latent: torch.Tensor,
    q: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
) -> torch.Tensor:
    """pool [cells, latent + rope]; values as MlaAttention says. Gives [T, heads * latent]."""
    n = latent.shape[-1]
    turned = q.reshape(len(q), op.heads, -1)[..., -rope.shape[-1] :]
    queries = torch.cat((q_latent.reshape(-1, op.heads, n), turned), -1)
    rows = torch.cat((latent, rope), -1)
    out = torch.empty(len(q), op.heads, n, device=q.device)
    for span in spans:
        here = slice(span.begin, span.end)
        pool[span.cells[span.context :]] = rows[here].to(pool.dtype)
        seen = pool[span.cells].float()
        scores = torch.einsum("thd,cd->htc", queries[here], seen) * op.scale
        weights = scores.masked_fill(_hidden(span, 0, 0), -torch.inf).softmax(-1)
        out[here] = torch.einsum("htc,cd->thd", weights, seen[:, :n])
    return out.flatten(1)


def _hidden(span: Span, window: int, chunk: int) -> torch.Tensor:
    """[tokens, positions so far]: which positions a token does not see."""
    seen = torch.arange(len(span.cells), device=span.cells.device)
    now = seen[span.context :, None]
    hidden = seen > now
    if window:
        hidden |= seen <= now - window
    if chunk:
        hidden |= seen < now - now % chunk
    return hidden


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap); cap 0 is none."""
    return torch.tanh(x / cap) * cap if cap > 0 else x
