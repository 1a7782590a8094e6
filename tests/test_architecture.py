"""Who may import whom (the walls of the house): imports run with the request, never back."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("server", "scheduler", "engine", "kvcache")

# Package -> modules of other packages that it may import.
EDGES = {
    "server": ("scheduler.client", "scheduler.protocol", "scheduler.config", "engine.child", "engine.logs"),
    "scheduler": (
        "engine.client",
        "engine.protocol",
        "engine.config",
        "engine.channel",
        "engine.child",
        "engine.logs",
        "kvcache.manager",
        "kvcache.moves",
        "kvcache.blocks",
        "kvcache.config",
    ),
    "engine": ("kvcache.stores", "kvcache.mover", "kvcache.config"),
    "kvcache": (),
}

# Single modules that reach further, each with its reason.
EXCEPTIONS = {
    "server.commands.explain": (
        "engine.explain",
        "engine.limits",
        "engine.load",
        "engine.plan",
        "engine.config",
        "engine.placement.predict",
    ),
    "server.commands.doctor": (
        "engine.load",
        "engine.plan",
        "engine.machine",
        "engine._kernels",
        "kvcache.stores",
    ),
    # bench measures the executor by itself, beside the server as a whole
    "server.commands.bench": ("engine.bench", "engine.limits", "engine.machine"),
    "server.bench.report": ("engine.bench.bounds", "engine.limits"),
    "server.commands.cache": ("kvcache.stores",),  # looks at the disk tier's folder while no engine has it
    "server.commands.simulate": ("scheduler.simulator", "scheduler.workload"),
    "server.text.model": ("engine.weights",),  # one parser of hostile files, not two
    "server.text.folder": ("engine.weights",),
}

# Third-party package -> where it may be imported.
CONFINED = {
    "fastapi": ("server.",),
    "starlette": ("server.",),
    "pydantic": ("server.",),
    "uvicorn": ("server.",),
    "zmq": ("engine.channel",),
    "torch": (
        "engine.executors.torch",
        "engine.executors.torch_attention",
        "engine.executors.torch_experts",
        "engine.executors.torch_recurrence",
        "engine.executors.hybrid",
        "engine.executors.beside",
        "engine.executors.torch_limits",
    ),
    "jinja2": ("server.text.",),
    "tokenizers": ("server.text.",),
    "prometheus_client": ("server.metrics",),
}

FORBIDDEN_MODULES = {"pickle", "dill", "marshal", "shelve", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield (
                ".".join(path.relative_to(ROOT).with_suffix("").parts),
                ast.parse(path.read_text(), str(path)),
            )


MODULES = dict(modules())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(
        name == entry or name.startswith(entry if entry.endswith(".") else entry + ".") for entry in allowed
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_with_the_request(module: str) -> None:
    room = module.split(".")[0]
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        assert top not in ROOMS, f"{module} imports {name}: write ktransformers.{name}"
        if top == "ktransformers" and name.count(".") >= 2:
            target = name.removeprefix("ktransformers.")
            if target.split(".")[0] == room:
                continue
            allowed = EDGES[room] + EXCEPTIONS.get(module, ())
            assert within(target, allowed), f"{module} may not import {name}"
        if top in CONFINED:
            assert within(module, CONFINED[top]), f"{module} may not import {top}"


@pytest.mark.parametrize("module", MODULES)
def test_no_code_from_data(module: str) -> None:
    tree = MODULES[module]
    for name in imports(tree):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{module} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{module}:{node.lineno} calls {node.func.id}"
        assert not isinstance(node, ast.Assert), f"{module}:{node.lineno} checks by assert, which -O strips"


def test_every_door_is_used() -> None:
    """An edge or exception that no import needs any more is a wall that was never closed again."""
    rooms = {room: [m for m in MODULES if m.split(".")[0] == room] for room in ROOMS}
    doors = [(modules, door) for room, modules in rooms.items() for door in EDGES[room]]
    doors += [([module], door) for module, exceptions in EXCEPTIONS.items() for door in exceptions]
    for through, door in doors:
        names = (name for module in through for name in imports(MODULES[module]))
        assert any(within(name.removeprefix("ktransformers."), (door,)) for name in names), (through, door)


def test_init_files_are_empty() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("__init__.py"):
            assert path.read_text() == "", f"{path} is not empty"


def test_the_walls_can_be_seen_to_hold() -> None:
    """A test of the test: a forbidden import is found."""
    tree = ast.parse("from ktransformers.server.app import app")
    assert any(
        not within(n.removeprefix("ktransformers."), EDGES["engine"])
        for n in imports(tree)
        if n.count(".") >= 2
    )
