"""What a torch device does at most, measured: the bounds of predictions for it."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from ktransformers.engine.placement.predict import DeviceLimits
from ktransformers.engine.placement.rules import DeviceFormat

DTYPES: Final[dict[DeviceFormat, torch.dtype]] = {"f32": torch.float32, "bf16": torch.bfloat16}
_READ_BYTES: Final = 256 << 20
_SQUARE: Final = 512


def device_limits(device: str, threads: int, seconds: float = 0.2) -> DeviceLimits:
    """Measure a torch device (the CPU with `threads`), about `seconds` for each figure: a sum over memory
    that no cache holds, and products of square matrices."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    large = torch.ones(_READ_BYTES // 4, device=place)
    bandwidth = large.nbytes * _rate(lambda: large.sum(), place, seconds)
    peaks: dict[DeviceFormat, float] = {}
    for name, dtype in DTYPES.items():
        a = torch.ones(_SQUARE, _SQUARE, dtype=dtype, device=place)
        peaks[name] = 2 * _SQUARE**3 * _rate(partial(torch.matmul, a, a), place, seconds)
    return DeviceLimits(name=device, bandwidth=bandwidth, peaks=peaks)


def _rate(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls per second, at best."""

    def once() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    end = time.perf_counter() + seconds
    best = once()
    while time.perf_counter() < end:
        best = min(best, once())
    return 1 / best
