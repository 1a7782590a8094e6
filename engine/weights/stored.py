"""The weights of a folder, each with the format that its bytes are in: what quantised checkpoints spread over
several tensors is one here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ktransformers.engine.program import U8, Pieces
from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.formats import BF16, F16, F32
from ktransformers.engine.weights.safetensors import Folder, RawTensor

_PLAIN: Final = {"F32": F32, "F16": F16, "BF16": BF16}
_BUFFERS: Final = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Ends of the names of what some files hold and no model needs: it is computed."""


@dataclass(frozen=True)
class Stored:
    """A weight as it is stored."""

    format: int
    shape: tuple[int, ...]
    nbytes: int
    data: U8 | Pieces


def stored_tensors(folder: Folder, config: Mapping[str, object]) -> dict[str, Stored]:
    """By the names of the folder. `config` is its config.json. FolderError for a quantisation or a dtype that
    is not known."""
    if config.get("quantization_config") is not None:
        raise FolderError(f"{folder.path}: config.json: field 'quantization_config': is not supported")
    found = {}
    for name, raw in folder.tensors.items():
        if not name.endswith(_BUFFERS):
            found[name] = _plain(folder, name, raw)
    return found


def _plain(folder: Folder, name: str, raw: RawTensor) -> Stored:
    number = _PLAIN.get(raw.dtype)
    if number is None:
        known = ", ".join(_PLAIN)
        what = f"has dtype {raw.dtype}, which is not supported ({known} are)"
        raise FolderError(f"{folder.path}: tensor {name[:80]!a} {what}")
    return Stored(number, raw.shape, raw.nbytes, folder.tensor_bytes(name))
