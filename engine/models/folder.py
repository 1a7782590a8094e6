"""A model's folder in Hugging Face's layout (config.json and safetensors files) as the decoder reads it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ktransformers.engine.models.gather import gather, split_latent
from ktransformers.engine.models.huggingface import Family, read_config
from ktransformers.engine.models.huggingface_base import Read
from ktransformers.engine.models.huggingface_delta import delta_tensor
from ktransformers.engine.models.spec import ModelError, ModelSpec
from ktransformers.engine.program import U8, Pieces
from ktransformers.engine.weights import names
from ktransformers.engine.weights.contents import stored_tensors
from ktransformers.engine.weights.files import FolderError, read_json
from ktransformers.engine.weights.formats import F32, as_floats
from ktransformers.engine.weights.safetensors import Folder, read_folder
from ktransformers.engine.weights.stored import Stored

CONFIG: Final = "config.json"
MAX_CONFIG: Final = 4 * 2**20

_TOP: Final = {
    "model.embed_tokens.weight": names.EMBED,
    "model.norm.weight": names.OUTPUT_NORM,
    "lm_head.weight": names.OUTPUT,
}
_CORRECTION: Final = re.compile(r"(\.e_score_correction)_bias$", re.ASCII)
_SINKS: Final = re.compile(r"(\.sinks)$", re.ASCII)
_LAYER: Final = re.compile(r"model\.layers\.(\d{1,5})\.(.+)\.(weight|bias)", re.ASCII)
_GATED_NORM: Final = f".{names.SSM_NORM}.weight"
_OTHER_SENSES: Final = ("vision_tower.", "multi_modal_projector.", "vision_model.", "audio_tower.")
_TEXT_PREFIXES: Final = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


@dataclass(frozen=True)
class FolderModel:
    """A Checkpoint over the mapped files of a folder."""

    folder: Folder
    spec: ModelSpec
    tokens: int
    tensors: dict[str, Stored]

    def tensor_bytes(self, name: str) -> U8 | Pieces:
        return self.tensors[name].data


def open_folder(path: Path) -> FolderModel:
    """Read what describes the model; weights are only mapped. FolderError, ModelError."""
    values = read_json(path, CONFIG, MAX_CONFIG)
    if values is None:
        raise FolderError(f"{path / CONFIG}: missing: not a model in Hugging Face's layout")
    read, family = read_config(values)
    folder = read_folder(path)
    tensors = _tensors(stored_tensors(folder, values), read, family)
    return FolderModel(folder, read.spec, read.vocab, tensors)


def _plain(stored: Mapping[str, Stored], read: Read) -> dict[str, Stored]:
    """What is read, under names in "weight" or "bias"; keys and values of latent attention apart."""
    spec = read.spec
    unused = tuple(f"model.layers.{n}." for n in range(spec.layers, spec.layers + spec.unused_layers))
    found: dict[str, Stored] = {}
    for theirs, tensor in stored.items():
        name = _plain_name(theirs)
        if name is None or name.startswith(unused) or (read.tied and name == "lm_head.weight"):
            continue
        if spec.mla is not None and name.endswith(".kv_b_proj.weight"):
            stem = name.removesuffix("kv_b_proj.weight")
            keys, values = split_latent(tensor, spec.mla, spec.heads)
            found |= {f"{stem}k_b.weight": keys, f"{stem}v_b.weight": values}
        elif spec.delta is not None:
            found.update(filter(None, [delta_tensor(name, tensor)]))
        else:
            found[_SINKS.sub(r"\1.weight", _CORRECTION.sub(r"\1.bias", name))] = tensor
    return found


def _tensors(stored: Mapping[str, Stored], read: Read, family: Family) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    plain = _plain(stored, read)
    gathered = gather(plain, inputs_first=family.inputs_first, alternate=family.alternate)
    for name, tensor in gathered.items():
        ours = our_name(name, family.layer)
        if family.norm_offset and ours.endswith("norm.weight") and not ours.endswith(_GATED_NORM):
            tensor = _added(tensor, family.norm_offset)
        if ours in found:
            raise ModelError(f"tensor {name[:80]!a} is the same as another")
        found[ours] = tensor
    if not read.tied and names.OUTPUT not in found:
        raise ModelError("tensor 'lm_head.weight' is missing, and tie_word_embeddings is not set")
    if read.llama3 is not None:
        divisors = np.array(read.llama3.divisors(read.spec.rope), np.float32)
        found[names.ROPE_FREQS] = Stored(F32, divisors.shape, divisors.nbytes, divisors.view(np.uint8))
    return found


def _plain_name(name: str) -> str | None:
    """A name without what models that see put before it; None for what is not read."""
    for prefix in ("", "model."):
        if name.startswith(tuple(prefix + other for other in _OTHER_SENSES)):
            return None
    for theirs, plain in _TEXT_PREFIXES:
        if name.startswith(theirs):
            return plain + name[len(theirs) :]
    return name


def our_name(name: str, layer: Mapping[str, str]) -> str:
    """The name in weights.names; one that is not known keeps its own, which the decoder refuses."""
    if name in _TOP:
        return _TOP[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in layer:
        return name
    return f"blk.{int(match[1])}.{layer[match[2]]}.{match[3]}"


def _added(tensor: Stored, offset: float) -> Stored:
    """A vector with a number added, in float32."""
    values = None if isinstance(tensor.data, Pieces) else as_floats(tensor.data, tensor.format)
    if values is None:
        raise ModelError(f"a norm's weights have format {tensor.format}; F32, F16 or BF16 is expected")
    values = values + np.float32(offset)
    return Stored(F32, tensor.shape, values.nbytes, values.view(np.uint8))
