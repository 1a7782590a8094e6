"""Reader of safetensors files (https://github.com/huggingface/safetensors#format) and of folders of them.

A file is the length of a JSON header (u64), the header, and the bytes of the tensors. As with GGUF every
length, shape and offset is checked against caps and the size of the file before it is used, and tensors are
views of a map. A folder holds `model.safetensors`, or several files and an index that says which tensor lies
in which.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ktransformers.engine.weights.files import FolderError, inside, map_file, parse_object, read_json

MAX_HEADER: Final = 64 * 2**20
MAX_TENSORS: Final = 2**20
MAX_DIMS: Final = 4
MAX_ELEMENTS: Final = 2**40
MAX_NAME: Final = 512
MAX_SHARDS: Final = 1024
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

ITEM_BYTES: Final[dict[str, int]] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of an element of each dtype."""

_LENGTH: Final = struct.Struct("<Q")


class SafetensorsError(FolderError):
    """A safetensors file that cannot be trusted. One line: file, field, what is wrong."""


@dataclass(frozen=True)
class RawTensor:
    """Where a tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of its file."""
    nbytes: int
    shard: int


@dataclass(frozen=True)
class Folder:
    """The tensors of a model's folder. Maps stay open as long as a view of them lives."""

    path: Path
    tensors: dict[str, RawTensor]
    shards: tuple[npt.NDArray[np.uint8], ...]
    header_bytes: tuple[int, ...]
    """For each file, where tensor data begins."""

    def tensor_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """The raw bytes [nbytes] of a tensor: a read-only view of the map. KeyError for an unknown name."""
        raw = self.tensors[name]
        return self.shards[raw.shard][raw.offset : raw.offset + raw.nbytes]


def _show(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _tensor(where: str, entry: object, start: int, size: int, shard: int) -> RawTensor:
    """One tensor of a header; its bytes lie in [start, size) of the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"{where}: not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    item = ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item is None:
        raise SafetensorsError(f"{where}: unknown dtype {_show(str(dtype))}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or any(type(n) is not int for n in shape):
        raise SafetensorsError(f"{where}: shape is not a list of at most {MAX_DIMS} integers")
    if any(not 0 < n <= MAX_ELEMENTS for n in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise SafetensorsError(f"{where}: the shape is not positive with a product of at most 2^40")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise SafetensorsError(f"{where}: data_offsets are not two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise SafetensorsError(f"{where}: data_offsets are not the beginning and the end of anything")
    if end > size - start:
        raise SafetensorsError(f"{where}: its bytes end after the file's {size} (a partial download?)")
    if end - begin != math.prod(shape) * item:
        raise SafetensorsError(f"{where}: {end - begin} bytes are not {math.prod(shape)} elements of {dtype}")
    return RawTensor(dtype, tuple(shape), start + begin, end - begin, shard)


def read_file(path: Path, shard: int = 0) -> tuple[dict[str, RawTensor], npt.NDArray[np.uint8], int]:
    """The tensors of one file, its bytes, and where the tensor data begins. SafetensorsError."""
    data = map_file(path, SafetensorsError)
    size = len(data)
    if size < _LENGTH.size:
        raise SafetensorsError(f"{path}: {size} bytes: not a safetensors file")
    (length,) = _LENGTH.unpack_from(data)
    if length > min(MAX_HEADER, size - _LENGTH.size):
        what = f"a header of {length} bytes, more than the file or the limit of {MAX_HEADER} has"
        raise SafetensorsError(f"{path}: {what}: not a safetensors file, or a partial download")
    start = _LENGTH.size + length
    try:
        text = data[_LENGTH.size : start].decode()
    except UnicodeDecodeError as e:
        raise SafetensorsError(f"{path}: header: not UTF-8 at byte {e.start}") from None
    header = parse_object(text, f"{path}: header")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise SafetensorsError(f"{path}: {len(header)} tensors, more than {MAX_TENSORS}")
    tensors = {}
    for name, entry in header.items():
        where = f"{path}: tensor {_show(name)}"
        if not name or len(name) > MAX_NAME:
            raise SafetensorsError(f"{where}: a name of {len(name)} characters, not 1 to {MAX_NAME}")
        tensors[name] = _tensor(where, entry, start, size, shard)
    end = start
    for name, raw in sorted(tensors.items(), key=lambda t: t[1].offset):
        if raw.offset < end:
            raise SafetensorsError(f"{path}: tensor {_show(name)}: its data overlaps another tensor's")
        end = raw.offset + raw.nbytes
    return tensors, np.frombuffer(data, np.uint8), start


def _shard_names(folder: Path) -> dict[str, str] | None:
    """Tensor -> name of its file, by the index; None when there is no index."""
    index = read_json(folder, INDEX, MAX_HEADER)
    if index is None:
        return None
    where = f"{folder / INDEX}: weight_map"
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise FolderError(f"{where}: missing, or not an object")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise FolderError(f"{where}: tensor {_show(tensor)}: {_show(str(name))} is no safetensors file")
    if len(set(names.values())) > MAX_SHARDS:
        raise FolderError(f"{where}: more than {MAX_SHARDS} files")
    return names


def read_folder(path: Path) -> Folder:
    """Read the headers of all files of a model and map their data. FolderError (SafetensorsError)."""
    names = _shard_names(path)
    files = [SINGLE] if names is None else sorted(set(names.values()))
    tensors: dict[str, RawTensor] = {}
    shards: list[npt.NDArray[np.uint8]] = []
    starts: list[int] = []
    places = [inside(path, name) for name in files]
    for file in places:
        if not file.exists():
            why = f"{INDEX} names it" if names else f"a folder needs it or {INDEX}"
            raise FolderError(f"{file}: missing: {why}")
    for i, (name, file) in enumerate(zip(files, places, strict=True)):
        found, data, start = read_file(file, i)
        for tensor in found:
            if tensor in tensors:
                raise FolderError(f"{file}: tensor {_show(tensor)}: is in an earlier file too")
            if names is not None and names.get(tensor) != name:
                raise FolderError(f"{file}: tensor {_show(tensor)}: {INDEX} does not say that it is here")
        tensors |= found
        shards.append(data)
        starts.append(start)
    for tensor in names or ():
        if tensor not in tensors:
            raise FolderError(f"{path / INDEX}: tensor {_show(tensor)}: its file does not hold it")
    return Folder(path, tensors, tuple(shards), tuple(starts))
