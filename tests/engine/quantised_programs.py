"""Programs of float32 in the formats that files have."""

from dataclasses import replace

import gguf
import numpy as np

from ktransformers.engine.program import (
    Embed,
    HeadLinear,
    Linear,
    Logits,
    Program,
    Route,
    Tensor,
    WeightId,
    expert_weights,
)


def matrices(program: Program) -> set[WeightId]:
    """Weights of products, but those of routers, which files have in float32."""
    routed = {op.logits for op in program.ops if isinstance(op, Route)}
    found = expert_weights(program)
    for op in program.ops:
        match op:
            case Embed():
                found.add(op.table)
            case HeadLinear() | Logits():
                found.add(op.weight)
            case Linear():
                found |= {part.weight for part in op.parts if part.out not in routed}
            case _:
                pass
    return found


def quantised(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """A tensor of float32 in another format, where its rows are whole blocks of that."""
    if tensor.cols % gguf.GGML_QUANT_SIZES[kind][0]:
        return tensor
    values = tensor.read().view(np.float32).reshape(tensor.rows, tensor.cols)
    raw = gguf.quants.quantize(values, kind).reshape(-1).view(np.uint8)
    return replace(tensor, format=int(kind), data=raw)


def in_formats(program: Program, plain: str, experts: str) -> Program:
    """Experts in one format, all other matrices in another."""
    kinds = dict.fromkeys(matrices(program), gguf.GGMLQuantizationType[plain])
    kinds |= dict.fromkeys(expert_weights(program), gguf.GGMLQuantizationType[experts])
    weights = (quantised(t, kinds[i]) if i in kinds else t for i, t in enumerate(program.weights))
    return replace(program, weights=tuple(weights))
