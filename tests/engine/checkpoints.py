"""Small random checkpoints of transformers, and a driver that runs sequences through an executor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from references import SmallThinkerConfig, SmallThinkerForCausalLM

from ktransformers.engine.batch import Batch
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.registry import read_spec
from ktransformers.engine.models.spec import ModelSpec
from ktransformers.engine.program import Program
from ktransformers.engine.weights.gguf import read

VOCAB = 96
BLOCK = 16
LENGTHS = (90, 37, 5, 1)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """A variation of an architecture: what transformers builds, and the keys a converter writes for it."""

    arch: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, int | float | str | list[bool]] = field(default_factory=dict)


def rope(theta: float, **scaling: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


QWEN3_NEXT = Case(
    "qwen3next",
    "Qwen3Next",
    {
        "num_hidden_layers": 5,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
    {
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 48,
        "rope.dimension_count": 8,
        "rope.freq_base": 1e6,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 24,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 6,
        "ssm.inner_size": 120,
        "full_attention_interval": 4,
    },
)
"""Of five layers the fourth has attention; heads of states are of odd sizes."""


def build(case: Case) -> Any:
    """A random model, all of whose parameters (norms and biases too) are away from their neutral values."""
    if case.model == "SmallThinker":
        return randomise(case, SmallThinkerForCausalLM(SmallThinkerConfig(**{**SIZES, **case.config})))
    kind = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}.get(case.model, case.model)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **case.config})
    return randomise(case, getattr(transformers, f"{case.model}ForCausalLM")(config))


def randomise(case: Case, model: Any) -> Any:
    """Draw the parameters, and the buffers that are loaded."""
    torch.manual_seed(0)
    model = model.float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):  # so that a state remembers for some tokens
                p.copy_(torch.randn_like(p) * 0.5 - 2)
            elif p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.2 + (0.0 if "bias" in name or "gemma" in case.arch else 1.0))
            else:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.randn_like(b) * 0.2)
    return model


def theirs(model: Any, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """transformers' logits of every position."""
    with torch.no_grad():
        out: np.ndarray[Any, np.dtype[np.float32]] = model(
            torch.from_numpy(tokens)[None].long(), use_cache=False
        ).logits[0].numpy()
    return out


def i32(values: object) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


class Driver:
    """Feeds sequences to an executor in pieces and collects the logits of every position."""

    def __init__(
        self, executor: Any, sequences: list[np.ndarray[Any, Any]], seed: int = 0, room: int = 0
    ) -> None:
        """`room`: tokens that each sequence may still grow by. With states, sequence s has slot s."""
        self.executor = executor
        self.sequences = list(sequences)
        self.done = [0] * len(sequences)
        self.logits: list[list[np.ndarray[Any, Any]]] = [[] for _ in sequences]
        need = [-(-(len(s) + room) // BLOCK) for s in sequences]
        ids = np.random.default_rng(seed).permutation(executor.blocks)[: sum(need)]
        self.tables = np.split(ids.astype(np.int32), np.cumsum(need)[:-1])

    def step(self, pieces: dict[int, int]) -> None:
        """Compute the next n tokens of each named sequence as one batch."""
        tokens, starts, context, block_starts, blocks = [], [0], [], [0], []
        for s, n in pieces.items():
            tokens.append(self.sequences[s][self.done[s] : self.done[s] + n])
            starts.append(starts[-1] + n)
            context.append(self.done[s])
            used = self.tables[s][: -(-(self.done[s] + n) // BLOCK)]
            blocks.append(used)
            block_starts.append(block_starts[-1] + len(used))
        batch = Batch(
            tokens=i32(np.concatenate(tokens)),
            starts=i32(starts),
            context=i32(context),
            block_starts=i32(block_starts),
            blocks=i32(np.concatenate(blocks)),
            logit_rows=i32(range(starts[-1])),
            **self.states(list(pieces)),
        )
        out = self.executor.logits(batch)
        for i, (s, n) in enumerate(pieces.items()):
            self.logits[s] += list(out[starts[i] : starts[i + 1]])
            self.done[s] += n

    def states(self, sequences: list[int]) -> dict[str, Any]:
        """Where the states of those sequences are; no copies."""
        if not self.executor.state_slots:
            return {}
        nowhere = i32([-1] * len(sequences))
        return {"slots": i32(sequences), "keep_slots": nowhere, "keep_at": nowhere}

    def finish(self, chunk: Callable[[int], int]) -> list[np.ndarray[Any, Any]]:
        """Steps with `chunk(sequence)` tokens of each until all are computed."""
        while True:
            left = [len(s) - d for s, d in zip(self.sequences, self.done, strict=True)]
            pieces = {s: min(n, chunk(s)) for s, n in enumerate(left) if n}
            if not pieces:
                return [np.stack(rows) for rows in self.logits]
            self.step(pieces)


def load(path: Path) -> tuple[ModelSpec, Program]:
    f = read(path)
    spec = read_spec(f.metadata)
    return spec, compile_program(spec, f)


def torch_executor(program: Program, kv_dtype: torch.dtype = torch.float32) -> TorchExecutor:
    return TorchExecutor(
        program, blocks=32, block_tokens=BLOCK, max_tokens=256, kv_dtype=kv_dtype, threads=1, states=8
    )


def rounded_executor(program: Program) -> TorchExecutor:
    """With the native executor's roundings in attention: bfloat16, but float16 of latent rows."""
    return torch_executor(program, torch.float16 if program.cache.kind == "latent" else torch.bfloat16)


CHUNKS: dict[str, Callable[[int], int]] = {
    "whole": lambda s: 256,
    "chunks": lambda s: (16, 13, 5, 1)[s],
    "decode": lambda s: 1,
}
