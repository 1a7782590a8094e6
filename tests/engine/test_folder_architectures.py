"""Every architecture from a folder in Hugging Face's layout, as transformers itself writes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_architectures as gguf_tests
import torch
import transformers

from ktransformers.engine import _kernels
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import open_folder
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import Program

CASES, CHUNKS, VOCAB = gguf_tests.CASES, gguf_tests.CHUNKS, gguf_tests.VOCAB


def load(path: Path) -> Program:
    model = open_folder(path)
    return compile_program(model.spec, model)


@pytest.fixture(scope="module")
def sequences() -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in gguf_tests.LENGTHS]


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sequences: list[Any]
) -> tuple[Program, list[Any]]:
    """The compiled program of a case, and transformers' logits for every position of the sequences."""
    model = gguf_tests.build(CASES[request.param])
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        logits = [model(torch.from_numpy(s)[None].long()).logits[0].numpy() for s in sequences]
    return load(path), logits


@pytest.mark.parametrize("chunk", ["whole", "decode"])
def test_torch(checkpoint: tuple[Program, list[Any]], sequences: list[Any], chunk: str) -> None:
    program, expected = checkpoint
    driver = gguf_tests.Driver(gguf_tests.torch_executor(program), sequences)
    for ours, theirs in zip(driver.finish(CHUNKS[chunk]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


def test_native(checkpoint: tuple[Program, list[Any]], sequences: list[Any]) -> None:
    program, expected = checkpoint
    isa = _kernels.isas()[0]
    executor = NativeExecutor(program, isa=isa, threads=2, blocks=24, max_tokens=256, max_rows=256)
    ours = gguf_tests.Driver(executor, sequences).finish(CHUNKS["chunks"])
    oracle = gguf_tests.Driver(gguf_tests.rounded_executor(program), sequences).finish(CHUNKS["chunks"])
    for mine, rounded, theirs in zip(ours, oracle, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=5e-2)
        np.testing.assert_allclose(mine, rounded, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["BF16", "F16"])
def test_sixteen_bits(tmp_path: Path, sequences: list[Any], dtype: torch.dtype) -> None:
    """Weights of 16 bits are the same numbers in float32; gemma's norms get their 1 added there."""
    gguf_tests.build(CASES["gemma3"]).to(dtype).save_pretrained(tmp_path)
    model = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    program = load(tmp_path)
    assert {t.format for t in program.weights if t.rows > 1} == {30 if dtype is torch.bfloat16 else 1}
    with torch.no_grad():
        expected = model(torch.from_numpy(sequences[0])[None].long()).logits[0].numpy()
    ours = gguf_tests.Driver(gguf_tests.torch_executor(program), sequences[:1]).finish(CHUNKS["whole"])[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-5)


OLD_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1": {"rope_theta": 500_000.0, "rope_scaling": gguf_tests.LLAMA3, "torch_dtype": "float32"},
    "qwen2-tied-yarn": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "sliding_window": 32768,
        "layer_types": None,
    },
    "gemma3": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
        "layer_types": None,
        "hidden_activation": None,
        "hidden_act": "gelu",
    },
    "mistral-window": {"rope_theta": 10_000.0, "head_dim": None, "tie_word_embeddings": None},
}


@pytest.mark.parametrize("name", list(OLD_CONFIGS))
def test_fields_of_older_files(name: str, tmp_path: Path) -> None:
    """What files had before rope_parameters gives the same program."""
    gguf_tests.build(CASES[name]).save_pretrained(tmp_path)
    new = load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config = {k: v for k, v in {**config, **OLD_CONFIGS[name]}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = load(tmp_path)
    assert old.ops == new.ops and old.widths == new.widths
    for a, b in zip(old.weights, new.weights, strict=True):
        np.testing.assert_array_equal(a.read(), b.read(), err_msg=a.name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu"),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 10**6),
        ("vocab_size", -1),
        ("vocab_size", 95),
        ("rms_norm_eps", float("nan")),
        ("rope_parameters", {"rope_type": "longrope", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "beta": 1}),
        ("rope_parameters", 7),
        ("model_type", "mamba"),
        ("model_type", ["llama"]),
        ("tie_word_embeddings", 1),
        ("something_new", True),
        ("intermediate_size", 95.5),
    ],
)
def test_wrong_fields_are_named(field: str, value: object, tmp_path: Path) -> None:
    gguf_tests.build(CASES["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    named = "token_embd" if value == 95 else {"rope_parameters": "rope"}.get(field, field)
    assert named in str(error.value) and "\n" not in str(error.value)
