"""Short convolutions and the gated delta rule with torch, one sequence and one token at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ktransformers.engine.program import DeltaRule, ShortConv, StateShape


@dataclass(frozen=True)
class Run:
    """Rows [begin, end) of one sequence. Its state is in `slot`, zeros if it is `fresh`; a copy of the state
    before row `keep_before` goes to slot `keep`, or nowhere (-1)."""

    begin: int
    end: int
    fresh: bool
    slot: int
    keep: int
    keep_before: int


class States:
    """The states of all slots on a device, float32."""

    def __init__(self, shape: StateShape, slots: int, device: torch.device) -> None:
        s = shape
        # Zeroed, as the KV is.
        self.tails = torch.zeros((slots, s.layers, s.tail, s.conv), device=device)
        self.heads = torch.zeros((slots, s.layers, s.heads, s.k_dim, s.v_dim), device=device)

    def copy(self, source: int, target: int) -> None:
        self.tails[target] = self.tails[source]
        self.heads[target] = self.heads[source]


def short_conv(
    op: ShortConv, runs: list[Run], states: States, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """weight [taps, width]"""
    out = torch.empty_like(x)
    taps = len(weight)
    for run in runs:
        tail = states.tails[run.slot, op.layer]
        tail = torch.zeros_like(tail) if run.fresh else tail.clone()
        rows = torch.cat((tail, x[run.begin : run.end]))
        terms = [weight[j] * rows[j : j + run.end - run.begin] for j in range(taps)]
        out[run.begin : run.end] = F.silu(torch.stack(terms).sum(0))
        if run.keep >= 0:
            kept = run.keep_before - run.begin
            states.tails[run.keep, op.layer] = rows[kept : kept + taps - 1]
        states.tails[run.slot, op.layer] = rows[len(rows) - taps + 1 :]
    return out


def delta_rule(
    op: DeltaRule, runs: list[Run], states: States, qkv: torch.Tensor, gates: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """gates: the logarithm of the old state's factor; beta: the correction's [rows, v_heads]."""
    keys, group = op.k_heads * op.k_dim, op.v_heads // op.k_heads
    q, k, v = qkv[:, :keys], qkv[:, keys : 2 * keys], qkv[:, 2 * keys :]
    q, k = (_unit(part.reshape(-1, op.k_heads, op.k_dim)).repeat_interleave(group, 1) for part in (q, k))
    q = q * op.k_dim**-0.5
    v = v.reshape(-1, op.v_heads, op.v_dim)
    out = torch.empty_like(v)
    for run in runs:
        state = states.heads[run.slot, op.layer]
        state = torch.zeros_like(state) if run.fresh else state.clone()
        for t in range(run.begin, run.end):
            if run.keep >= 0 and t == run.keep_before:
                states.heads[run.keep, op.layer] = state
            state = state * gates[t].exp()[:, None, None]
            seen = torch.einsum("hkv,hk->hv", state, k[t])
            change = (v[t] - seen) * beta[t][:, None]
            state = state + k[t][:, :, None] * change[:, None, :]
            out[t] = torch.einsum("hkv,hk->hv", state, q[t])
        if run.keep >= 0 and run.keep_before == run.end:
            states.heads[run.keep, op.layer] = state
        states.heads[run.slot, op.layer] = state
    return out.flatten(1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
