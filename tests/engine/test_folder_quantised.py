"""Quantised checkpoints against transformers with the weights that their integers and scales stand for.

The packing here is written from each format's description, without the code under test.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from ktransformers.engine.batch import Batch
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor, dequantise
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import open_folder
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import Pieces, Program
from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.formats import FORMATS

Array = npt.NDArray[Any]
Made = tuple[dict[str, Array], Array]
"""Tensors by the end of their name, and the weights [outputs, inputs] that they mean."""
CODES: dict[str, str] = {"uint8": "U8", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}


def words(nibbles: Array, axis: int) -> Array:
    """Eight neighbours along an axis in one int32, the first lowest."""
    n = np.moveaxis(nibbles.astype(np.uint32), axis, -1)
    n = n.reshape(*n.shape[:-1], -1, 8)
    packed = np.zeros(n.shape[:-1], np.uint32)
    for i in range(8):
        packed |= n[..., i] << np.uint32(4 * i)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def fp8(rng: np.random.Generator, rows: int, cols: int) -> Made:
    wanted = torch.from_numpy(rng.standard_normal((rows, cols)) * 100).clamp(-448, 448)
    values = wanted.to(torch.float8_e4m3fn)
    values[0, :8] = torch.tensor([0.0, -0.0, 2.0**-9, -(2.0**-9), 7 * 2.0**-9, 2.0**-6, 448.0, -448.0])
    scale = np.exp2(rng.uniform(-12, -9, (-(-rows // 128), -(-cols // 128)))).astype(np.float32)
    wide = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:rows, :cols]
    raw = values.view(torch.uint8).numpy()
    return {".weight": raw, ".weight_scale_inv": scale}, values.float().numpy() * wide


def compressed(group: int, dtype: str) -> Callable[[np.random.Generator, int, int], Made]:
    def make(rng: np.random.Generator, rows: int, cols: int) -> Made:
        q = rng.integers(-8, 8, (rows, cols))
        scale = np.exp2(rng.uniform(-8, -6, (rows, cols // group))).astype(np.float32)
        stored = scale.astype(np.float16)
        wide = stored.astype(np.float32)
        if dtype == "BF16":
            stored = (scale.view(np.uint32) >> 16).astype(np.uint16)
            wide = (stored.astype(np.uint32) << 16).view(np.float32)
        shape = np.array([rows, cols], np.int64)
        tensors = {".weight_packed": words(q + 8, 1), ".weight_scale": stored, ".weight_shape": shape}
        return tensors, (q * np.repeat(wide, group, 1)).astype(np.float32)

    return make


def zero_pointed(rng: np.random.Generator, rows: int, cols: int, group: int) -> tuple[Array, ...]:
    """Integers [inputs, outputs], zero points and scales [groups, outputs], and the weights."""
    q = rng.integers(0, 16, (cols, rows))
    zero = rng.integers(1, 16, (cols // group, rows))
    scale = np.exp2(rng.uniform(-8, -6, zero.shape)).astype(np.float16)
    wide_zero, wide_scale = np.repeat(zero, group, 0), np.repeat(scale.astype(np.float32), group, 0)
    return q, zero, scale, np.ascontiguousarray(((q - wide_zero) * wide_scale).T).astype(np.float32)


def gptq(group: int, offset: int) -> Callable[[np.random.Generator, int, int], Made]:
    def make(rng: np.random.Generator, rows: int, cols: int) -> Made:
        q, zero, scale, weights = zero_pointed(rng, rows, cols, group)
        order = (np.arange(cols) // group).astype(np.int32)
        packed = {".qweight": words(q, 0), ".qzeros": words(zero - offset, 1), ".scales": scale}
        return {**packed, ".g_idx": order}, weights

    return make


def awq(rng: np.random.Generator, rows: int, cols: int) -> Made:
    q, zero, scale, weights = zero_pointed(rng, rows, cols, 32)
    # AutoAWQ packs columns 0, 2, 4, 6, 1, 3, 5, 7 of eight.
    order = np.arange(rows).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    return {".qweight": words(q[:, order], 1), ".qzeros": words(zero[:, order], 1), ".scales": scale}, weights


def scheme(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
CASES: dict[str, tuple[dict[str, Any], Callable[[np.random.Generator, int, int], Made], str]] = {
    "fp8": (FP8, fp8, "F8_E4M3"),
    "int4-32": (scheme(32), compressed(32, "BF16"), "I4_32"),
    "int4-128": (scheme(128), compressed(128, "BF16"), "I4_128"),
    "int4-f16": (scheme(32), compressed(32, "F16"), "I4Z_32"),
    "gptq": ({**GPTQ, "group_size": 128}, gptq(128, 1), "I4Z_128"),
    "gptq-64": ({**GPTQ, "group_size": 64}, gptq(64, 1), "I4Z_32"),
    "gptq_v2": ({**GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"}, gptq(32, 0), "I4Z_32"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, "I4Z_32"),
}


def save(path: Path, tensors: dict[str, Array]) -> None:
    header, blobs, offset = {}, [], 0
    for name, values in tensors.items():
        code = "BF16" if values.dtype == np.uint16 else CODES[values.dtype.name]
        if code == "U8" and name.endswith(".weight"):
            code = "F8_E4M3"
        blobs.append(values.tobytes())
        end = offset + len(blobs[-1])
        header[name] = {"dtype": code, "shape": values.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write(path: Path, case: str, change: Callable[[dict[str, Array]], object] = lambda t: None) -> Any:
    """A folder, and transformers' model with the same weights in float32."""
    settings, make, _ = CASES[case]
    rng = np.random.default_rng(5)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().eval()
    tensors: dict[str, Array] = {}
    for name, p in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = p.numpy()
            continue
        parts, weights = make(rng, *p.shape)
        tensors |= {name.removesuffix(".weight") + end: values for end, values in parts.items()}
        p.copy_(torch.from_numpy(weights))
    change(tensors)
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": settings}))
    return model


def load(path: Path) -> Program:
    folder = open_folder(path)
    return compile_program(folder.spec, folder)


def i32(values: object) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


@pytest.mark.parametrize("case", list(CASES))
def test_like_transformers(case: str, tmp_path: Path) -> None:
    model = write(tmp_path, case)
    program = load(tmp_path)
    by_name = {t.name: t for t in program.weights}
    gate = by_name["blk.1.ffn_gate.weight"]
    assert FORMATS[gate.format].name == CASES[case][2] and isinstance(gate.data, Pieces)
    expected = model.model.layers[1].mlp.gate_proj.weight.detach().numpy()
    np.testing.assert_array_equal(dequantise(gate), expected)
    assert gate.read().nbytes == gate.data.nbytes
    tokens = i32(np.random.default_rng(1).integers(0, 96, 40))
    batch = Batch(tokens, i32([0, 40]), i32([0]), i32([0, 3]), i32([2, 0, 1]), i32(range(40)))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)[None].long()).logits[0].numpy()
    oracle = TorchExecutor(program, blocks=3, block_tokens=16, max_tokens=64, threads=1)
    np.testing.assert_allclose(oracle.logits(batch), theirs, rtol=0, atol=3e-5 * np.abs(theirs).max())
    native = NativeExecutor(program, threads=2, blocks=3, max_tokens=64, max_rows=64)
    ours = native.logits(batch)
    # FP8 sees activations in float32 or bfloat16, the integer formats in eight bits.
    bound = 0.02 if case == "fp8" else 0.1
    assert np.abs(ours - theirs).max() < bound * np.abs(theirs).max()


Q = "model.layers.0.self_attn.q_proj"


def replaced(name: str, change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], None]:
    def apply(tensors: dict[str, Array]) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    return apply


def poisoned(values: Array) -> Array:
    values = values.copy()
    values.reshape(-1)[3] = 0x7FC0 if values.dtype == np.uint16 else np.nan
    return values


def reordered(values: Array) -> Array:
    return values[::-1].copy()


BROKEN: dict[str, tuple[str, Callable[[dict[str, Array]], object], str]] = {
    "no scale": ("fp8", lambda t: t.pop(f"{Q}.weight_scale_inv"), "q_proj"),
    "scale of another shape": ("fp8", replaced(f"{Q}.weight_scale_inv", lambda s: s[:, :0]), "scale_inv"),
    "scales transposed": (
        "fp8", replaced("model.layers.0.mlp.up_proj.weight_scale_inv", lambda s: s.T), "up_proj",
    ),
    "scale NaN": ("fp8", replaced(f"{Q}.weight_scale_inv", lambda s: s * np.float32(np.inf)), "not finite"),
    "int4 scale NaN": ("int4-32", replaced(f"{Q}.weight_scale", poisoned), "not finite"),
    "int4 no scale": ("int4-32", lambda t: t.pop(f"{Q}.weight_scale"), "missing"),
    "int4 other group": ("int4-32", replaced(f"{Q}.weight_scale", lambda s: s[:, ::2]), "weight_scale"),
    "int4 other shape": ("int4-32", replaced(f"{Q}.weight_shape", lambda s: s + 1), "weight_shape"),
    "int4 zero points": (
        "int4-32", lambda t: t.update({f"{Q}.weight_zero_point": np.zeros((4, 4), np.int32)}), "zero_point",
    ),
    "gptq act-order": ("gptq", replaced("model.layers.0.mlp.down_proj.g_idx", reordered), "desc_act"),
    "gptq scale NaN": ("gptq", replaced(f"{Q}.scales", poisoned), "not finite"),
    "gptq no zeros": ("gptq", lambda t: t.pop(f"{Q}.qzeros"), "missing"),
    "gptq cut": ("gptq", replaced(f"{Q}.qweight", lambda w: w[:-1]), "q_proj"),
    "awq zeros of another shape": ("awq", replaced(f"{Q}.qzeros", lambda z: z[:, :-1]), "qzeros"),
    "both": ("awq", lambda t: t.update({f"{Q}.weight": np.zeros((8, 8), np.float32)}), "with and without"),
    "a part left over": ("gptq", lambda t: t.pop(f"{Q}.qweight"), "q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    case, change, word = BROKEN[name]
    write(tmp_path, case, change)
    with pytest.raises((FolderError, ModelError)) as error:
        load(tmp_path)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({}, "quant_method"),
        ({"quant_method": ["fp8"]}, "quant_method"),
        ({**FP8, "weight_block_size": [1, 128]}, "weight_block_size"),
        ({**GPTQ, "bits": 3, "group_size": 128}, "bits"),
        ({**GPTQ, "group_size": -1}, "group_size"),
        ({**GPTQ, "group_size": "128"}, "group_size"),
        ({**GPTQ, "group_size": 128, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version"),
        ({**scheme(32), "format": "float-quantized"}, "format"),
        ({**scheme(32), "config_groups": {}}, "config_groups"),
        ({**scheme(48)}, "group_size"),
    ],
)
def test_unknown_quantisation_is_refused_by_name(settings: object, word: str, tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(FolderError) as error:
        load(tmp_path)
    assert "quantization_config" in str(error.value) and word in str(error.value)


def test_a_nan_weight_is_refused_when_it_is_read(tmp_path: Path) -> None:
    nan = replaced(f"{Q}.weight", lambda w: np.where(w == w[0, 0], 0x7F, w).astype(np.uint8))
    write(tmp_path, "fp8", nan)
    program = load(tmp_path)
    with pytest.raises(ValueError, match=r"attn_q|q_proj"):
        NativeExecutor(program, threads=1, blocks=1, max_tokens=4, max_rows=4)
