"""Router and experts of the native executor: against torch, against the bare products, and law 1."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.program import (
    CacheShape,
    Embed,
    Experts,
    GatherRows,
    Linear,
    LinearPart,
    Logits,
    Op,
    Program,
    Route,
    Tensor,
)
from ktransformers.engine.weights import pages

F32 = npt.NDArray[np.float32]
ISAS = _kernels.isas() + _kernels.emulated_isas()
FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K")
X, R, C, Y, XR, YR, L = range(7)


def route(**changes: Any) -> Route:
    plain = Route(R, None, C, 8, 2, "softmax", 1, 1, "max", True, 1.0)
    return replace(plain, **changes)


def weight(name: str, kind: str, values: F32, experts: int = 1) -> Tensor:
    """Values [rows, cols] in a GGUF format."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("Q4_K", "Q6_K"):  # the package reads them, but does not write them: random blocks
        rng = np.random.default_rng(values.size)
        size, block = gguf.GGML_QUANT_SIZES[number][1], gguf.GGML_QUANT_SIZES[number][0]
        raw = rng.integers(0, 256, (values.size // block, size), np.uint8)
        for at in (0, 2) if kind == "Q4_K" else (208,):
            raw[:, at : at + 2] = np.array([3e-3], np.float16).view(np.uint8)
        data = raw.reshape(-1)
    else:
        data = gguf.quants.quantize(values, number).reshape(-1).view(np.uint8)
    return Tensor(name, int(number), values.shape[0], values.shape[1], data, experts)


@dataclass(frozen=True)
class Shape:
    tokens: int = 70
    width: int = 96
    hidden: int = 64
    out: int = 80
    experts: int = 8
    top: int = 2


def program(
    small: ModuleType,
    shape: Shape,
    op: Route,
    *,
    kind: str = "F32",
    logits: F32 | None = None,
    biases: bool = False,
    bias: F32 | None = None,
    **changes: Any,
) -> Program:
    """Token t has input x[t] and router logits [t]; the program's logits are what the experts give."""
    s = shape
    rng = np.random.default_rng(5)

    def random(*sizes: int) -> F32:
        return (rng.standard_normal(sizes) / np.sqrt(sizes[-1])).astype(np.float32)

    vocab = max(s.tokens, s.out)
    x, scores = random(vocab, s.width) * 8, rng.standard_normal((vocab, s.experts)).astype(np.float32)
    if logits is not None:
        scores[: len(logits)] = logits
    weights = [
        small.tensor(x, "x"),
        small.tensor(scores, "scores"),
        small.tensor(np.eye(vocab, s.out), "eye"),
        weight("gate", kind, random(s.experts * s.hidden, s.width), s.experts),
        weight("up", kind, random(s.experts * s.hidden, s.width), s.experts),
        weight("down", kind, random(s.experts * s.out, s.hidden), s.experts),
    ]
    if biases:
        weights += [small.tensor(random(s.experts, n)) for n in (s.hidden, s.hidden, s.out)]
    if bias is not None:
        op = replace(op, bias=len(weights))
        weights.append(small.tensor(bias))
    ids: list[int | None] = [6, 7, 8] if biases else [None] * 3
    experts = Experts(X, C, Y, 3, 4, 5, *ids, s.experts, s.top, "silu", 1.702, 7.0, False)
    ops: tuple[Op, ...] = (
        Embed(0, X, 1.0),
        Embed(1, R, 1.0),
        op,
        replace(experts, **changes),
        GatherRows(Y, YR),
        Logits(YR, 2, L, 0.0),
    )
    widths = (s.width, s.experts, 2 * s.top, s.out, s.width, s.out, vocab)
    return Program(ops, widths, tuple(weights), CacheShape(1, 1, 16), vocab)


def run(small: ModuleType, ex: Any, tokens: list[int]) -> F32:
    """Rows of what the experts give to each token."""
    out: F32 = ex.logits(small.batch(small.Part(tokens, 0, list(range(-(-len(tokens) // 16))))))
    return out


def routes(small: ModuleType, op: Route, scores: F32, isa: str | None = None, bias: F32 | None = None) -> F32:
    """[rows, 2 * top] of the native router, or of torch's when `isa` is "torch"."""
    vocab = max(len(scores), 2 * op.top)
    table = np.zeros((vocab, op.experts), np.float32)
    table[: len(scores)] = scores
    weights = [small.tensor(table), small.tensor(np.eye(vocab, 2 * op.top))]
    if bias is not None:
        weights.append(small.tensor(bias))
        op = replace(op, bias=2)
    ops: tuple[Op, ...] = (
        Embed(0, 0, 1.0),
        replace(op, logits=0, out=1),
        GatherRows(1, 2),
        Logits(2, 1, 3, 0.0),
    )
    p = Program(ops, (op.experts, 2 * op.top, 2 * op.top, vocab), tuple(weights), CacheShape(1, 1, 16), vocab)
    if isa == "torch":
        ex: Any = TorchExecutor(p, blocks=8, block_tokens=16, max_tokens=256)
    else:
        ex = small.executor(p, isa, 2)
    return run(small, ex, list(range(len(scores))))[:, : 2 * op.top]


ROUTES = [
    route(),
    route(experts=33, top=5, score="softmax", normalise=False, scale=2.5),
    route(experts=16, top=4, score="sigmoid", groups=4, top_groups=2, group_score="top2", scale=2.5),
    route(experts=16, top=4, score="softmax", groups=8, top_groups=3, group_score="max", normalise=False),
    route(experts=12, top=1, score="sigmoid", normalise=False),
    route(experts=6, top=6, score="softmax_top", normalise=False),
    route(experts=130, top=8, score="softmax_top", normalise=False),
]


@pytest.mark.parametrize("op", ROUTES)
@pytest.mark.parametrize("biased", [False, True])
def test_routes_are_those_of_torch(small: ModuleType, op: Route, biased: bool) -> None:
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((60, op.experts)).astype(np.float32) * 3
    scores[30:] = np.round(scores[30:])  # ties
    bias = np.round(rng.standard_normal((1, op.experts)) * 2).astype(np.float32) if biased else None
    want = routes(small, op, scores, "torch", bias)
    first = None
    for isa in ISAS:
        got = routes(small, op, scores, isa, bias)
        np.testing.assert_allclose(got[:, op.top :], want[:, op.top :], rtol=2e-6, atol=1e-30)
        np.testing.assert_array_equal(got[:, : op.top], want[:, : op.top])
        first = got if first is None else first
        np.testing.assert_array_equal(got.view(np.uint32), first.view(np.uint32), err_msg=isa)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_top"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_faulty_row_still_chooses_different_experts(small: ModuleType, score: Any, value: float) -> None:
    """Whatever the logits are, the numbers are experts: they become indices."""
    shape = Shape(tokens=4)
    logits = np.zeros((4, 8), np.float32)
    logits[1], logits[2, 3] = value, value
    ex = small.executor(program(small, shape, route(score=score), logits=logits))
    got = run(small, ex, [0, 1, 2, 3])
    clean = run(small, small.executor(program(small, shape, route(score=score), logits=logits[:1])), [0])
    np.testing.assert_array_equal(got[0], clean[0])


ACTS: list[dict[str, Any]] = [
    {},
    {"act": "gelu_tanh"},
    {"act": "relu"},
    {"act": "swiglu_oai", "limit": 0.3},
    {"weigh_input": True},
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("changes", ACTS)
@pytest.mark.parametrize("shape", [Shape(), Shape(width=33, hidden=17, out=5, experts=8), Shape(tokens=1)])
def test_float_experts_are_those_of_torch(
    small: ModuleType, isa: str, changes: dict[str, Any], shape: Shape
) -> None:
    for biases in (False, True):
        p = program(small, shape, route(), biases=biases, **changes)
        tokens = list(range(shape.tokens))
        want = run(small, TorchExecutor(p, blocks=8, block_tokens=16, max_tokens=256), tokens)
        got = run(small, small.executor(p, isa, 2), tokens)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def one_by_one(p: Program, isa: str, tokens: list[int], choice: F32) -> F32:
    """What the experts give, from the bare kernels, row by row and choice by choice."""
    pool = _kernels.ThreadPool(1)
    x = p.weights[0].read().view(np.float32).reshape(p.weights[0].rows, -1)
    gate, up, down = (
        [
            _kernels.pack(pool, isa, t.format, t.rows // t.experts, t.cols, t.expert(e))
            for e in range(t.experts)
        ]
        for t in p.weights[3:6]
    )
    top = choice.shape[1] // 2
    rows = []
    for t in tokens:
        total = np.zeros(down[0].rows)
        for i in range(top):
            e, share = int(choice[t, i]), choice[t, top + i].astype(np.float64)
            row = x[t : t + 1].copy()
            hidden = _kernels.elementwise(
                isa, "silu_mul", _kernels.gemm(pool, gate[e], row), _kernels.gemm(pool, up[e], row)
            )
            y = _kernels.gemm(pool, down[e], hidden.reshape(1, -1))[0].astype(np.float64)
            total = (total + share * y).astype(np.float32).astype(np.float64)  # a fused multiply-add
        rows.append(total.astype(np.float32))
    return np.stack(rows)


SIZES = {
    "F32": (33, 17, 5),
    "F16": (34, 50, 40),
    "BF16": (35, 47, 33),
    "Q4_0": (96, 64, 80),
    "Q8_0": (64, 96, 17),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_its_products_one_by_one(small: ModuleType, isa: str, kind: str) -> None:
    """To the last bit, for any number of threads, and in any batch (law 1)."""
    width, hidden, out = SIZES.get(kind, (256, 256, 40))
    shape = Shape(70, width, hidden, out, 6, 3)
    op = route(experts=6, top=3)
    p = program(small, shape, op, kind=kind)
    scores = p.weights[1].read().view(np.float32).reshape(p.weights[1].rows, -1)
    choice = routes(small, op, scores[:70], isa)
    want = one_by_one(p, isa, list(range(70)), choice)
    for threads in (1, 3):
        ex = small.executor(p, isa, threads)
        for tokens in (list(range(70)), [7], [69, 3], list(range(20, 37)), list(range(12, 0, -1))):
            got = run(small, ex, tokens)[:, :out]
            # Adding in float64 and rounding differs from a fused multiply-add in ties only.
            np.testing.assert_array_max_ulp(got, want[tokens], 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["F32", "Q4_0", "BF16"])
def test_bits_do_not_depend_on_chunks_or_neighbours(small: ModuleType, isa: str, kind: str) -> None:
    """Skewed too: most tokens go to two experts, some experts get none."""
    shape = Shape(70, 96, 64, 80, 16, 4)
    logits = np.random.default_rng(1).standard_normal((70, 16)).astype(np.float32)
    logits[:50, 3:5] += 9
    logits[:, 7] = -50
    p = program(small, shape, route(experts=16, top=4), kind=kind, logits=logits)
    ex = small.executor(p, isa, 2)
    whole = run(small, ex, list(range(70)))
    assert np.isfinite(whole).all()
    blocks = list(range(5))
    for chunk in (1, 3, 16, 49):
        got = small.chunked(ex, list(range(70)), blocks, chunk)
        np.testing.assert_array_equal(got.view(np.uint32), whole.view(np.uint32))
    for tokens in ([0], [49, 50, 69], [5] * 40):
        np.testing.assert_array_equal(run(small, ex, tokens), whole[tokens])


def test_every_table_gives_the_same_bits(small: ModuleType) -> None:
    for kind in ("F32", "Q4_0", "Q8_0"):
        p = program(small, Shape(), route(), kind=kind)
        rows = [run(small, small.executor(p, isa), list(range(70))) for isa in ISAS]
        for isa, other in zip(ISAS[1:], rows[1:], strict=True):
            np.testing.assert_array_equal(other, rows[0], err_msg=f"{kind} {isa}")


def test_all_to_one_expert(small: ModuleType) -> None:
    """More rows than a task takes, and 15 experts without any."""
    shape = Shape(200, 2048, 64, 32, 16, 1)
    logits = np.zeros((200, 16), np.float32)
    logits[:, 11] = 5
    p = program(small, shape, route(experts=16, top=1), kind="Q8_0", logits=logits)
    ex = small.executor(p, threads=2)
    whole = run(small, ex, list(range(200)))
    for t in (0, 47, 48, 199):
        np.testing.assert_array_equal(run(small, ex, [t])[0], whole[t])
    assert run(small, ex, []).shape == (0, p.vocab)


BAD: list[tuple[int, dict[str, Any], str]] = [
    (2, {"logits": X}, r"op 2 \(Route\): logits"),
    (2, {"bias": 0}, r"op 2 \(Route\): bias"),
    (2, {"out": X}, r"op 2 \(Route\): out"),
    (2, {"experts": 0}, r"op 2 \(Route\): experts"),
    (2, {"top": 9}, r"op 2 \(Route\): top"),
    (2, {"top": 0}, r"op 2 \(Route\): top"),
    (2, {"score": "relu"}, r"op 2 \(Route\): score"),
    (2, {"groups": 3}, r"op 2 \(Route\): groups"),
    (2, {"groups": 0}, r"op 2 \(Route\): groups"),
    (2, {"groups": 2, "top_groups": 3}, r"op 2 \(Route\): top_groups"),
    (2, {"groups": 8, "top_groups": 1}, r"op 2 \(Route\): top_groups"),
    (2, {"groups": 8, "top_groups": 2, "group_score": "top2"}, r"op 2 \(Route\): group_score"),
    (2, {"scale": np.inf}, r"op 2 \(Route\): scale"),
    (3, {"x": R}, r"op 3 \(Experts\): gate"),
    (3, {"route": R}, r"op 3 \(Experts\): route"),
    (3, {"experts": 4}, r"op 3 \(Experts\): route"),
    (3, {"top": 3}, r"op 3 \(Experts\): route"),
    (3, {"gate": 0}, r"op 3 \(Experts\): gate: .* experts"),
    (3, {"up": 5}, r"op 3 \(Experts\): up"),
    (3, {"down": 3}, r"op 3 \(Experts\): down"),
    (3, {"down_bias": 0}, r"op 3 \(Experts\): down_bias"),
    (3, {"out": X}, r"op 3 \(Experts\): "),
    (3, {"act": "sigmoid"}, r"op 3 \(Experts\): act"),
    (3, {"limit": np.nan}, r"op 3 \(Experts\): limit"),
]


@pytest.mark.parametrize(("index", "fields", "message"), BAD)
def test_bad_programs_are_refused(
    small: ModuleType, index: int, fields: dict[str, Any], message: str
) -> None:
    p = program(small, Shape(), route())
    ops = list(p.ops)
    ops[index] = replace(ops[index], **fields)
    with pytest.raises(ValueError, match=message):
        small.executor(replace(p, ops=tuple(ops)))


def test_a_route_that_was_overwritten_is_none(small: ModuleType) -> None:
    """Its numbers are indices: only a Route may write them."""
    p = program(small, Shape(width=4), route())
    weights = (*p.weights, small.tensor(np.zeros((p.vocab, 4))))
    ops = (*p.ops[:3], Embed(6, C, 1.0), *p.ops[3:])
    with pytest.raises(ValueError, match=r"op 4 \(Experts\): route"):
        small.executor(replace(p, ops=ops, weights=weights))


def test_experts_do_not_divide_the_rows(small: ModuleType) -> None:
    p = program(small, Shape(), route())
    weights = (*p.weights[:3], replace(p.weights[3], experts=7), *p.weights[4:])
    with pytest.raises(ValueError, match=r"tensor 'gate'.*experts"):
        small.executor(replace(p, weights=weights))


# ---- experts that stay in their file


def on_disk(p: Program, path: Path, weights: tuple[int, ...] = (3, 4, 5)) -> Program:
    """The same with these weights as views of a mapped file."""
    tensors = list(p.weights)
    path.write_bytes(b"".join(tensors[w].read().tobytes() for w in weights))
    data, at = np.memmap(path, np.uint8, "r"), 0
    for w in weights:
        size = tensors[w].data.nbytes
        tensors[w] = replace(tensors[w], data=np.asarray(data[at : at + size]))
        at += size
    return replace(p, weights=tuple(tensors))


def two_layers(p: Program) -> Program:
    """What the experts give goes through a second router and the same experts again."""
    embed, scores, choose, experts, gather, logits = p.ops
    assert isinstance(choose, Route)
    width, x2 = p.widths[X], len(p.widths)
    router = len(p.weights)
    table = np.random.default_rng(2).standard_normal((choose.experts, width)).astype(np.float32)
    tensor = Tensor("router", 0, *table.shape, table.reshape(-1).view(np.uint8))
    more: tuple[Op, ...] = (
        Linear(Y, (LinearPart(router, None, R),)),
        choose,
        replace(experts, x=Y, out=x2),  # type: ignore[call-arg]
        replace(gather, x=x2),  # type: ignore[call-arg]
    )
    ops = (embed, scores, choose, experts, *more, logits)
    return replace(p, ops=ops, weights=(*p.weights, tensor), widths=(*p.widths, width))


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_experts_on_disk_give_the_same_bits(small: ModuleType, tmp_path: Path, kind: str) -> None:
    """With room for all, for one layer's, and for hardly more, whatever was computed before."""
    shape = Shape(70, 96, 64, 96, 8, 2)
    p = two_layers(program(small, shape, route(), kind=kind))
    want = run(small, small.executor(p, threads=2), list(range(70)))
    mapped = on_disk(p, tmp_path / "experts")
    layer = sum(p.weights[w].data.nbytes for w in (3, 4, 5))
    for room in (4 * layer, 2 * layer, int(1.3 * layer)):
        ex = small.executor(mapped, threads=2, expert_bytes=room)
        for tokens in ([3], [60, 2], list(range(70)), [3], list(range(40, 10, -1))):
            got = run(small, ex, tokens)
            np.testing.assert_array_equal(got.view(np.uint32), want[tokens].view(np.uint32))


def test_too_little_room_for_experts_is_refused(small: ModuleType, tmp_path: Path) -> None:
    p = program(small, Shape(), route())
    with pytest.raises(ValueError, match="expert_bytes: 1000 do not hold the 8 experts of one layer"):
        small.executor(on_disk(p, tmp_path / "experts"), expert_bytes=1000)


def test_experts_that_are_in_no_file_cannot_stay_there(small: ModuleType, tmp_path: Path) -> None:
    p = program(small, Shape(), route())
    with pytest.raises(ValueError, match="tensor 'gate': its file"):
        small.executor(p, expert_bytes=1 << 30)
    data = [np.zeros(4 * 6 * 4, np.uint8)] * 2
    one = _kernels.map_experts(ISAS[0], 0, 12, 4, data)
    last = ("Logits", 1, 0, 2, 0.0, False)
    ops: list[tuple[object, ...]] = [("Embed", 0, 0, 1.0), ("GatherRows", 0, 1), last]
    with pytest.raises(ValueError, match=r"op 0 \(Embed\): table: must not stay in its file"):
        _kernels.Program(_kernels.ThreadPool(1), ISAS[0], ops, [4, 4, 12], [one], 1, 1, 16, 1, 1, 1)
    with pytest.raises(ValueError, match="data: differ in size"):
        _kernels.map_experts(ISAS[0], 0, 12, 4, [data[0], data[0][:-1]])
    with pytest.raises(ValueError, match="data: 96 bytes, expected 48"):
        _kernels.map_experts(ISAS[0], 0, 6, 4, data)
    with pytest.raises(ValueError, match="weight: stays in its file"):
        one.row(0)


def test_pages_of_a_file_are_given_back(small: ModuleType, tmp_path: Path) -> None:
    """Packing a mapped model leaves its pages outside, and what cannot be read again is left alone."""
    p = program(small, Shape(width=1024, hidden=256, out=1024), route())
    mapped = on_disk(p, tmp_path / "experts")
    small.executor(mapped)
    resident = [int(line.split()[1]) for line in smaps(tmp_path / "experts") if line.startswith("Rss:")]
    assert sum(resident) * 1024 < mapped.weights[3].data.nbytes / 10
    data = np.ones(1 << 16, np.uint8)
    pages.release(data)
    assert data.all()
    assert not pages.mapped(data)
    assert pages.mapped(mapped.weights[3].read())


def smaps(path: Path) -> list[str]:
    """The lines of /proc/self/smaps about mappings of a file."""
    lines, here = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(path))
        if here:
            lines.append(line)
    return lines
