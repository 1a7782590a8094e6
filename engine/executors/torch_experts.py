"""Mixture of experts for the torch executor: what Route and Experts say, written to be checked by eye."""

import torch
import torch.nn.functional as F

from ktransformers.engine.program import Experts, Route


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in float32; x is rounded to the weight's dtype, that of the product."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias


def route(op: Route, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[rows, experts] -> [rows, 2 * top]: numbers of the chosen, then their weights. `bias` is [experts]."""
    if op.score == "softmax":
        p = logits.softmax(-1)
    elif op.score == "sigmoid":
        p = logits.sigmoid()
    else:
        p = logits
    c = p if bias is None else p + bias
    c = c.masked_fill(c.isnan(), -torch.inf)
    chosen = _best(c, op.top, _allowed(op, c))
    weights = p.gather(-1, chosen)
    if op.score == "softmax_top":
        weights = weights.softmax(-1)
    if op.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return torch.cat((chosen.float(), weights * op.scale), -1)


def _best(scores: torch.Tensor, n: int, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """Indices [rows, n] of the largest, largest first, of equals the lower first; topk promises neither."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    if allowed is not None:  # behind all others, however small those are
        order = order.gather(-1, allowed.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    return order[:, :n]


def _allowed(op: Route, c: torch.Tensor) -> torch.Tensor | None:
    """[rows, experts]: whether an expert is in one of the best groups."""
    if op.groups == 1:
        return None
    members = c.reshape(len(c), op.groups, -1)
    score = members.amax(-1) if op.group_score == "max" else members.topk(2, -1).values.sum(-1)
    keep = torch.zeros_like(score).scatter_(-1, _best(score, op.top_groups), 1.0)
    return keep.repeat_interleave(members.shape[-1], dim=-1)


def experts(op: Experts, x: torch.Tensor, routed: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """[rows, width] -> [rows, rows of down]. Tokens go expert by expert; a token's sum is in router order.

    A choice below 0 is computed elsewhere, and adds nothing.
    """
    stacked = [weights[w] for w in (op.gate, op.up, op.down)]
    gate, up, down = (w.reshape(op.experts, -1, w.shape[1]) for w in stacked)
    gate_bias, up_bias, down_bias = (
        None if w is None else weights[w] for w in (op.gate_bias, op.up_bias, op.down_bias)
    )

    def bias(of: torch.Tensor | None, e: int) -> torch.Tensor | None:
        return None if of is None else of[e]

    chosen, share = routed[:, : op.top].long(), routed[:, op.top :]
    results = x.new_zeros(len(x), op.top, down.shape[1])
    for e in range(op.experts):
        rows, places = torch.nonzero(chosen == e, as_tuple=True)
        if not len(rows):
            continue
        inputs = x[rows] * share[rows, places, None] if op.weigh_input else x[rows]
        g = product(inputs, gate[e], bias(gate_bias, e))
        u = product(inputs, up[e], bias(up_bias, e))
        results[rows, places] = product(_act(op, g, u), down[e], bias(down_bias, e))
    if not op.weigh_input:
        results *= share[..., None]
    out = results[:, 0]
    for i in range(1, op.top):
        out = out + results[:, i]
    return out


def _act(op: Experts, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    match op.act:
        case "silu":
            return F.silu(g) * u
        case "gelu_tanh":
            return F.gelu(g, approximate="tanh") * u
        case "relu":
            return F.relu(g) * u
        case "swiglu_oai":
            g, u = g.clamp(max=op.limit), u.clamp(-op.limit, op.limit)
            return g * torch.sigmoid(op.alpha * g) * (u + 1)
