"""Handing work to csrc beside a torch device: what is begun runs while the device goes on with the next ops.

Two ways with the same effect. `ByThread` is for a device whose work is done when a torch call returns (the
CPU): another thread calls csrc, and an event says when it is done. `ByStream` is for CUDA: copies and a host
function in a stream of their own, ordered by events, so that nothing waits in Python and a CUDA graph could
hold all of it.
"""

import ctypes
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ktransformers.engine import _kernels

Finish = Callable[[], torch.Tensor]
"""Waits for what was begun, and gives its output on the device: to be read before the same buffers are used
again. Raises what csrc raised."""


@dataclass(frozen=True)
class Buffers:
    """Memory of the machine that csrc reads and writes, of max_rows rows; pinned for a device that copies."""

    x: torch.Tensor
    route: torch.Tensor
    out: torch.Tensor

    @staticmethod
    def of(rows: int, widths: tuple[int, int, int], pinned: bool) -> "Buffers":
        """Buffers of x, route and out."""
        x, route, out = (torch.zeros(rows, width, pin_memory=pinned) for width in widths)
        return Buffers(x, route, out)


class Beside(Protocol):
    """Where csrc's experts run while the device computes."""

    def begin(self, layer: int, x: torch.Tensor, route: torch.Tensor, buffers: Buffers) -> Finish:
        """Copy x and route, and run a layer of HostExperts on them. What is begun runs in order."""
        ...

    def close(self) -> None:
        """Wait for what was begun, and end."""
        ...


def beside(device: torch.device, host: _kernels.HostExperts) -> Beside:
    """The way that goes with a device."""
    return ByStream(device, host) if device.type == "cuda" else ByThread(host)


@dataclass
class _Job:
    layer: int
    rows: int
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class ByThread:
    """One thread that calls csrc, which releases the GIL."""

    def __init__(self, host: _kernels.HostExperts) -> None:
        self._host = host
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="experts on the cpu", daemon=True)
        self._thread.start()

    def begin(self, layer: int, x: torch.Tensor, route: torch.Tensor, buffers: Buffers) -> Finish:
        """See Beside."""
        buffers.x[: len(x)].copy_(x)
        buffers.route[: len(x)].copy_(route)
        job = _Job(layer, len(x))
        self._jobs.put(job)

        def finish() -> torch.Tensor:
            job.done.wait()
            if job.error is not None:
                raise job.error
            return buffers.out[: job.rows].to(x.device)

        return finish

    def close(self) -> None:
        """See Beside."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._host.run(job.layer, job.rows)
            except Exception as error:
                job.error = error
            job.done.set()


class ByStream:
    """A CUDA stream of its own. An error in csrc makes the output NaN: nobody can be told in a stream."""

    def __init__(self, device: torch.device, host: _kernels.HostExperts) -> None:
        self._device, self._host = device, host
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The runtime that torch has loaded already: its entry for host functions is not among torch's own.
        runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
        self._launch = runtime.cudaLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def begin(self, layer: int, x: torch.Tensor, route: torch.Tensor, buffers: Buffers) -> Finish:
        """See Beside."""
        rows = len(x)
        device = torch.cuda.current_stream(self._device)
        self._side.wait_stream(device)
        with torch.cuda.stream(self._side):
            for source, target in ((x, buffers.x), (route, buffers.route)):
                target[:rows].copy_(source, non_blocking=True)
                source.record_stream(self._side)
            status = self._launch(self._side.cuda_stream, *self._host.task(layer, rows))
            if status != 0:
                raise RuntimeError(f"cudaLaunchHostFunc: error {status}")
            out = buffers.out[:rows].to(self._device, non_blocking=True)
            done = self._side.record_event()

        def finish() -> torch.Tensor:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(done)
            out.record_stream(stream)
            return out

        return finish

    def close(self) -> None:
        """See Beside."""
        self._side.synchronize()
