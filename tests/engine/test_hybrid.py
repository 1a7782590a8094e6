"""Experts on two sides: torch beside csrc in another thread, with the CPU standing for the device."""

import ctypes
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import speaking
import torch
from checkpoints import BLOCK, CHUNKS, LENGTHS, VOCAB, Driver, build, i32, load, torch_executor
from converters import convert
from test_expert_architectures import CASES
from test_speaking import CAPITAL, greedy, native, program_of

from ktransformers.engine import _kernels
from ktransformers.engine.batch import Batch
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.beside import ByThread
from ktransformers.engine.executors.hybrid import hybrid_executor, split
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.load import open_model
from ktransformers.engine.placement.place import Placement, experts_name, experts_ops, moved, place
from ktransformers.engine.placement.rules import Policy, Rule, Rules
from ktransformers.engine.placement.statistics import ExpertStatistics, Records
from ktransformers.engine.program import Program

F32 = npt.NDArray[np.float32]
PLENTY = 1 << 60


def records_of(program: Program, path: Path | None = None) -> Records:
    statistics = ExpertStatistics({experts_name(program, op): op.experts for _, op in experts_ops(program)})
    return Records(statistics, path, "ab")


def placement_of(program: Program, split_at_random: int = 0, *rules: Rule, **said: Any) -> Placement:
    """Of each layer some experts on the device, others in number and kind (a seed)."""
    made = place(program, Rules("test", rules=rules, **said), PLENTY, records_of(program).statistics)
    rng = np.random.default_rng(split_at_random)
    chosen = [np.flatnonzero(rng.integers(0, 2, p.experts)).tolist() for p in made.experts]
    return replace(
        made, experts=tuple(moved(p, tuple(c)) for p, c in zip(made.experts, chosen, strict=True))
    )


def hybrid(program: Program, placement: Placement, records: Records | None = None) -> TorchExecutor:
    return hybrid_executor(
        program,
        placement,
        records or records_of(program),
        device="cpu",
        threads=2,
        blocks=32,
        block_tokens=BLOCK,
        max_tokens=256,
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    folder = tmp_path_factory.mktemp("models")
    # A shared MLP beside the experts; biases and another activation; weighed inputs; plain.
    names = ("mixtral", "qwen2moe", "gpt-oss", "llama4-scout")
    return {n: load(convert(CASES[n], build(CASES[n]), folder / f"{n}.gguf"))[1] for n in names}


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


def logits_of(executor: Any, sequences: list[Any], chunk: str = "chunks") -> F32:
    out = np.concatenate(Driver(executor, sequences).finish(CHUNKS[chunk]))
    executor.close()
    return out


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "gpt-oss", "llama4-scout"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_sum_of_both_sides_is_the_whole(
    programs: dict[str, Program], sequences: list[Any], name: str, seed: int
) -> None:
    program = programs[name]
    placement = placement_of(program, seed)
    assert any(p.on_device for p in placement.experts) and any(p.on_cpu for p in placement.experts)
    expected = logits_of(torch_executor(program), sequences)
    assert np.abs(expected).max() > 1
    for chunk in ("whole", "chunks"):
        ours = logits_of(hybrid(program, placement), sequences, chunk)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("on_device", [False, True])
def test_all_on_one_side(programs: dict[str, Program], sequences: list[Any], on_device: bool) -> None:
    program = programs["qwen2moe"]
    made = place(
        program, Rules("test"), PLENTY if on_device else 0, records_of(program).statistics
    )
    assert all(len(p.on_device) == (p.experts if on_device else 0) for p in made.experts)
    ours, expected = (logits_of(e, sequences) for e in (hybrid(program, made), torch_executor(program)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_it_runs_beside(programs: dict[str, Program], sequences: list[Any], monkeypatch: Any) -> None:
    """csrc is called in a thread of its own; what a layer gives is waited for, however late it is."""
    callers = set()
    run = _kernels.HostExperts.run

    class Slow:
        def __init__(self, host: Any) -> None:
            self.host = host

        def run(self, layer: int, rows: int) -> None:
            callers.add(threading.current_thread().name)
            threading.Event().wait(0.01)
            run(self.host, layer, rows)

    monkeypatch.setattr(
        "ktransformers.engine.executors.hybrid.beside", lambda device, host: ByThread(Slow(host))  # type: ignore[arg-type]
    )
    program = programs["qwen2moe"]
    ours = logits_of(hybrid(program, placement_of(program, 1)), sequences, "whole")
    assert callers == {"experts on the cpu"}
    np.testing.assert_allclose(ours, logits_of(torch_executor(program), sequences), rtol=0, atol=1e-4)


def test_formats_of_both_sides(programs: dict[str, Program], sequences: list[Any]) -> None:
    """bf16 on the device and int8 with the CPU: near, and not the same."""
    program = programs["mixtral"]
    rules = (Rule(match="*", format="bf16"), Rule(match="*.experts", format="int8", kernel="reference"))
    placement = placement_of(program, 1, *rules)
    plain = placement_of(program, 1)
    assert placement.dense_bytes < 0.6 * plain.dense_bytes
    ratios = [(a.device_expert / b.device_expert, a.cpu_expert / b.cpu_expert)
              for a, b in zip(placement.experts, plain.experts, strict=True)]  # fmt: skip
    assert set(ratios) == {(0.5, 34 / 128)}
    executor = hybrid(program, placement)
    ours, expected = logits_of(executor, sequences), logits_of(torch_executor(program), sequences)
    off = np.abs(ours - expected).max(axis=-1)
    assert 1e-4 < np.median(off) < 0.1


def late(placement: Placement, defer: int) -> Placement:
    return replace(placement, defer=defer)


def test_deferral_of_none_is_none(programs: dict[str, Program], sequences: list[Any]) -> None:
    program = programs["qwen2moe"]
    plain = placement_of(program, 1)
    zero = logits_of(hybrid(program, late(plain, 0)), sequences)
    np.testing.assert_array_equal(zero, logits_of(hybrid(program, plain), sequences))
    one = logits_of(hybrid(program, late(plain, 1)), sequences)
    assert np.abs(one - zero).max() > 1e-3


def test_deferred_experts_come_one_layer_later(
    programs: dict[str, Program], sequences: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Against a reference that computes the deferred sums plainly; and said at the start."""
    program = programs["qwen2moe"]
    placement = late(placement_of(program, 1), 2)
    expected = logits_of(_Deferring(program, placement), sequences)
    executor = hybrid(program, placement)
    assert "defer 2" in caplog.text and "changes outputs" in caplog.text
    np.testing.assert_allclose(logits_of(executor, sequences), expected, rtol=0, atol=1e-4)


class _Deferring(TorchExecutor):
    """Torch alone, with `elsewhere` the plain mathematics of deferral."""

    def __init__(self, program: Program, placement: Placement) -> None:
        from ktransformers.engine.executors import torch as room

        whole = room.experts
        super().__init__(program, blocks=32, block_tokens=BLOCK, max_tokens=256, threads=1)
        outer = self

        class Plain:
            def __init__(self) -> None:
                self.digests: list[int] = []
                self.carried: torch.Tensor | None = None

            def experts(self, op: Any, x: Any, routed: Any, logit_rows: Any) -> Any:
                at = next(i for i, p in enumerate(placement.experts) if program.ops[p.op] is op)
                p = placement.experts[at]
                keep, defer = routed.clone(), routed.clone()
                defer[:, op.top :] = 0
                if at < len(placement.experts) - 1:
                    for row in range(len(routed)):
                        weights = [float(w) for w in routed[row, op.top :]]
                        mine = [k for k in range(op.top) if int(routed[row, k]) in p.on_cpu]
                        for k in sorted(mine, key=weights.__getitem__)[: placement.defer]:
                            defer[row, op.top + k] = routed[row, op.top + k]
                            keep[row, op.top + k] = 0
                out = whole(op, x, keep, outer._weights)
                carried, self.carried = self.carried, whole(op, x, defer, outer._weights)
                if carried is not None:
                    out = out + (carried if len(carried) == len(out) else carried[logit_rows])
                return out

            def before(self, index: int, values: Any) -> None:
                if index == 0:
                    self.carried = None

            def after(self, tokens: int) -> None: ...

            def close(self) -> None: ...

        self._elsewhere = Plain()


def test_deferred_rows_that_do_not_draw_are_dropped(programs: dict[str, Program]) -> None:
    """The last layer has the rows of logits only; what the one before deferred has one for each token."""
    program = programs["qwen2moe"]
    placement = late(placement_of(program, 1), 1)
    executor = hybrid(program, placement)
    tokens = i32(range(20))
    batch = Batch(tokens, i32([0, 20]), i32([0]), i32([0, 2]), i32([3, 7]), i32(range(20)))
    some = replace(batch, logit_rows=i32([4, 19]))
    np.testing.assert_allclose(executor.logits(some), executor.logits(batch)[[4, 19]], rtol=0, atol=1e-5)
    executor.close()


def test_which_choices_are_deferred() -> None:
    host = torch.tensor([[0.0, -1.0, 2.0, 1.0], [-1.0, -1.0, 3.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    share = torch.tensor([[0.1, 0.0, 0.3, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
    now, later = split(host, share, 1)
    assert later.tolist() == [[0, -1, -1, -1], [-1, -1, 3, -1], [-1] * 4]
    assert now.tolist() == [[-1, -1, 2, 1], [-1] * 4, [-1] * 4]
    assert split(host, share, 0)[0].tolist() == host.tolist()


# ---- statistics, and what follows from them


def skewed(program: Program) -> tuple[Program, list[np.ndarray[Any, Any]]]:
    """A stream that repeats a few tokens."""
    rng = np.random.default_rng(0)
    return program, [rng.choice([3, 5], n).astype(np.int32) for n in LENGTHS]


def test_statistics_count_what_the_router_chose(programs: dict[str, Program], tmp_path: Path) -> None:
    program, stream = skewed(programs["mixtral"])
    file = tmp_path / "made" / "counts.json"
    records = records_of(program, file)
    executor = hybrid(program, placement_of(program, 1), records)
    Driver(executor, stream).finish(CHUNKS["whole"])
    executor.close()
    for _, op in experts_ops(program):
        counts = records.statistics.of(experts_name(program, op))
        assert counts.sum() == sum(LENGTHS) * op.top
    again = records_of(program)
    again.statistics.load(file, "ab")
    assert again.statistics.total == records.statistics.total > 0
    # The next start takes the hot ones.
    one = place(program, Rules("test"), 0, again.statistics).experts[0].device_expert
    made = place(program, Rules("test"), one, again.statistics)
    hot = [p for p in made.experts if p.on_device]
    counts = [again.statistics.of(p.name) for p in made.experts]
    assert len(hot) == 1 and again.statistics.of(hot[0].name)[hot[0].on_device[0]] == max(map(max, counts))


def test_adaptive_placement_follows_the_stream(
    programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts change places between steps, and the sums stay the same."""
    monkeypatch.setattr("ktransformers.engine.executors.hybrid._LOOK_STEPS", 1)
    program, stream = skewed(programs["gpt-oss"])
    policy: Policy = "adaptive"
    records = records_of(program)
    made = place(program, Rules("test", policy=policy), 0, records.statistics)
    one = made.experts[0].device_expert
    made = place(program, Rules("test", policy=policy), one * 2 * len(made.experts), records.statistics)
    assert {p.on_device for p in made.experts} == {(0, 1)}
    executor = hybrid(program, made, records)
    moe: Any = executor._elsewhere
    first = np.concatenate(Driver(executor, stream).finish(CHUNKS["whole"]))
    for p in moe.places:
        counts = records.statistics.of(p.name)
        assert set(np.argsort(-counts)[:1]) <= set(p.on_device) and len(p.on_device) == 2
    assert {p.on_device for p in moe.places} != {(0, 1)}
    second = logits_of(executor, stream)
    np.testing.assert_allclose(second, first, rtol=0, atol=1e-4)
    expected = logits_of(torch_executor(program), stream)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-4)
    assert np.abs(first).max() > 1


# ---- the op alone


def host_of(top: int = 3) -> tuple[_kernels.HostExperts, F32, F32, F32, list[F32]]:
    rng = np.random.default_rng(3)
    pool, rows, width, hidden, experts = _kernels.ThreadPool(2), 40, 48, 32, 4
    shapes = ((experts * hidden, width), (experts * hidden, width), (experts * width, hidden))
    matrices = [rng.standard_normal(shape).astype(np.float32) / 6 for shape in shapes]
    packed = [
        _kernels.pack_experts(
            pool, _kernels.isas()[0], 0, *m.shape, experts,
            lambda e, m=m: m.reshape(experts, -1)[e].view(np.uint8),
        )
        for m in matrices
    ]  # fmt: skip
    host = _kernels.HostExperts(pool, rows)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    route = np.zeros((rows, 2 * top), np.float32)
    route[:, :top] = [rng.permutation(experts)[:top] for _ in range(rows)]
    route[:, top:] = rng.random((rows, top))
    out = np.full((rows, width), np.nan, np.float32)
    host.add(*packed, None, None, None, top, "silu", 1.0, 1.0, False, x, route, out)  # type: ignore[call-arg,arg-type]
    return host, x, route, out, matrices


def plain(x: F32, route: F32, matrices: list[F32], top: int = 3) -> F32:
    gate, up, down = (m.reshape(4, -1, m.shape[1]) for m in matrices)
    y = np.zeros_like(x)
    for r, row in enumerate(x):
        for k in range(top):
            e = int(route[r, k])
            if e >= 0:
                g = gate[e] @ row
                y[r] += route[r, top + k] * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ row)))
    return y


def test_experts_alone_leave_out_what_is_elsewhere() -> None:
    host, x, route, out, matrices = host_of()
    host.run(0, 40)
    np.testing.assert_allclose(out, plain(x, route, matrices), rtol=0, atol=1e-4)
    route[:, 1] = -1
    route[7, :3] = -1
    before = out.copy()
    host.run(0, 30)
    np.testing.assert_allclose(out[:30], plain(x, route, matrices)[:30], rtol=0, atol=1e-4)
    assert not out[7].any() and (out[30:] == before[30:]).all()
    host.run(0, 0)


def test_experts_alone_as_a_function_of_one_pointer() -> None:
    """What a CUDA stream would call: the same bits, from another thread, and NaN for what is wrong."""
    host, _, route, out, _ = host_of()
    host.run(0, 40)
    expected = out.copy()
    out[:] = 0
    function, argument = host.task(0, 40)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    thread = threading.Thread(target=call, args=(argument,))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(out, expected)
    route[3, 0] = 4
    call(argument)
    assert np.isnan(out).all()


def test_experts_alone_refuse_what_does_not_fit() -> None:
    host, x, route, out, _ = host_of()
    for wrong in (4.0, -2.0, 0.5, np.nan):
        route[5, 1] = wrong
        with pytest.raises(ValueError, match="route"):
            host.run(0, 40)
        host.run(0, 5)
    with pytest.raises(ValueError, match="layer"):
        host.run(1, 1)
    with pytest.raises(ValueError, match="rows"):
        host.run(0, 41)
    w = _kernels.pack(_kernels.ThreadPool(1), _kernels.isas()[0], 0, 48, 48, np.zeros(48 * 48 * 4, np.uint8))
    for name, arrays in (("x", (x[:, :32].copy(), route, out)), ("route", (x, route[:3].copy(), out))):
        with pytest.raises(ValueError, match=f"{name}: must be"):
            host.add(w, w, w, None, None, None, 3, "silu", 1.0, 1.0, False, *arrays)
    with pytest.raises(ValueError, match="act: 'tanh'"):
        host.add(w, w, w, None, None, None, 3, "tanh", 1.0, 1.0, False, x, route, out)
    with pytest.raises(ValueError, match="gate_bias"):
        host.add(w, w, w, w, None, None, 3, "silu", 1.0, 1.0, False, x, route, out)


def test_an_error_beside_is_the_step_s(programs: dict[str, Program], monkeypatch: Any) -> None:
    """It fails that step and no later one."""
    program = programs["qwen2moe"]
    executor = hybrid(program, late(placement_of(program, 1), 1))
    batch = Batch(i32([1, 2]), i32([0, 2]), i32([0]), i32([0, 1]), i32([3]), i32([0, 1]))
    good = executor.logits(batch)
    moe: Any = executor._elsewhere
    host = moe._layers[next(iter(moe._layers))].host
    kept = host.clone()
    host[:] = 77.0
    with pytest.raises(ValueError, match="route: names an expert"):
        executor.logits(batch)
    host.copy_(kept)
    np.testing.assert_array_equal(executor.logits(batch), good)
    executor.close()


# ---- it speaks


def test_it_says_what_the_default_model_says(tmp_path: Path) -> None:
    """Experts split at random between the two sides: the text of the dense model."""
    dense = greedy(native(program_of(speaking.default_model())))
    program = open_model(EngineConfig(model=str(speaking.write(tmp_path / "moe.gguf", "mixtral"))))[0]
    placement = placement_of(program, 7)
    assert 30 < sum(len(p.on_device) for p in placement.experts) < 90
    assert dense[:3] == CAPITAL[5:]
    assert greedy(hybrid(program, placement)) == dense
