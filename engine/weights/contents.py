"""All weights of a folder, each with the format that its bytes are in."""

from collections.abc import Mapping
from typing import Final

from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.formats import BF16, F16, F32
from ktransformers.engine.weights.quantised import Quantised, read_settings
from ktransformers.engine.weights.safetensors import Folder, RawTensor
from ktransformers.engine.weights.stored import Stored

_PLAIN: Final = {"F32": F32, "F16": F16, "BF16": BF16}
_BUFFERS: Final = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Ends of the names of what some files hold and no model needs: it is computed."""


def stored_tensors(folder: Folder, config: Mapping[str, object]) -> dict[str, Stored]:
    """By the names of the folder. `config` is its config.json. FolderError for a quantisation or a dtype that
    is not known, and for tensors of a weight that do not fit each other."""
    found: dict[str, Stored] = {}
    used: set[str] = set()
    inner = config.get("text_config")
    settings = config.get("quantization_config")
    if settings is None and isinstance(inner, dict):
        settings = inner.get("quantization_config")
    if settings is not None:
        if not isinstance(settings, dict):
            raise FolderError("config.json: field 'quantization_config': not an object")
        quantised = Quantised(folder, read_settings(settings))
        found, used = quantised.weights(), quantised.used
    for name, raw in folder.tensors.items():
        if name in used or name.endswith(_BUFFERS):
            continue
        if name in found:
            raise FolderError(f"tensor {name[:80]!a}: is there with and without quantisation")
        found[name] = _plain(folder, name, raw)
    return found


def _plain(folder: Folder, name: str, raw: RawTensor) -> Stored:
    number = _PLAIN.get(raw.dtype)
    if number is None:
        known = ", ".join(_PLAIN)
        raise FolderError(f"tensor {name[:80]!a} has dtype {raw.dtype}, which is not supported ({known} are)")
    return Stored(number, raw.shape, raw.nbytes, folder.tensor_bytes(name))
