"""Quantised checkpoints of Hugging Face: integers, scales and zero points of a weight, in tensors of their
own, put together to blocks (weights.formats) when the weight is read. Nothing is widened, and nothing is
copied before.

What is checked when a model is opened: that all tensors of a weight are there and fit each other, that scales
are finite (where they are few enough to be read at once; the others when the weight is read), and that
GPTQ's groups follow each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from ktransformers.engine.program import U8, Pieces
from ktransformers.engine.weights import pages
from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.formats import (
    BF16,
    F8_E4M3,
    F16,
    F32,
    FORMATS,
    I4_32,
    I4_128,
    I4Z_32,
    I4Z_128,
    MXFP4,
    as_floats,
)
from ktransformers.engine.weights.safetensors import Folder, RawTensor
from ktransformers.engine.weights.stored import Stored

METHODS: Final = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq")
_NUMBERS: Final = {"F32": F32, "F16": F16, "BF16": BF16}
_EAGER_BYTES: Final = 2**28
"""Scales that are checked at once when a model is opened."""
_AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the nibble of each of eight outputs lies."""

Json = Mapping[str, object]


def fail(name: str, what: str) -> NoReturn:
    raise FolderError(f"tensor {name[:120]!a}: {what}")


@dataclass(frozen=True)
class Settings:
    """What a quantization_config says that its tensors do not."""

    method: str
    group: int = 0
    """Inputs that share a scale."""
    zero_offset: int = 0
    """What is added to stored zero points."""


def read_settings(config: Json) -> Settings:
    """FolderError names the field that is missing, wrong or not supported."""
    method = config.get("quant_method")
    if method not in METHODS or not isinstance(method, str):
        known = ", ".join(METHODS)
        _field("quant_method", f"{str(method)[:40]!a} is not supported ({known} are)")
    if method == "compressed-tensors":
        return Settings(method, _compressed_group(config))
    if method == "fp8":
        if config.get("weight_block_size") != [128, 128]:
            _field("weight_block_size", "only [128, 128] is supported")
        return Settings(method, 128)
    if method == "mxfp4":
        return Settings(method, 32)
    if config.get("bits", config.get("w_bit")) != 4:
        _field("bits", "only 4 is supported")
    group = config.get("group_size", config.get("q_group_size"))
    if type(group) is not int or group < 32 or group % 32:
        _field("group_size", "not a multiple of 32")
    if method == "awq":
        if config.get("version", "gemm") != "gemm" or config.get("zero_point", True) is not True:
            _field("version", "only AWQ's version gemm with zero points is supported")
        return Settings(method, group)
    kind = config.get("checkpoint_format", "gptq")
    if kind not in ("gptq", "gptq_v2"):
        _field("checkpoint_format", f"{str(kind)[:40]!a} is not supported (gptq and gptq_v2 are)")
    return Settings(method, group, 1 if kind == "gptq" else 0)


def _field(name: str, what: str) -> NoReturn:
    raise FolderError(f"config.json: field 'quantization_config': {name}: {what}")


def _compressed_group(config: Json) -> int:
    """The group size of compressed-tensors' one scheme: integers of 4 bits, symmetric, in groups."""
    if config.get("format", "pack-quantized") != "pack-quantized":
        _field("format", "only pack-quantized is supported")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        _field("config_groups", "only one group of settings is supported")
    scheme = next(iter(groups.values()))
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    if not isinstance(weights, dict) or scheme.get("input_activations") is not None:
        _field("config_groups", "only quantised weights, not activations, are supported")
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "actorder": None}
    for name, value in wanted.items():
        if weights.get(name) != value:
            _field(f"config_groups: {name}", f"only {value} is supported")
    group = weights.get("group_size")
    if type(group) is not int or group < 32 or group % 32:
        _field("config_groups: group_size", "not a multiple of 32")
    return group


class Quantised:
    """Finds the weights among the tensors of a folder."""

    def __init__(self, folder: Folder, settings: Settings) -> None:
        self._folder = folder
        self._settings = settings
        self._eager = _EAGER_BYTES
        self.used: set[str] = set()
        """Tensors that are part of a quantised weight."""

    def weights(self) -> dict[str, Stored]:
        """Every quantised weight, under the name that it would have if it were not. FolderError."""
        ends: dict[str, tuple[str, str, Callable[[str], Stored]]] = {
            "fp8": (".weight_scale_inv", ".weight", self._fp8),
            "mxfp4": ("_blocks", "", self._mxfp4),
            "compressed-tensors": (".weight_packed", ".weight", self._compressed),
            "gptq": (".qweight", ".weight", self._gptq),
            "awq": (".qweight", ".weight", self._awq),
        }
        end, plain, make = ends[self._settings.method]
        found = {}
        for name in self._folder.tensors:
            if name.endswith(end):
                stem = name.removesuffix(end)
                found[stem + plain] = make(stem)
        return found

    def _take(self, name: str, dtypes: tuple[str, ...], dims: int) -> RawTensor:
        raw = self._folder.tensors.get(name)
        if raw is None:
            fail(name, "is missing")
        if raw.dtype not in dtypes or len(raw.shape) != dims:
            wanted = f"{' or '.join(dtypes)} of {dims} dimensions is expected"
            fail(name, f"{raw.dtype} {list(raw.shape)}: {wanted}")
        self.used.add(name)
        return raw

    def _bytes(self, name: str) -> U8:
        return self._folder.tensor_bytes(name)

    def _expect(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            fail(name, f"has shape {list(shape)}; the weight's other tensors say {list(expected)}")

    def _check_scales(self, name: str) -> None:
        """At once, as long as it costs little."""
        self._eager -= self._folder.tensors[name].nbytes
        if self._eager >= 0:
            self._scales(name)

    def _scales(self, name: str) -> npt.NDArray[np.float32]:
        """Finite scales in the tensor's shape."""
        raw = self._folder.tensors[name]
        values = as_floats(self._bytes(name), _NUMBERS[raw.dtype])
        if values is None or not np.isfinite(values).all():
            fail(name, "a scale is not finite")
        return values.reshape(raw.shape)

    def _made(self, name: str, number: int, shape: tuple[int, ...], *reads: Callable[[], U8]) -> Stored:
        fmt = FORMATS[number]
        if shape[-1] % fmt.block:
            fail(name, f"rows of {shape[-1]} elements are not whole blocks of {fmt.block}")
        nbytes = int(np.prod(shape, dtype=np.int64)) // fmt.block * fmt.nbytes
        return Stored(number, shape, nbytes, Pieces(nbytes, reads))

    def _fp8(self, stem: str) -> Stored:
        weight, scale = f"{stem}.weight", f"{stem}.weight_scale_inv"
        rows, cols = self._take(weight, ("F8_E4M3",), 2).shape
        got = self._take(scale, ("F32", "BF16"), 2).shape
        self._expect(scale, got, (-(-rows // 128), -(-cols // 128)))
        self._check_scales(scale)

        def read() -> U8:
            out = np.empty((rows, cols // 128, 132), np.uint8)
            scales = np.repeat(self._scales(scale), 128, axis=0)[:rows]
            out[:, :, :4] = np.ascontiguousarray(scales)[:, :, None].view(np.uint8)
            with pages.reading(self._bytes(weight)) as raw:
                if (raw & 0x7F == 0x7F).any():
                    fail(weight, "a weight is NaN")
                out[:, :, 4:] = raw.reshape(rows, cols // 128, 128)
            return out.reshape(-1)

        return self._made(weight, F8_E4M3, (rows, cols), read)

    def _mxfp4(self, stem: str) -> Stored:
        """[experts, rows, groups, 16] bytes, the even element in the low half; GGUF's blocks have element i
        beside element i + 16."""
        blocks, scale = f"{stem}_blocks", f"{stem}_scales"
        shape = self._take(blocks, ("U8",), 4).shape
        self._expect(scale, self._take(scale, ("U8",), 3).shape, shape[:3])
        self._expect(blocks, shape[3:], (16,))
        experts, rows, groups, _ = shape
        if (self._bytes(scale) == 255).any():
            fail(scale, "a scale is NaN")

        def reader(expert: int) -> Callable[[], U8]:
            def read() -> U8:
                with pages.reading(self._bytes(blocks).reshape(shape)[expert]) as pairs:
                    nibbles = np.stack((pairs & 15, pairs >> 4), -1).reshape(rows, groups, 32)
                out = np.empty((rows, groups, 17), np.uint8)
                out[:, :, 0] = self._bytes(scale).reshape(shape[:3])[expert]
                out[:, :, 1:] = nibbles[:, :, :16] | nibbles[:, :, 16:] << 4
                return out.reshape(-1)

            return read

        return self._made(blocks, MXFP4, (experts, rows, groups * 32), *(reader(e) for e in range(experts)))

    def _compressed(self, stem: str) -> Stored:
        packed, scale, size = f"{stem}.weight_packed", f"{stem}.weight_scale", f"{stem}.weight_shape"
        rows, words = self._take(packed, ("I32",), 2).shape
        cols = words * 8
        raw = self._take(scale, ("BF16", "F16"), 2)
        self._expect(scale, raw.shape, (rows, -(-cols // self._settings.group)))
        if size in self._folder.tensors:
            wide = self._take(size, ("I64", "I32"), 1).dtype == "I64"
            said = np.frombuffer(self._bytes(size), "<i8" if wide else "<i4")
            self._expect(size, tuple(said.tolist()), (rows, cols))
        for other in ("weight_g_idx", "weight_zero_point"):
            if f"{stem}.{other}" in self._folder.tensors:
                fail(f"{stem}.{other}", "is not supported")
        self._check_scales(scale)
        number = self._number(raw.dtype)

        def read() -> U8:
            self._scales(scale)
            bits = self._bytes(scale).view("<u2").reshape(rows, -1)
            zeros = None if raw.dtype == "BF16" else np.full(bits.shape, 8, np.uint8)
            with pages.reading(self._bytes(packed)) as pairs:
                return self._blocks(number, pairs.reshape(rows, -1), bits, zeros)

        return self._made(packed, number, (rows, cols), read)

    def _number(self, dtype: str) -> int:
        """The format of integers whose scales have a dtype."""
        large = self._settings.group % 128 == 0
        if dtype == "BF16":
            return I4_128 if large else I4_32
        return I4Z_128 if large else I4Z_32

    def _blocks(self, number: int, pairs: U8, scales: npt.NDArray[np.uint16], zeros: U8 | None) -> U8:
        """Blocks of nibbles [rows, cols / 2] with the scales and zero points [rows, groups] before them."""
        fmt = FORMATS[number]
        times = self._settings.group // fmt.block
        blocks = pairs.shape[1] * 2 // fmt.block
        out = np.empty((len(pairs), blocks, fmt.nbytes), np.uint8)
        repeated = np.repeat(scales, times, axis=1)[:, :blocks]
        out[:, :, :2] = np.ascontiguousarray(repeated)[:, :, None].view(np.uint8)
        if zeros is not None:
            out[:, :, 2] = np.repeat(zeros, times, axis=1)[:, :blocks]
        out[:, :, fmt.nbytes - fmt.block // 2 :] = pairs.reshape(len(pairs), blocks, -1)
        return out.reshape(-1)

    def _rows_of_groups(self, stem: str, inputs: int, outputs: int) -> None:
        """The tensors of scales and zero points that GPTQ and AWQ share: [groups, outputs]."""
        groups = -(-inputs // self._settings.group)
        scale, zero = f"{stem}.scales", f"{stem}.qzeros"
        if inputs % 32 or outputs % 8:
            fail(f"{stem}.qweight", f"{inputs} inputs and {outputs} outputs are not whole blocks and words")
        self._expect(scale, self._take(scale, ("F16",), 2).shape, (groups, outputs))
        self._expect(zero, self._take(zero, ("I32",), 2).shape, (groups, outputs // 8))
        self._check_scales(scale)

    def _with_groups(self, stem: str, number: int, pairs: U8, order: tuple[int, ...]) -> U8:
        """`pairs` [outputs, inputs / 2]; `order` says where in a word the zero point of each output lies."""
        scales = self._scales(f"{stem}.scales").astype(np.float16).view(np.uint16)
        words = self._bytes(f"{stem}.qzeros").view("<u4").reshape(len(scales), -1, 1)
        shifts = np.array(order, np.uint32) * 4
        zeros = (words >> shifts & 15).astype(np.uint8).reshape(len(scales), -1)
        zeros += np.uint8(self._settings.zero_offset)
        return self._blocks(number, pairs, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T))

    def _gptq(self, stem: str) -> Stored:
        weight, order = f"{stem}.qweight", f"{stem}.g_idx"
        words, outputs = self._take(weight, ("I32",), 2).shape
        inputs = words * 8
        self._rows_of_groups(stem, inputs, outputs)
        if order in self._folder.tensors:
            self._expect(order, self._take(order, ("I32",), 1).shape, (inputs,))
            groups = np.frombuffer(self._bytes(order), "<i4")
            if not np.array_equal(groups, np.arange(inputs) // self._settings.group):
                fail(order, "inputs are ordered by activation (desc_act), which is not supported")
        number = self._number("F16")

        def read() -> U8:
            # A word holds eight inputs of one output; its bytes are pairs of them already.
            with pages.reading(self._bytes(weight)) as raw:
                pairs = raw.reshape(words, outputs, 4).transpose(1, 0, 2).reshape(outputs, -1)
            return self._with_groups(stem, number, pairs, tuple(range(8)))

        return self._made(weight, number, (outputs, inputs), read)

    def _awq(self, stem: str) -> Stored:
        weight = f"{stem}.qweight"
        inputs, words = self._take(weight, ("I32",), 2).shape
        outputs = words * 8
        self._rows_of_groups(stem, inputs, outputs)
        number = self._number("F16")

        def read() -> U8:
            # A word holds eight outputs of one input.
            pairs = np.empty((words, 8, inputs // 2), np.uint8)
            with pages.reading(self._bytes(weight)) as raw:
                packed = raw.view("<u4").reshape(inputs, words)
                for output, place in enumerate(_AWQ_ORDER):
                    nibbles = (packed >> np.uint32(4 * place) & 15).astype(np.uint8).T
                    pairs[:, output] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
            return self._with_groups(stem, number, pairs.reshape(outputs, -1), _AWQ_ORDER)

        return self._made(weight, number, (outputs, inputs), read)
