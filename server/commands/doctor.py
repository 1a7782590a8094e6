"""`ktransformers doctor`: what this machine can do, what is missing, and what to do about it."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console

from ktransformers.engine import machine
from ktransformers.kvcache.stores.inspection import survey
from ktransformers.kvcache.stores.store import StoreError as CacheError
from ktransformers.server.commands.serve import default_file, has_tenants
from ktransformers.server.config import ConfigError, ServerConfig, cache_dir, load_config
from ktransformers.server.library import resolve
from ktransformers.server.run_folder import run_folder
from ktransformers.server.supervisor import check_listening
from ktransformers.server.tenants.records import StoreError

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CPU_INFO = Path("/proc/cpuinfo")
_COLOURS = {"ok": "green", "slow": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "slow", "bad"]
    """slow: it works, but not as well as it could."""
    detail: str
    advice: str = ""


def run(file: Path | None) -> int:
    """Print what was found; 1 when something is bad."""
    console = Console(highlight=False, soft_wrap=True)
    worst = 0
    for finding in findings(file):
        colour = _COLOURS[finding.state]
        console.print(f"[{colour}]{finding.state:<5}[/]{finding.what:<12}", end="")
        console.print(finding.detail, markup=False)
        if finding.advice:
            console.print(f"{'':17}{finding.advice}", markup=False)
        worst |= finding.state == "bad"
    return int(worst)


def findings(file: Path | None) -> Iterator[Finding]:
    """All findings, the basic ones first."""
    yield Finding("Python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    yield _kernels()
    yield _huge_pages()
    try:
        config = load_config(file or default_file(), os.environ, {}, has_tenants())
    except (ConfigError, StoreError) as error:
        yield Finding("settings", "bad", str(error), "`ktransformers serve --help` lists the settings")
        return
    yield Finding("settings", "ok", str(file or default_file() or "defaults and environment"))
    yield from _model(config)
    yield _tried("port", lambda: f"{check_listening(config).port} on {config.host} is free")
    yield _tried("sockets", _folder)
    yield _disk_tier(config)


def _tried(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "ok", check())
    except ConfigError as error:
        return Finding(what, "bad", str(error))


def _folder() -> str:
    with run_folder() as folder:
        return f"in {folder.parent}"


def _disk_tier(config: ServerConfig) -> Finding:
    cache = config.scheduler.engine.cache
    folder = Path(cache.cache_dir or cache_dir() / "kv")
    if cache.disk_bytes == 0 or not cache.prefix_reuse:
        return Finding("disk cache", "ok", "switched off")
    if not folder.exists():
        return Finding("disk cache", "ok", f"none yet, will be {folder}")
    try:
        found = survey(folder)
    except CacheError as error:
        return Finding(
            "disk cache", "slow", str(error), "the server runs without: nothing outlives a restart"
        )
    taken = sum(model.size for model in found.models) + found.other_bytes
    used = ", in use by a server" if found.in_use else ""
    return Finding("disk cache", "ok", f"{taken / 2**30:.1f} GiB in {folder}{used}")


def _kernels() -> Finding:
    cpus = machine.cpus()
    try:
        from ktransformers.engine import _kernels
    except ImportError as error:
        advice = "reinstall ktransformers: its C++ module cannot be loaded"
        return Finding("kernels", "bad", str(error), advice)
    isas = _kernels.isas()
    detail = f"{', '.join(isas)}; {cpus} CPUs"
    if isas == ["reference"]:
        why = "KT_MAX_ISA says so" if os.environ.get("KT_MAX_ISA") else "this CPU has no AVX2"
        return Finding("kernels", "slow", detail, f"{why}: everything works, slowly")
    if "amx" not in isas and "KT_MAX_ISA" not in os.environ and _has_tiles():
        why = "this CPU has AMX, but the system does not let a process have its tiles: Linux 5.16 does"
        return Finding("kernels", "slow", detail, why)
    return Finding("kernels", "ok", detail)


def _has_tiles() -> bool:
    """Whether the CPU has the AMX instructions that the table "amx" uses, whatever the system allows."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {"amx_tile", "amx_int8", "amx_bf16"} <= set(flags)


def _huge_pages() -> Finding:
    try:
        text = _HUGE_PAGES.read_text().strip()
    except OSError:
        return Finding("huge pages", "slow", "this kernel has none")
    if "[never]" in text:
        return Finding("huge pages", "slow", text, f"as root: echo madvise > {_HUGE_PAGES}")
    return Finding("huge pages", "ok", text)


def _model(config: ServerConfig) -> Iterator[Finding]:
    from ktransformers.engine.load import open_model
    from ktransformers.engine.plan import plan

    try:
        path = resolve(config.scheduler.engine.model)
    except ConfigError as error:
        yield Finding("model", "bad", str(error))
        return
    engine = msgspec.structs.replace(config.scheduler.engine, model=str(path))
    try:
        program, facts = open_model(engine)
        yield Finding("model", "ok", f"{facts.name} ({facts.spec.architecture}), {path}")
        planned = plan(engine, program, facts)
    except (OSError, ValueError) as error:
        yield Finding("model", "bad", str(error))
        return
    needed = sum(size for _, size in planned.needs)
    detail = f"{planned.available / 2**30:.1f} GiB available; {needed / 2**30:.1f} GiB may be used"
    yield Finding("memory", "ok", f"{detail}, for sequences of up to {planned.max_len} tokens")
