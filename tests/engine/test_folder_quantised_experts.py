"""Models with experts from quantised folders: the same logits as from a folder with the weights that the
integers and scales stand for (which test_expert_architectures.py compares with transformers)."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_expert_architectures as experts
import test_folder_quantised as formats
from safetensors.numpy import load_file

from ktransformers.engine.batch import Batch
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import Experts, Program, expert_weights
from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.formats import FORMATS

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

WIDE = {
    **dict.fromkeys(("hidden_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"), 128),
    "intermediate_size": 256,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
}


def linears(tensors: Tensors) -> list[str]:
    return [name for name in tensors if "_proj" in name and name.endswith(".weight")]


Split = Callable[[Tensors], tuple[Tensors, Tensors]]


def quantise(case: str, chosen: Callable[[Tensors], list[str]]) -> Split:
    """Replaces the chosen weights by random ones: packed, and as what they mean."""

    def apply(tensors: Tensors) -> tuple[Tensors, Tensors]:
        rng = np.random.default_rng(6)
        packed, plain = dict(tensors), dict(tensors)
        for name in chosen(tensors):
            parts, weights = formats.CASES[case][1](rng, *tensors[name].shape)
            del packed[name]
            packed |= {name.removesuffix(".weight") + end: values for end, values in parts.items()}
            plain[name] = weights
        return packed, plain

    return apply


LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Experts as gpt-oss has them: [experts, outputs, groups, 16] pairs of nibbles, scales of eight bits."""
    rng = np.random.default_rng(7)
    packed, plain = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors[name].shape
        blocks = rng.integers(0, 256, (count, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 124, blocks.shape[:3], dtype=np.uint8)
        nibbles = np.stack((blocks & 15, blocks >> 4), -1).reshape(*blocks.shape[:3], 32)
        values = LEVELS[nibbles] * np.exp2(scales.astype(np.float32) - 127)[..., None]
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = np.ascontiguousarray(values.reshape(count, outputs, inputs).swapaxes(1, 2))
    return packed, plain


def of_experts(tensors: Tensors) -> list[str]:
    return [name for name in linears(tensors) if ".experts." in name]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any, str]] = {
    "deepseek-v3-fp8": ("deepseek-v3", WIDE, formats.FP8, quantise("fp8", linears), "F8_E4M3"),
    "kimi-k2-int4": ("deepseek-v3", {}, formats.scheme(32), quantise("int4-32", of_experts), "I4_32"),
    "qwen3moe-gptq": (
        "qwen3moe", {}, {**formats.GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"},
        quantise("gptq_v2", of_experts), "I4Z_32",
    ),
    "mixtral-awq": (
        "mixtral", {"intermediate_size": 96}, formats.CASES["awq"][0],
        quantise("awq", lambda t: [n for n in t if ".experts." in n]), "I4Z_32",
    ),
    "gpt-oss-mxfp4": ("gpt-oss", {}, {"quant_method": "mxfp4"}, mxfp4, "MXFP4"),
}  # fmt: skip


def folders(path: Path, name: str) -> tuple[Path, Path]:
    """The quantised folder, and the same in float32."""
    case, sizes, settings, split, _ = CASES[name]
    case = replace(experts.CASES[case], config={**experts.CASES[case].config, **sizes})
    experts.build(case).save_pretrained(path / "saved")
    tensors = load_file(path / "saved" / "model.safetensors")
    config = json.loads((path / "saved" / "config.json").read_text())
    packed, plain = split(tensors)
    for folder, content, extra in (
        ("quantised", packed, {"quantization_config": settings}),
        ("plain", plain, {}),
    ):
        (path / folder).mkdir()
        formats.save(path / folder / "model.safetensors", content)
        (path / folder / "config.json").write_text(json.dumps({**config, **extra}))
    return path / "quantised", path / "plain"


def logits(executor: Any) -> Array:
    tokens = np.random.default_rng(1).integers(0, 96, 40).astype(np.int32)
    lists = ([0, 40], [0], [0, 3], [2, 0, 1], range(40))
    out: Array = executor.logits(Batch(tokens, *(np.array(values, np.int32) for values in lists)))
    return out


def torch_logits(program: Program) -> Array:
    return logits(TorchExecutor(program, blocks=3, block_tokens=16, max_tokens=64, threads=1))


@pytest.mark.parametrize("name", list(CASES))
def test_like_the_weights_that_are_meant(name: str, tmp_path: Path) -> None:
    quantised, plain = (formats.load(folder) for folder in folders(tmp_path, name))
    found = {FORMATS[t.format].name for t in quantised.weights if t.experts > 1 and "exps" in t.name}
    assert CASES[name][4] in found
    expected = torch_logits(plain)
    # Keys of latent attention are rounded to bfloat16.
    bound = 0.03 if name.startswith("deepseek") else 3e-5
    ours = torch_logits(quantised)
    assert np.abs(ours - expected).max() <= bound * np.abs(expected).max()
    native = logits(NativeExecutor(quantised, threads=2, blocks=3, max_tokens=64, max_rows=64))
    agree = (native.argmax(1) == ours.argmax(1)).mean()
    assert agree > 0.8 and np.abs(native - ours).mean() < 0.05 * np.abs(ours).max()
    layers = sum(isinstance(op, Experts) for op in quantised.ops)
    room = 3 * sum(quantised.weights[w].data.nbytes for w in expert_weights(quantised)) // (2 * layers)
    on_disk = NativeExecutor(quantised, threads=2, blocks=3, max_tokens=64, max_rows=64, expert_bytes=room)
    np.testing.assert_array_equal(logits(on_disk), native)


def test_broken_scales_of_experts_are_named(tmp_path: Path) -> None:
    quantised, _ = folders(tmp_path, "gpt-oss-mxfp4")
    tensors = load_file(quantised / "model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj_scales"))
    whole = tensors[name]
    nan = np.where(whole == whole[0, 0, 0], 255, whole).astype(np.uint8)
    for broken, word in ((nan, "NaN"), (whole[1:], "shape")):
        formats.save(quantised / "model.safetensors", {**tensors, name: np.ascontiguousarray(broken)})
        with pytest.raises((FolderError, ModelError), match=word) as error:
            formats.load(quantised)
        assert "down_proj" in str(error.value)
