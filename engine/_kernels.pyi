"""The C++ module: everything heavy. Arrays are C-contiguous numpy arrays; long calls release the GIL.

Arrays are not copied: nobody may write to them until the call returns.

Errors: ValueError for a shape, format or buffer that does not fit, with its name; MemoryError.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

BLOCK_TOKENS: int

def isas() -> list[str]:
    """Names of the kernel tables usable here, best first; KT_MAX_ISA caps the list. Never empty."""

def emulated_isas() -> list[str]:
    """Names of tables for tests that are never chosen, where they can run: "amx_emulated" is "amx" with its
    tile instructions in plain C++, "avxvnni_emulated" is "avxvnni" with its dot product made of AVX2."""

class ThreadPool:
    """`threads` workers, the calling thread among them; they sleep when there is no work."""

    def __init__(self, threads: int, pretended_nodes: int = 0) -> None:
        """On a machine with several NUMA nodes each thread stays on one, if there is one for each at least.
        `pretended_nodes` (0: those of the machine) are for tests: threads are shared out, memory is not."""
    @property
    def threads(self) -> int: ...
    @property
    def nodes(self) -> int:
        """NUMA nodes whose memory its threads have near. At least 1."""

def thread_places(root: str, cpus: list[int], threads: int) -> list[tuple[int, list[int]]]:
    """For tests, where a pool's threads would be: for each the number of its node (-1: there is but one) and
    the CPUs that it may run on (none: any). `root` is such a folder as /sys/devices/system/node."""

class Weight:
    """A packed weight, read-only, tied to the table that packed it."""

    @property
    def isa(self) -> str: ...
    @property
    def format(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def digest(self, pool: ThreadPool) -> int:
        """Of the packed bytes, see the function; of experts that stay in their file, of samples of them."""
    def row(self, i: int) -> F32:
        """Dequantised row [cols]."""

def pack(pool: ThreadPool, isa: str, format: int, rows: int, cols: int, data: U8) -> Weight:  # noqa: A002
    """Repack `rows` x `cols` elements in a GGUF format; `data` may be freed afterwards."""

def pack_experts(
    pool: ThreadPool, isa: str, format: int, rows: int, cols: int, experts: int, read: Callable[[int], U8],  # noqa: A002
    cut: tuple[bool, list[int]] | None = None,
) -> Weight:
    """The same for the rows of several experts, one after another; `read` gives the bytes of one expert.

    `cut` gives each node of the pool a part of every expert in its own memory: (whether columns or else rows
    are cut, where each part ends). Only Experts takes such a weight."""

def map_experts(isa: str, format: int, rows: int, cols: int, data: list[U8]) -> Weight:  # noqa: A002
    """Experts that stay where they are: one array for each, a view of a file's read-only mapping.

    Only Experts takes such a weight; a Program keeps the packed experts that it used last, `expert_bytes` of
    them, packs the others when they are chosen, and gives their pages back."""

def make_experts(
    isa: str, format: int, rows: int, cols: int, experts: int, read: Callable[[int], U8]  # noqa: A002
) -> Weight:
    """The same for experts whose bytes are put together each time: `read` gives those of one, on any thread.
    A step raises RuntimeError when it raises."""

def requantise(
    pool: ThreadPool, isa: str, source: int, target: int, rows: int, cols: int, data: U8
) -> tuple[U8, float, float]:
    """`rows` x `cols` elements from a format to Q8_0 or Q4_0: the blocks, and the sums of the squares of what
    was lost and of the weights. ValueError for weights that are not finite, too."""

def gemm(pool: ThreadPool, weight: Weight, x: F32, precise: bool = False) -> F32:
    """x [n, cols] -> [n, rows]: quantises x as the weight's format asks, then the product. For tests.

    `precise`: see engine.program.Linear."""

def digest(pool: ThreadPool, data: U8) -> int:
    """64 bits that tell contents of one size apart, by chance alone; as fast as memory can be read."""

def activation(isa: str, format: int) -> Literal["int8", "bf16", "f32"]:  # noqa: A002
    """How the input of a product with weights in this GGUF format is presented: which dot product it uses."""

def measure_peak(pool: ThreadPool, isa: str, kind: str, seconds: float) -> float:
    """Operations per second of a dot product ("int8", "bf16" or "f32") on all threads, operands in registers.

    A multiplication and an addition are two. The best of short rounds; 0: the table has no such dot product.
    """

def measure_read(pool: ThreadPool, isa: str, bytes: int, seconds: float) -> float:  # noqa: A002
    """Bytes per second that all threads read together of a buffer in huge pages, at best. MemoryError."""

def elementwise(isa: str, op: str, a: F32, b: F32) -> F32:
    """One kernel over arrays of one shape, for tests.

    `op`: "add", "silu_mul", "gelu_tanh_mul", "rms_norm" (of a, with
    weight b and eps 1e-6) or "softcap" (of a, with cap b[0])."""

def sample(
    logits: F32,
    temperature: F32, top_k: I32, top_p: F32, min_p: F32, repetition: F32, presence: F32, frequency: F32,
    seed: I64, position: I64, logprobs: I32,
    history_starts: I32, history: I32, history_output: I32,
    bias_starts: I32, bias_tokens: I32, bias_values: F32,
    token: I32, logprob: F32, top_tokens: I32, top_logprobs: F32,
) -> None:
    """Draw one token for each row of logits [R, vocab]; the last four arrays are outputs. See engine.batch.

    The order of the transformations is in csrc/ops/sampler.h.
    """

class HostExperts:
    """The routed experts of several layers, each layer callable alone: those that a device leaves to the CPU.

    Layers run one after the other and share the memory of a step."""

    def __init__(self, pool: ThreadPool, max_rows: int) -> None: ...
    def add(
        self,
        gate: Weight, up: Weight, down: Weight,
        gate_bias: Weight | None, up_bias: Weight | None, down_bias: Weight | None,
        top: int, act: str, alpha: float, limit: float, weigh_input: bool,
        x: F32, route: F32, out: F32,
    ) -> int:
        """The number of a layer. Weights are those of the experts that are here; a route names them by their
        place there, -1 is an expert that is elsewhere. Otherwise as engine.program.Experts.

        x [max_rows, cols], route [max_rows, 2 * top] and out [max_rows, rows] are memory that each run reads
        and writes: it may be pinned, and is kept alive."""
    def run(self, layer: int, rows: int) -> None:
        """out[:rows] from x[:rows] and route[:rows]; a row none of whose experts is here gives zeros.

        The GIL is released. ValueError, with nothing done, for a route to an expert that does not exist."""
    def task(self, layer: int, rows: int) -> tuple[int, int]:
        """The same run as the addresses of a C function and of its argument, for cudaLaunchHostFunc: alive as
        long as this. An error makes out NaN there."""

class Program:
    """A compiled program with its KV pool.

    `ops` are tuples (kind, fields in the order of engine.program's dataclasses); linear parts are tuples.
    `kv_format` is "bf16", "int8", or "latent" for a cache of latent rows (float16; kv_heads 1). `state` is
    the fields of engine.program.StateShape, with `state_slots` places for states.
    """

    def __init__(
        self,
        pool: ThreadPool,
        isa: str,
        ops: list[tuple[object, ...]],
        widths: list[int],
        weights: list[Weight],
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        max_tokens: int,
        max_rows: int,
        expert_bytes: int = 0,
        kv_format: str = "bf16",
        state: tuple[int, int, int, int, int, int] | None = None,
        state_slots: int = 0,
    ) -> None: ...
    def within(self, max_tokens: int, max_rows: int) -> Program:
        """The same model over the same KV, whose steps may be done in the middle of one of this program's.

        ValueError where experts stay in a file.
        """
    @property
    def block_bytes(self) -> int: ...
    def read_block(self, block: int, into: U8) -> None:
        """Copy the KV of one block to `into` [block_bytes]; may run beside a step that does not write it."""
    def write_block(self, block: int, data: U8) -> None:
        """Replace the KV of one block by `data` [block_bytes]; may run beside a step that does not use it."""
    def copy_state(self, source: int, target: int) -> None:
        """The state in one slot replaces that in another. ValueError when there is no such slot."""
    def step(
        self,
        tokens: I32, starts: I32, context: I32, block_starts: I32, blocks: I32, logit_rows: I32,
        slots: I32, keep_slots: I32, keep_at: I32,
        temperature: F32, top_k: I32, top_p: F32, min_p: F32, repetition: F32, presence: F32, frequency: F32,
        seed: I64, position: I64, logprobs: I32,
        history_starts: I32, history: I32, history_output: I32,
        bias_starts: I32, bias_tokens: I32, bias_values: F32,
        token: I32, logprob: F32, top_tokens: I32, top_logprobs: F32,
        between: Callable[[], None] | None = None,
    ) -> None:
        """One step: compute, write KV, draw. ValueError, with nothing done, for arrays that do not fit.

        `between` is called every 2 ms or so, between two ops; there a step of a program `within` may be done.
        What it raises ends the step.
        """
    def logits(
        self,
        tokens: I32, starts: I32, context: I32, block_starts: I32, blocks: I32, logit_rows: I32,
        slots: I32, keep_slots: I32, keep_at: I32,
    ) -> F32:
        """One step without drawing: [R, vocab]."""
    def set_profiling(self, on: bool) -> None:
        """Count calls and seconds of each op from now on. Row-wise ops then run each by itself, not fused."""
    def profile(self) -> list[tuple[int, float]]:
        """For each op, then for the draw: calls and seconds since profiling was switched on."""
