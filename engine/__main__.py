"""The engine process: `python -m ktransformers.engine CONFIG.json`.

Exit codes: 0 after Shutdown or SIGTERM; 1 when the configuration or the model cannot be used, which stderr
says in a line; 70 for anything else.
"""

import faulthandler
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ktransformers.engine.child import die_with_parent, read_configuration
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.disk_tier import open_disk
from ktransformers.engine.executors.build import build_executor
from ktransformers.engine.load import fingerprint, open_model
from ktransformers.engine.logs import start_logging
from ktransformers.engine.plan import Plan, plan
from ktransformers.engine.runner import Limits
from ktransformers.engine.service import Engine, Load, Service
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.memory import HostBlocks

log = logging.getLogger("ktransformers.engine")

EXIT_CONFIG = 1
EXIT_INTERNAL = 70
NICE = 10
"""More than the others': computing takes all CPUs, and who asks and answers should not wait for a turn of its
own. At 5 the kernel lets a thread finish its time slice (3 ms) before one that wakes up, if that one has not
slept for long. Much further up, other programs of the session would leave it almost nothing."""
_PROGRESS_LOG_SECONDS = 5.0
_BAR_AFTER_SECONDS = 0.7


def main(arguments: list[str]) -> int:
    """Serve the model that the file named by the one argument asks for; the exit code."""
    config = read_configuration("engine", arguments, EngineConfig)
    return EXIT_CONFIG if config is None else run(config, lambda report: load(config, report))


def run(config: EngineConfig, load: Load) -> int:
    """Serve what `load` loads on config.socket; the exit code."""
    listener = start_logging("engine")
    _settle()
    try:
        service = Service(config.socket)
        signal.signal(signal.SIGTERM, lambda *_: service.stop())
        # This thread, and those that load and compute, which it starts from now on; not the socket's.
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread) + NICE
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        service.run(load)
    except MemoryError:
        hint = "free memory, or lower device_bytes, context, max_batch_tokens or max_sequences"
        print(f"engine: there is too little memory: {hint}", file=sys.stderr)
        return EXIT_CONFIG
    except (OSError, ValueError) as error:
        # Steps do not raise: this is the socket's folder, or the model's file.
        print(f"engine: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except Exception:
        log.exception("internal error")
        return EXIT_INTERNAL
    finally:
        listener.stop()
    if service.stopped:
        # C++ threads may be using what an orderly exit would free.
        os._exit(0)
    return 0


def load(config: EngineConfig, report: Callable[[int, int], None]) -> Engine:
    """Open, plan, and load the model. Errors: OSError; GgufError and ModelError, which are ValueErrors."""
    begin = time.monotonic()
    program, facts = open_model(config)
    planned = plan(config, program, facts)
    with _Display(facts.name) as show:

        def both(done: int, total: int) -> None:
            report(done, total)
            show(done, total)

        executor = build_executor(config, program, planned, both)
    log.info(
        "%s: %.0f MB loaded in %.1f s; %s on %d threads; room for %s tokens (%.1f GB), %s in a sequence",
        *(facts.name, facts.weight_bytes / 1e6, time.monotonic() - begin, executor.isa, planned.threads),
        f"{executor.blocks * executor.block_tokens:,}",
        executor.blocks * planned.block_bytes / 1e9,
        f"{planned.max_len:,}",
    )
    if planned.hybrid is not None:
        log.info("%s", planned.hybrid.placement)
    if facts.requantised is not None:
        log.info("%s", facts.requantised)
    limits = Limits(
        blocks=executor.blocks,
        block_tokens=executor.block_tokens,
        max_len=planned.max_len,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        vocab=program.vocab,
        kept_states=-1 if program.state is None else planned.states - config.max_sequences,
    )
    host = HostBlocks(planned.host_blocks, executor.block_bytes) if planned.host_blocks else None
    key = fingerprint(config, program, facts, executor)
    disk = open_disk(config.cache, key, executor.block_bytes) if program.state is None else None
    _log_tiers(limits, executor.block_bytes, planned, disk)
    return Engine(executor, limits, key, host, disk)


def _log_tiers(limits: Limits, block_bytes: int, planned: Plan, disk: DiskStore | None) -> None:
    """What the prefix cache may take, of each kind of memory."""

    def tier(name: str, size: int) -> str:
        tokens = size // block_bytes * limits.block_tokens
        return f"{name} {size / 1e9:.1f} GB ({tokens:,} tokens)" if size else f"{name} none"

    tiers = [tier("device", limits.blocks * block_bytes), tier("host", planned.host_blocks * block_bytes)]
    stats = disk.stats() if disk is not None else None
    tiers.append(tier("disk", stats.cap if stats is not None else 0))
    if stats is not None and stats.blocks:
        tiers.append(f"of which {stats.blocks * limits.block_tokens:,} tokens are there")
    log.info("prefix cache: %s", ", ".join(tiers))


class _Display:
    """Shows loading that takes a while: a bar on a terminal, else a line now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = self._logged = time.monotonic()
        self._bar: AbstractContextManager[object] | None = None
        self._advance: Callable[[int, int], None] = self._draw if sys.stderr.isatty() else self._log

    def __enter__(self) -> Callable[[int, int], None]:
        return lambda done, total: self._advance(done, total)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def _draw(self, done: int, total: int) -> None:
        if time.monotonic() - self._began < _BAR_AFTER_SECONDS:
            return
        # Not before: rich takes longer to import than a small model to load.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(self._name, total=total, completed=done)
        self._bar = bar
        self._bar.__enter__()
        self._advance = lambda done, total: bar.update(task, completed=done, total=total)

    def _log(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._logged >= _PROGRESS_LOG_SECONDS:
            self._logged = now
            log.info("loading %s: %d %%", self._name, 100 * done // max(total, 1))


def _settle() -> None:
    """Be a good child: die with the parent, before others when memory runs out, and without a core."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        Path("/proc/self/oom_score_adj").write_text("200")
    except OSError as error:
        log.debug("oom_score_adj stays as it is: %s", error)
    faulthandler.enable()
    # Until there is something to end in order.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
