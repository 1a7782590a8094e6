"""Reader of GGUF v2 and v3 files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) over mmap.

A model file comes from strangers: every count, length, type and offset is checked against fixed caps and the
size of the file before it is used, so a hostile file costs one GgufError and never an allocation larger than
a small multiple of the file. Tensor data is not touched here.
"""

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ktransformers.engine.weights.files import map_file
from ktransformers.engine.weights.formats import GGUF_FORMATS

MAX_KEYS: Final = 65_536
MAX_TENSORS: Final = 65_536
MAX_DIMS: Final = 4
MAX_ELEMENTS: Final = 2**40
MAX_STRING: Final = 16 * 2**20
MAX_KEY: Final = 65_535
MAX_ARRAY: Final = 10**7
MIN_ALIGNMENT: Final = 8
MAX_ALIGNMENT: Final = 4096
MAX_SHARDS: Final = 1024

Value = bool | int | float | str | list[str] | npt.NDArray[np.generic]
"""What a key may hold. Arrays of strings are lists, all other arrays are one-dimensional numpy arrays."""


class GgufError(ValueError):
    """The file is not a GGUF file that can be trusted. One line: file, field, what is wrong."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in numpy's order (rows first), the reverse of the file's."""

    name: str
    format: int
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of its file."""
    nbytes: int
    shard: int = 0
    """Which of the files of a split model holds it."""


@dataclass(frozen=True)
class GgufFile:
    """A parsed file, or all files of a split model. Maps stay open as long as a view of them lives."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    shards: tuple[npt.NDArray[np.uint8], ...]
    """The mapped bytes of each file."""
    header_bytes: tuple[int, ...]
    """For each file, where tensor data begins: everything before describes the model."""

    @property
    def tokens(self) -> int:
        """Tokens of the vocabulary; 0 when the file has none."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, list) else 0

    def tensor_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """The raw bytes [nbytes] of a tensor: a read-only view of the map. KeyError for an unknown name."""
        info = self.tensors[name]
        return self.shards[info.shard][info.offset : info.offset + info.nbytes]


_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
_NUMBERS: Final[dict[int, np.dtype[np.generic]]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_SHARD: Final = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$", re.DOTALL)


def _show(name: str) -> str:
    """A name from the file as one short printable line."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


class _Header:
    """A cursor over the bytes before the tensor data. Each read checks that the file goes on that far."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0

    def error(self, field: str, what: str) -> GgufError:
        return GgufError(f"{self.path}: {field}: {what}")

    def need(self, n: int, field: str) -> None:
        if n > self.size - self.pos:
            where = f"needs {n} bytes at offset {self.pos} of {self.size}"
            raise self.error(field, f"the file ends early ({where}; a partial download?)")

    def u32(self, field: str) -> int:
        self.need(4, field)
        (value,) = _U32.unpack_from(self.data, self.pos)
        self.pos += 4
        return int(value)

    def u64(self, field: str) -> int:
        self.need(8, field)
        (value,) = _U64.unpack_from(self.data, self.pos)
        self.pos += 8
        return int(value)

    def string(self, field: str, cap: int = MAX_STRING) -> str:
        n = self.u64(field)
        if n > cap:
            raise self.error(field, f"a string of {n} bytes, more than {cap}")
        self.need(n, field)
        raw = self.data[self.pos : self.pos + n]
        self.pos += n
        try:
            return raw.decode()
        except UnicodeDecodeError as e:
            raise self.error(field, f"not UTF-8 at byte {e.start} of the string") from None

    def number(self, kind: int, field: str) -> bool | int | float:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            raise self.error(field, f"unknown value type {kind}")
        self.need(dtype.itemsize, field)
        value: bool | int | float = np.frombuffer(self.data, dtype, 1, self.pos)[0].item()
        self.pos += dtype.itemsize
        if kind == _BOOL:
            if value not in (0, 1):
                raise self.error(field, f"a bool of value {value}")
            return bool(value)
        return value

    def value(self, field: str) -> Value:
        kind = self.u32(field)
        if kind == _STRING:
            return self.string(field)
        if kind != _ARRAY:
            return self.number(kind, field)
        kind = self.u32(field)
        count = self.u64(field)
        if kind == _ARRAY:
            raise self.error(field, "an array of arrays is not supported")
        if count > MAX_ARRAY:
            raise self.error(field, f"an array of {count} elements, more than {MAX_ARRAY}")
        if kind == _STRING:
            return self.strings(count, field)
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            raise self.error(field, f"an array of unknown value type {kind}")
        self.need(count * dtype.itemsize, field)
        # A copy: the metadata outlives the map, and it is small.
        array = np.frombuffer(self.data, dtype, count, self.pos).copy()
        self.pos += count * dtype.itemsize
        if kind != _BOOL:
            return array
        if count and int(array.max()) > 1:
            raise self.error(field, "a bool that is neither 0 nor 1")
        return array.astype(np.bool_)

    def strings(self, count: int, field: str) -> list[str]:
        """Vocabularies have hundreds of thousands of strings, so this loop carries its state in locals."""
        self.need(8 * count, field)
        data, pos, size, unpack = self.data, self.pos, self.size, _U64.unpack_from
        out: list[str] = []
        append = out.append
        try:
            for _ in range(count):
                (n,) = unpack(data, pos)
                pos += 8
                if n > MAX_STRING or n > size - pos:
                    raise self.error(
                        field, f"element {len(out)} is a string of {n} bytes, {size - pos} bytes are left"
                    )
                append(data[pos : pos + n].decode())
                pos += n
        except struct.error:
            raise self.error(field, f"the file ends early, in element {len(out)} of {count}") from None
        except UnicodeDecodeError as e:
            raise self.error(field, f"element {len(out)} is not UTF-8 at its byte {e.start}") from None
        self.pos = pos
        return out


def _counts(h: _Header) -> tuple[int, int]:
    """Check magic and version; return how many tensors and keys follow."""
    h.need(4, "magic")
    magic = h.data[:4]
    if magic != b"GGUF":
        raise h.error("magic", f"{magic!r} is not b'GGUF': not a GGUF file")
    h.pos = 4
    version = h.u32("version")
    if version not in (2, 3):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
            raise h.error("version", "a big-endian file; only little-endian is supported")
        raise h.error("version", f"{version} is not supported (2 and 3 are)")
    tensors = h.u64("tensor_count")
    keys = h.u64("metadata_kv_count")
    if tensors > MAX_TENSORS:
        raise h.error("tensor_count", f"{tensors} is more than {MAX_TENSORS}")
    if keys > MAX_KEYS:
        raise h.error("metadata_kv_count", f"{keys} is more than {MAX_KEYS}")
    return tensors, keys


def _metadata(h: _Header, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for i in range(count):
        key = h.string(f"key {i}", MAX_KEY)
        field = f"key {_show(key)}"
        if not key:
            raise h.error(f"key {i}", "an empty name")
        if key in metadata:
            raise h.error(field, "appears twice")
        metadata[key] = h.value(field)
    return metadata


def _alignment(h: _Header, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
        what = f"not a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
        raise h.error("key 'general.alignment'", what)
    return value


def _tensor(h: _Header, i: int, shard: int) -> TensorInfo:
    """One tensor info; its offset is still relative to the tensor data."""
    name = h.string(f"name of tensor {i}", MAX_KEY)
    field = f"tensor {_show(name)}"
    if not name:
        raise h.error(f"name of tensor {i}", "is empty")
    n_dims = h.u32(field)
    if not 1 <= n_dims <= MAX_DIMS:
        raise h.error(field, f"{n_dims} dimensions, not 1 to {MAX_DIMS}")
    dims = [h.u64(field) for _ in range(n_dims)]
    elements = math.prod(dims)
    if min(dims) == 0 or elements > MAX_ELEMENTS:
        raise h.error(field, f"dimensions {dims} are not positive with a product of at most 2^40")
    kind = h.u32(field)
    fmt = GGUF_FORMATS.get(kind)
    if fmt is None:
        raise h.error(field, f"unknown tensor type {kind}")
    if dims[0] % fmt.block:
        raise h.error(field, f"rows of {dims[0]} elements are not whole {fmt.name} blocks of {fmt.block}")
    nbytes = elements // fmt.block * fmt.nbytes
    return TensorInfo(name, kind, tuple(reversed(dims)), h.u64(field), nbytes, shard)


def _tensors(h: _Header, count: int, alignment: int, shard: int) -> tuple[dict[str, TensorInfo], int]:
    """All tensor infos with offsets made absolute, and where the tensor data begins."""
    relative = [_tensor(h, i, shard) for i in range(count)]
    start = -(-h.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for t in relative:
        field = f"tensor {_show(t.name)}"
        if t.name in tensors:
            raise h.error(field, "appears twice")
        if t.offset % alignment:
            raise h.error(field, f"offset {t.offset} is not a multiple of the alignment {alignment}")
        if start + t.offset + t.nbytes > h.size:
            where = f"{t.nbytes} bytes at offset {start + t.offset}"
            raise h.error(field, f"{where} end after the file's {h.size} (a partial download?)")
        tensors[t.name] = TensorInfo(t.name, t.format, t.shape, start + t.offset, t.nbytes, shard)
    end = start
    for t in sorted(tensors.values(), key=lambda t: t.offset):
        if t.offset < end:
            raise h.error(f"tensor {_show(t.name)}", "its data overlaps another tensor's")
        end = t.offset + t.nbytes
    return tensors, min(start, h.size)


def _read_one(path: Path, shard: int) -> tuple[dict[str, Value], dict[str, TensorInfo], mmap.mmap, int]:
    data = map_file(path, GgufError)
    h = _Header(path, data)
    n_tensors, n_keys = _counts(h)
    metadata = _metadata(h, n_keys)
    tensors, start = _tensors(h, n_tensors, _alignment(h, metadata), shard)
    return metadata, tensors, data, start


def _split_key(path: Path, metadata: dict[str, Value], key: str, default: int, most: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise GgufError(f"{path}: key '{key}': not a number from 0 to {most}")
    return value


def _shard_paths(path: Path, metadata: dict[str, Value]) -> list[Path]:
    """All files of the model that `path` is the first of."""
    count = _split_key(path, metadata, "split.count", 1, MAX_SHARDS)
    if count <= 1:
        return [path]
    number = _split_key(path, metadata, "split.no", 0, MAX_SHARDS)
    match = _SHARD.match(path.name)
    if number != 0 or match is None or (int(match[2]), int(match[3])) != (1, count):
        first = f"...-00001-of-{count:05d}.gguf"
        raise GgufError(f"{path}: one of {count} files of a split model: name its first file, {first}")
    return [path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def read(path: str | os.PathLike[str]) -> GgufFile:
    """Parse the header of a GGUF file and map its data. GgufError says what is wrong with it.

    A split model is named by its first file; the others are found beside it.
    """
    first = Path(path)
    metadata, tensors, data, start = _read_one(first, 0)
    maps, starts = [data], [start]
    paths = _shard_paths(first, metadata)
    for i, shard_path in enumerate(paths[1:], start=1):
        more, shard_tensors, data, start = _read_one(shard_path, i)
        number = _split_key(shard_path, more, "split.no", 0, MAX_SHARDS)
        count = _split_key(shard_path, more, "split.count", 1, MAX_SHARDS)
        if (number, count) != (i, len(paths)):
            raise GgufError(f"{shard_path}: key 'split.no': this is not part {i + 1} of {first.name}")
        for name in shard_tensors:
            if name in tensors:
                raise GgufError(f"{shard_path}: tensor {_show(name)}: is in an earlier file too")
        tensors.update(shard_tensors)
        maps.append(data)
        starts.append(start)
    total = _split_key(first, metadata, "split.tensors.count", len(tensors), MAX_TENSORS * MAX_SHARDS)
    if len(maps) > 1 and total != len(tensors):
        raise GgufError(f"{first}: key 'split.tensors.count': not the {len(tensors)} tensors of its files")
    arrays = tuple(np.frombuffer(m, np.uint8) for m in maps)
    return GgufFile(first, metadata, tensors, arrays, tuple(starts))
