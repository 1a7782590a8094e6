"""Every architecture against `transformers`: small random checkpoints, written as GGUF as converters do."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from ktransformers.engine import _kernels
from ktransformers.engine.batch import Batch
from ktransformers.engine.executors.native import NativeExecutor
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


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
}
QUERY_SCALE = {"query_pre_attn_scalar": 24}

CASES = {
    "llama": Case("llama", "Llama", rope(10_000.0), {"rope.freq_base": 10_000.0}),
    "llama-mha-tied": Case("llama", "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-bias": Case(
        "llama", "Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-wide-heads": Case("llama", "Llama", {"head_dim": 32}),
    "llama-3.1": Case("llama", "Llama", rope(500_000.0, **LLAMA3), {"rope.freq_base": 500_000.0}),
    "llama-linear": Case(
        "llama",
        "Llama",
        rope(10_000.0, rope_type="linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mistral": Case("llama", "Mistral", {"sliding_window": None}),
    "mistral-window": Case("llama", "Mistral", {"sliding_window": 20}, {"attention.sliding_window": 20}),
    "qwen2": Case("qwen2", "Qwen2", rope(1e6), {"rope.freq_base": 1e6}),
    "qwen2-tied-yarn": Case(
        "qwen2",
        "Qwen2",
        {"tie_word_embeddings": True, **rope(1e6, **YARN)},
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "qwen3": Case("qwen3", "Qwen3", {"head_dim": 32, **rope(1e6)}, {"rope.freq_base": 1e6}),
    "gemma": Case("gemma", "Gemma", {**GEMMA, "hidden_act": "gelu_pytorch_tanh", **rope(10_000.0)}),
    "gemma2": Case(
        "gemma2",
        "Gemma2",
        {
            **GEMMA,
            **QUERY_SCALE,
            "num_hidden_layers": 4,
            "sliding_window": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "attention.sliding_window": 20,
            "attention.scale": 24**-0.5,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3",
        {
            **GEMMA,
            **GEMMA3_ROPE,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "sliding_window": 20,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        },
        {
            "attention.sliding_window": 20,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3-pattern": Case(
        "gemma3",
        "Gemma3",
        {
            **GEMMA,
            **QUERY_SCALE,
            "sliding_window": 32,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            },
        },
        {
            "attention.sliding_window": 32,
            "attention.sliding_window_pattern": [False, True, False],
            "attention.scale": 24**-0.5,
            "final_logit_softcapping": 4.0,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 20_000.0,
        },
    ),
}

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def build(case: Case) -> Any:
    """A random model, all of whose parameters (norms and biases too) are away from their neutral values."""
    kind = "Gemma3Text" if case.model == "Gemma3" else case.model
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **case.config})
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.model}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.2 + (0.0 if "bias" in name or "gemma" in case.arch else 1.0))
            else:
                p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
    return model


def permute(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k so that rope pairs (i, i + n / 2) become neighbours."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def llama3_divisors(head_dim: int, theta: float) -> np.ndarray[Any, Any]:
    """As the converter writes rope_freqs.weight."""
    old = LLAMA3["original_max_position_embeddings"]
    low, high, factor = (LLAMA3[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    divisors = []
    for freq in theta ** (-np.arange(0, head_dim, 2) / head_dim):
        turns = old * freq / (2 * math.pi)  # type: ignore[operator]
        smooth = min(max((turns - low) / (high - low), 0), 1)  # type: ignore[operator]
        divisors.append(1 / ((1 - smooth) / factor + smooth))  # type: ignore[operator]
    return np.array(divisors, np.float32)


def convert(case: Case, model: Any, path: Path) -> Path:
    """Write the checkpoint as GGUF in F32, with the names, the permutation and the +1 of converters."""
    c = model.config
    w = gguf.GGUFWriter(path, case.arch)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    for key, value in case.keys.items():
        add = {int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}[type(value)]
        add(f"{case.arch}.{key}", value)
    if case.config.get("rope_parameters", {}).get("rope_type") == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_divisors(head_dim, 500_000.0))
    names = {**NAMES, **POST_NORMS} if case.arch in ("gemma2", "gemma3") else NAMES
    for name, p in model.state_dict().items():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "lm_head" and c.tie_word_embeddings:
            continue
        prefix = ""
        if parts[0] == "layers":
            prefix, parts = f"blk.{parts[1]}.", parts[2:]
        stem = ".".join(parts[:-1])
        if case.arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            p = permute(p, c.num_attention_heads if "q_proj" in stem else c.num_key_value_heads)
        if case.arch.startswith("gemma") and stem.endswith("norm"):
            p = p + 1
        w.add_tensor(f"{prefix}{names[stem]}.{parts[-1]}", p.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def i32(values: object) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


class Driver:
    """Feeds sequences to an executor in pieces and collects the logits of every position."""

    def __init__(self, executor: Any, sequences: list[np.ndarray[Any, Any]], seed: int = 0) -> None:
        self.executor = executor
        self.sequences = sequences
        self.done = [0] * len(sequences)
        self.logits: list[list[np.ndarray[Any, Any]]] = [[] for _ in sequences]
        need = [-(-len(s) // BLOCK) for s in sequences]
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
        )
        out = self.executor.logits(batch)
        for i, (s, n) in enumerate(pieces.items()):
            self.logits[s] += list(out[starts[i] : starts[i + 1]])
            self.done[s] += n

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
        program, blocks=24, block_tokens=BLOCK, max_tokens=256, kv_dtype=kv_dtype, threads=1
    )


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sequences: list[Any]
) -> tuple[Program, list[np.ndarray[Any, Any]]]:
    """The compiled program of a case, and transformers' logits for every position of the sequences."""
    case = CASES[request.param]
    model = build(case)
    _, program = load(convert(case, model, tmp_path_factory.mktemp("model") / "m.gguf"))
    with torch.no_grad():
        logits = [model(torch.from_numpy(s)[None].long()).logits[0].numpy() for s in sequences]
    return program, logits


CHUNKS: dict[str, Callable[[int], int]] = {
    "whole": lambda s: 256,
    "chunks": lambda s: (16, 13, 5, 1)[s],
    "decode": lambda s: 1,
}


@pytest.mark.parametrize("chunk", list(CHUNKS))
def test_torch(checkpoint: tuple[Program, list[Any]], sequences: list[Any], chunk: str) -> None:
    program, expected = checkpoint
    driver = Driver(torch_executor(program), sequences)
    for ours, theirs in zip(driver.finish(CHUNKS[chunk]), expected, strict=True):
        assert np.abs(theirs).max() > 1, "the logits of a test model should be worth comparing"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("isa", _kernels.isas())
@pytest.mark.parametrize("chunk", list(CHUNKS))
def test_native(checkpoint: tuple[Program, list[Any]], sequences: list[Any], chunk: str, isa: str) -> None:
    """Float32 weights are computed in float32: what differs is the float16 of keys and values.

    With the same rounding in the oracle only those keys and values differ that rounding decides.
    """
    program, expected = checkpoint
    executor = NativeExecutor(program, isa=isa, threads=2, blocks=24, max_tokens=256, max_rows=256)
    ours = Driver(executor, sequences).finish(CHUNKS[chunk])
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=6e-3)
    oracle = Driver(torch_executor(program, torch.float16), sequences).finish(CHUNKS[chunk])
    for mine, theirs in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-3)


def test_only_rows_that_draw_are_computed_after_the_last_attention(tmp_path: Path) -> None:
    case = CASES["llama"]
    _, program = load(convert(case, build(case), tmp_path / "m.gguf"))
    rng = np.random.default_rng(3)
    tokens = i32(rng.integers(0, VOCAB, 20))
    some, every = i32([3, 19]), i32(range(20))
    batch = {"tokens": tokens, "starts": i32([0, 12, 20]), "context": i32([0, 0])}
    tables = {"block_starts": i32([0, 1, 2]), "blocks": i32([4, 2])}
    executor = torch_executor(program)
    whole = executor.logits(Batch(**batch, **tables, logit_rows=every))
    part = executor.logits(Batch(**batch, **tables, logit_rows=some))
    np.testing.assert_allclose(part, whole[some], rtol=0, atol=1e-5)
    assert executor.logits(Batch(**batch, **tables, logit_rows=i32([]))).shape == (0, VOCAB)
