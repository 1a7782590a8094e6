"""Experts cut for NUMA nodes: which thread has which node, what is cut where, and what comes out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import test_experts as experts

from ktransformers.engine import _kernels
from ktransformers.engine.executors.node_ranges import cuts, range_ends
from ktransformers.engine.program import Experts, Program

F32 = npt.NDArray[np.float32]
NODES = [2, 4]
THREADS = 5


# ---- which thread belongs where


def sysfs(root: Path, lists: dict[int, str]) -> str:
    for node, cpus in lists.items():
        (root / f"node{node}").mkdir()
        (root / f"node{node}/cpulist").write_text(cpus + "\n" if cpus else "\n")
    (root / "online").write_text("0-1\n")
    (root / "nodes").mkdir()
    return str(root)


def places(root: str, cpus: list[int], threads: int) -> list[tuple[int, list[int]]]:
    return [(node, list(own)) for node, own in _kernels.thread_places(root, cpus, threads)]


def test_as_many_threads_as_cpus_have_one_each(tmp_path: Path) -> None:
    """Hyperthreads of a node are numbered behind all cores of all nodes."""
    root = sysfs(tmp_path, {0: "0-1,4-5", 1: "2-3,6,7"})
    want = [(0, [0]), (0, [1]), (0, [4]), (0, [5]), (1, [2]), (1, [3]), (1, [6]), (1, [7])]
    assert places(root, list(range(8)), 8) == want


def test_fewer_threads_have_the_cpus_of_their_node(tmp_path: Path) -> None:
    root = sysfs(tmp_path, {0: "0-5", 1: "6-7"})
    got = places(root, list(range(8)), 4)
    assert got == [(0, list(range(6)))] * 3 + [(1, [6, 7])]
    assert places(root, list(range(8)), 2) == [(0, list(range(6))), (1, [6, 7])]
    assert [node for node, _ in places(root, list(range(8)), 16)] == [0] * 12 + [1] * 4


def test_only_cpus_of_the_mask_count(tmp_path: Path) -> None:
    """Nodes without CPUs (memory alone) or outside of the mask are none; their numbers may have gaps."""
    root = sysfs(tmp_path, {0: "0-3", 2: "4-7", 3: "", 10: "8-11"})
    assert places(root, [2, 3, 8, 9], 4) == [(0, [2]), (0, [3]), (10, [8]), (10, [9])]
    assert places(root, [5, 6], 2) == [(2, [5]), (2, [6])]
    assert places(root, [5, 6, 7], 2) == [(2, []), (2, [])]  # one node: left to the system, as ever


@pytest.mark.parametrize("lists", [{}, {0: "0-3"}, {0: "0-3", 1: "4-x"}, {0: "0-3", 1: "-4"}, {0: "rubbish"}])
def test_what_cannot_be_read_is_one_node(tmp_path: Path, lists: dict[int, str]) -> None:
    assert places(sysfs(tmp_path, lists), list(range(8)), 8) == [(-1, [i]) for i in range(8)]


def test_a_missing_folder_is_one_node(tmp_path: Path) -> None:
    assert places(str(tmp_path / "none"), [0, 1], 2) == [(-1, [0]), (-1, [1])]


def test_fewer_threads_than_nodes_are_refused_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads"):
        _kernels.thread_places(sysfs(tmp_path, {0: "0", 1: "1"}), [0, 1], 1)
    with pytest.raises(ValueError, match="pretended_nodes"):
        _kernels.ThreadPool(2, 3)
    assert [_kernels.ThreadPool(4, n).nodes for n in (1, 2, 4)] == [1, 2, 4]


# ---- what is cut where


def test_ranges_are_whole_blocks() -> None:
    assert range_ends(768, 32, 2) == [384, 768]
    assert range_ends(768, 256, 2) == [256, 768]
    assert range_ends(96, 32, 4) is None
    assert range_ends(100, 32, 4) == [32, 64, 96, 100]
    for hidden in (32, 100, 2048, 1408):
        for nodes in (1, 2, 3, 8):
            ends = range_ends(hidden, 32, nodes)
            if ends is not None:
                assert ends[-1] == hidden and len(ends) == nodes and ends == sorted(set(ends))


# ---- what comes out


@pytest.fixture
def wide() -> experts.Shape:
    return experts.Shape(70, 96, 160, 80, 8, 3)


def built(small: ModuleType, shape: experts.Shape, kind: str = "Q4_0", biases: bool = False) -> Program:
    return experts.program(small, shape, experts.route(experts=8, top=3), kind=kind, biases=biases)


def shares(p: Program, nodes: int) -> Iterator[Program]:
    """For each node a program of its own, with its columns alone: what it gives is what the node adds."""
    op = next(op for op in p.ops if isinstance(op, Experts))
    ends = cuts(p, nodes)[op.down][1]
    for n, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        weights = list(p.weights)
        for w in (op.gate, op.up):
            t = weights[w]
            raw = t.read().reshape(t.experts, t.rows // t.experts, -1)[:, begin:end].reshape(-1)
            weights[w] = replace(t, rows=t.experts * (end - begin), data=np.ascontiguousarray(raw))
        t = weights[op.down]
        rows = t.read().reshape(t.rows, -1)
        first, last = (rows.shape[1] * i // t.cols for i in (begin, end))
        weights[op.down] = replace(
            t, cols=end - begin, data=np.ascontiguousarray(rows[:, first:last]).reshape(-1)
        )
        for bias in (op.gate_bias, op.up_bias):
            if bias is not None:
                values = weights[bias].read().view(np.float32).reshape(op.experts, -1)[:, begin:end]
                weights[bias] = replace(
                    weights[bias],
                    cols=end - begin,
                    data=np.ascontiguousarray(values).reshape(-1).view(np.uint8),
                )
        ops = p.ops if n == 0 else tuple(replace(o, down_bias=None) if o is op else o for o in p.ops)  # type: ignore[type-var]
        yield replace(p, weights=tuple(weights), ops=ops)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("biases", [False, True])
def test_what_nodes_give_is_added_in_their_order(
    small: ModuleType, wide: experts.Shape, nodes: int, kind: str, biases: bool
) -> None:
    """To the last bit, as from programs that have a range each."""
    p = built(small, wide, kind, biases)
    tokens = list(range(70))
    want = np.float32(0)
    for n, share in enumerate(shares(p, nodes)):
        given = experts.run(small, small.executor(share), tokens)
        want = given if n == 0 else want + given
    got = experts.run(small, small.executor(p, threads=THREADS, pretended_nodes=nodes), tokens)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("isa", _kernels.isas() + _kernels.emulated_isas())
def test_bits_do_not_depend_on_threads_chunks_or_neighbours(
    small: ModuleType, wide: experts.Shape, nodes: int, isa: str
) -> None:
    """Law 1, for a number of nodes; and close to what one node gives."""
    p = built(small, wide)
    ex = small.executor(p, isa, THREADS, pretended_nodes=nodes)
    whole = experts.run(small, ex, list(range(70)))
    for chunk in (1, 3, 16, 49):
        got = small.chunked(ex, list(range(70)), list(range(5)), chunk)
        np.testing.assert_array_equal(got.view(np.uint32), whole.view(np.uint32))
    for tokens in ([0], [49, 50, 69], [5] * 40):
        np.testing.assert_array_equal(experts.run(small, ex, tokens), whole[tokens])
    other = small.executor(p, isa, nodes, pretended_nodes=nodes)
    np.testing.assert_array_equal(experts.run(small, other, list(range(70))), whole)
    one = experts.run(small, small.executor(p, isa, 2), list(range(70)))
    np.testing.assert_allclose(whole, one, rtol=1e-4, atol=1e-4)


def test_k_quants_are_cut_at_their_blocks(small: ModuleType) -> None:
    shape = experts.Shape(20, 256, 768, 40, 4, 2)
    p = experts.program(small, shape, experts.route(experts=4), kind="Q4_K")
    assert cuts(p, 2)[5] == (True, [256, 768])
    one = experts.run(small, small.executor(p), list(range(20)))
    two = experts.run(small, small.executor(p, threads=2, pretended_nodes=2), list(range(20)))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4 * np.abs(one).max())


def test_too_few_blocks_stay_whole(small: ModuleType) -> None:
    """And are computed by the threads of all nodes, with the bits of one."""
    p = experts.program(small, experts.Shape(), experts.route(), kind="Q4_0")
    assert cuts(p, 4) == {}
    one = experts.run(small, small.executor(p), list(range(70)))
    four = experts.run(small, small.executor(p, threads=4, pretended_nodes=4), list(range(70)))
    np.testing.assert_array_equal(four, one)


def test_experts_in_their_file_stay_whole(small: ModuleType, wide: experts.Shape, tmp_path: Path) -> None:
    p = built(small, wide)
    mapped = experts.on_disk(p, tmp_path / "experts")
    settings = {"threads": 4, "pretended_nodes": 2, "expert_bytes": 1 << 26}
    got = experts.run(small, small.executor(mapped, **settings), list(range(70)))
    np.testing.assert_array_equal(got, experts.run(small, small.executor(p), list(range(70))))


def test_each_number_of_nodes_has_a_fingerprint(small: ModuleType, wide: experts.Shape) -> None:
    """Bits differ, so KV of one may not be a hit of the other."""
    p = built(small, wide)
    digests = {small.executor(p, threads=4, pretended_nodes=nodes).weights_digest for nodes in (1, 2, 4)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ((False, [32, 32, 160]), "cut: 32 after 32"),
        ((False, [32, 128]), "cut: must have an end"),
        ((False, [160]), "cut: must have an end"),
        ((True, [48, 96]), "cut: 48 after 0 of 96 in blocks of 32"),
        ((True, [32, 128]), "cut: 128 after 32 of 96"),
    ],
)
def test_bad_cuts_are_refused(
    small: ModuleType, wide: experts.Shape, cut: tuple[bool, list[int]], message: str
) -> None:
    t = built(small, wide).weights[3]
    pool = _kernels.ThreadPool(2, 2)
    with pytest.raises(ValueError, match=message):
        _kernels.pack_experts(pool, "reference", t.format, t.rows, t.cols, t.experts, t.expert, cut)


def test_a_cut_weight_is_for_experts_only(small: ModuleType, wide: experts.Shape) -> None:
    t = built(small, wide).weights[3]
    pool = _kernels.ThreadPool(2, 2)
    isa = _kernels.isas()[0]
    w = _kernels.pack_experts(pool, isa, t.format, t.rows, t.cols, t.experts, t.expert, (False, [32, 160]))
    with pytest.raises(ValueError, match="weight: is cut"):
        w.row(0)
    ops: list[tuple[object, ...]] = [
        ("Embed", 0, 0, 1.0),
        ("GatherRows", 0, 1),
        ("Logits", 1, 0, 2, 0.0, False),
    ]
    with pytest.raises(ValueError, match=r"op 0 \(Embed\): table: must not be cut"):
        _kernels.Program(pool, isa, ops, [t.cols, t.cols, t.rows], [w], 1, 1, 16, 1, 1, 1)
