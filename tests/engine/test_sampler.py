"""The sampler against a plain numpy one, and at its edges."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.batch import MAX_LOGPROBS, Drawn, SamplingBatch
from ktransformers.engine.protocol import Sampling
from ktransformers.engine.sampler import SamplingTable, check_sampling

DRAWS = 20_000


def draw(logits: Any, s: SamplingBatch) -> Drawn:
    logits = np.ascontiguousarray(logits, np.float32)
    rows = len(logits)
    before = logits.copy()
    shape = (rows, MAX_LOGPROBS)
    token, logprob = np.empty(rows, np.int32), np.empty(rows, np.float32)
    d = Drawn(token, logprob, np.empty(shape, np.int32), np.empty(shape, np.float32))
    _kernels.sample(
        logits, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition, s.presence, s.frequency, s.seed,
        s.position, s.logprobs, s.history_starts, s.history, s.history_output,
        s.bias_starts, s.bias_tokens, s.bias_values, d.token, d.logprob, d.top_tokens, d.top_logprobs,
    )  # fmt: skip
    np.testing.assert_array_equal(logits, before)
    return d


def philox(seed: int, position: int) -> float:
    """Philox4x32-10, from its definition."""
    c, k = [position % 2**32, position >> 32, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) / 2**53


def oracle(x: Any, s: SamplingBatch, r: int) -> tuple[int, Any]:
    """(token, probabilities) of row r by sorting everything, in float64."""
    x = np.asarray(x, np.float32).astype(np.float64)
    history = s.history[s.history_starts[r] : s.history_starts[r + 1]]
    output = history[s.history_output[r] :]
    for t in set(history.tolist()):
        x[t] = x[t] / s.repetition[r] if x[t] > 0 else x[t] * s.repetition[r]
        n = int((output == t).sum())
        x[t] -= s.frequency[r] * n + (s.presence[r] if n else 0.0)
    for i in range(s.bias_starts[r], s.bias_starts[r + 1]):
        x[s.bias_tokens[i]] += s.bias_values[i]
    rank = np.lexsort((np.arange(len(x)), -x))
    if s.temperature[r] == 0:
        return int(rank[0]), np.eye(len(x))[rank[0]]
    p = np.exp((x - x.max()) / np.float64(s.temperature[r]))
    if s.top_k[r]:
        p[rank[s.top_k[r] :]] = 0
    cumulative = np.cumsum(p[rank]) / p.sum()
    if s.top_p[r] < 1:
        p[rank[np.searchsorted(cumulative, s.top_p[r]) + 1 :]] = 0
    p[p < s.min_p[r] * p.max()] = 0
    p /= p.sum()
    u = philox(int(s.seed[r]), int(s.position[r]))
    return int(min(np.searchsorted(np.cumsum(p), u, side="right"), np.flatnonzero(p)[-1])), p


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 7.0},
    "cold": {"temperature": 1e-3},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "large top_k": {"top_k": 900},
    "top_k beyond": {"top_k": 5000},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-6},
    "flat top_p": {"top_p": 0.9, "temperature": 50.0},
    "min_p": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "all": {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("vocab", [1, 5, 64, 1000, 1003])
@pytest.mark.parametrize("name", SETTINGS)
def test_against_sorting_everything(small: ModuleType, name: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows = 40
    logits = rng.normal(size=(rows, vocab)).astype(np.float32) * 4
    s = small.sampling(
        rows, seed=rng.integers(0, 2**63, rows), position=rng.integers(0, 2**20, rows), **SETTINGS[name]
    )
    got = draw(logits, s).token
    want = [oracle(logits[r], s, r)[0] for r in range(rows)]
    # A draw within rounding of a boundary may fall to the neighbour.
    assert (got == want).mean() >= 0.97
    assert all(oracle(logits[r], s, r)[1][got[r]] > 0 for r in range(rows))


def test_penalties_and_bias(small: ModuleType) -> None:
    rng = np.random.default_rng(1)
    rows, vocab = 60, 300
    logits = rng.normal(size=(rows, vocab)).astype(np.float32) * 2
    lengths = rng.integers(0, 80, rows)
    biases = rng.integers(0, 5, rows)
    s = small.sampling(
        rows,
        temperature=0.0,
        repetition=rng.choice([1.0, 1.3, 0.8], rows),
        presence=rng.choice([0.0, 0.5, -1.0], rows),
        frequency=rng.choice([0.0, 0.4, -0.3], rows),
        history_starts=np.cumsum([0, *lengths]),
        history=rng.integers(0, 40, lengths.sum()),
        history_output=rng.integers(0, lengths + 1),
        bias_starts=np.cumsum([0, *biases]),
        bias_tokens=rng.integers(0, vocab, biases.sum()),
        bias_values=rng.choice([4.0, -4.0, -np.inf], biases.sum()),
    )
    d = draw(logits, s)
    np.testing.assert_array_equal(d.token, [oracle(logits[r], s, r)[0] for r in range(rows)])


def test_distribution(small: ModuleType) -> None:
    """Chi-square of 20,000 draws by position, all filters on, at one part in a million."""
    logits = np.tile(np.log(np.arange(1, 41, dtype=np.float32)), (DRAWS, 1))
    s = small.sampling(
        DRAWS, temperature=0.9, top_k=30, top_p=0.95, min_p=0.1, seed=42, position=np.arange(DRAWS)
    )
    tokens = draw(logits, s).token
    p = oracle(logits[0], s, 0)[1]
    counts = np.bincount(tokens, minlength=40)
    assert counts[p == 0].sum() == 0
    kept = p > 0
    chi2 = (((counts - DRAWS * p) ** 2)[kept] / (DRAWS * p[kept])).sum()
    freedom = kept.sum() - 1
    assert chi2 < freedom + 4.75 * np.sqrt(2 * freedom) + 15


def test_a_draw_depends_on_seed_and_position_only(small: ModuleType) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(50, 500)).astype(np.float32)
    seed, position = rng.integers(0, 2**63, 50), rng.integers(0, 2**40, 50)
    together = draw(logits, small.sampling(50, seed=seed, position=position)).token
    alone = [
        draw(logits[i : i + 1], small.sampling(1, seed=seed[i], position=position[i])).token[0]
        for i in range(50)
    ]
    np.testing.assert_array_equal(together, alone)
    assert len(set(draw(np.zeros((50, 500)), small.sampling(50, seed=seed)).token.tolist())) > 30
    assert len(set(draw(np.zeros((50, 500)), small.sampling(50, position=position)).token.tolist())) > 30


def test_philox_known_answer(small: ModuleType) -> None:
    """Random123's vector for a zero key and counter begins 6627e8d5 e169c58d."""
    assert philox(0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    vocab = 4096
    token = draw(np.zeros((1, vocab)), small.sampling(1)).token[0]
    assert token == int(philox(0, 0) * vocab)


def test_logprobs_are_of_the_raw_distribution(small: ModuleType) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 700)).astype(np.float32) * 3
    s = small.sampling(3, temperature=0.0, logprobs=[20, 0, -1], repetition=3.0, history_starts=[0, 2, 4, 6],
                       history=[1, 2] * 3, bias_starts=[0, 1, 2, 3], bias_tokens=[9, 9, 9],
                       bias_values=[50.0] * 3)  # fmt: skip
    d = draw(logits, s)
    assert d.token.tolist() == [9, 9, 9]
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(1, keepdims=True))
    np.testing.assert_allclose(d.logprob[:2], expected[:2, 9], rtol=1e-5, atol=1e-5)
    assert d.logprob[2] == 0
    order = np.argsort(-x[0], kind="stable")[:20]
    np.testing.assert_array_equal(d.top_tokens[0], order)
    np.testing.assert_allclose(d.top_logprobs[0], expected[0, order], rtol=1e-5, atol=1e-5)
    assert (d.top_tokens[1:] == -1).all()


def test_ties_go_to_the_lowest_id(small: ModuleType) -> None:
    logits = np.zeros((4, 200), np.float32)
    logits[:, [150, 70, 180]] = 2.0
    s = small.sampling(4, temperature=[0, 1, 1, 1], top_k=[0, 1, 0, 2], top_p=[1, 1, 1e-9, 1],
                       seed=[0, 1, 2, 3], logprobs=3)  # fmt: skip
    d = draw(logits, s)
    assert d.token[:3].tolist() == [70, 70, 70]
    assert d.token[3] in (70, 150)
    np.testing.assert_array_equal(d.top_tokens[:, :4], [[70, 150, 180, -1]] * 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", [0, 63, 64, 498])
def test_a_row_that_is_not_finite_draws_nothing(
    small: ModuleType, bad: float, temperature: float, where: int
) -> None:
    logits = np.random.default_rng(5).normal(size=(3, 499)).astype(np.float32)
    s = small.sampling(3, temperature=temperature, logprobs=2)
    clean = draw(logits, s)
    logits[1, where] = bad
    d = draw(logits, s)
    assert d.token[1] == -1
    for name in ("token", "logprob", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(d, name)[[0, 2]], getattr(clean, name)[[0, 2]])


def test_bans(small: ModuleType) -> None:
    logits = np.array([[9.0, 1.0, 5.0]] * 3, np.float32)
    ban = {"bias_starts": [0, 1, 3, 6], "bias_tokens": [0, 0, 2, 0, 1, 2], "bias_values": [-np.inf] * 6}
    assert draw(logits, small.sampling(3, temperature=0.0, **ban)).token.tolist() == [2, 1, -1]
    for position in range(200):
        d = draw(logits, small.sampling(3, temperature=100.0, position=position, **ban))
        assert d.token[0] in (1, 2)
        assert d.token[1:].tolist() == [1, -1]


def test_extreme_numbers(small: ModuleType) -> None:
    big = np.float32(3e38)
    logits = np.array([[big, -big, 0.0, big]] * 2, np.float32)
    assert set(draw(logits, small.sampling(2, temperature=[1e-30, 1e30])).token.tolist()) <= {0, 1, 2, 3}
    tiny = draw(np.array([[0.0, 1e-30, 0.0]]), small.sampling(1, temperature=1e-38)).token[0]
    assert tiny == 1
    # A penalty may overflow; the row then has no answer, and no other row is harmed.
    s = small.sampling(2, repetition=[1e-30, 1.0], history_starts=[0, 1, 1], history=[0])
    assert draw(logits, s).token[0] == -1


BAD: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": -1e-3}),
    ("temperature", {"temperature": np.nan}),
    ("temperature", {"temperature": np.inf}),
    ("top_k", {"top_k": -1}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": np.nan}),
    ("min_p", {"min_p": -0.1}),
    ("min_p", {"min_p": 1.5}),
    ("repetition", {"repetition": 0.0}),
    ("repetition", {"repetition": np.inf}),
    ("presence", {"presence": np.nan}),
    ("frequency", {"frequency": -np.inf}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": -2}),
    ("temperature", {"temperature": [1.0]}),
    ("seed", {"seed": [1, 2, 3]}),
    ("history_starts", {"history_starts": [0, 1, 2]}),
    ("history_starts", {"history_starts": [0, 2, 1], "history": [0]}),
    ("history_starts", {"history_starts": [1, 1, 1], "history": [0]}),
    ("history_starts", {"history_starts": [0, 0]}),
    ("history", {"history_starts": [0, 1, 1], "history": [100]}),
    ("history", {"history_starts": [0, 1, 1], "history": [-1]}),
    ("history_output", {"history_output": [1, 0]}),
    ("bias_starts", {"bias_starts": [0, 0, 1]}),
    ("bias_tokens", {"bias_starts": [0, 1, 1], "bias_tokens": [100], "bias_values": [0]}),
    ("bias_values", {"bias_starts": [0, 1, 1], "bias_tokens": [1]}),
    ("bias_values", {"bias_starts": [0, 1, 1], "bias_tokens": [1], "bias_values": [np.inf]}),
    ("bias_values", {"bias_starts": [0, 1, 1], "bias_tokens": [1], "bias_values": [np.nan]}),
]


@pytest.mark.parametrize(("name", "changes"), BAD)
def test_bad_parameters_are_refused_by_name(small: ModuleType, name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        draw(np.zeros((2, 100)), small.sampling(2, **changes))


EXTREMES: list[dict[str, Any]] = [
    *({"temperature": t} for t in (0.0, 5e-324, 1e-40, 100.0)),
    *({"top_p": p} for p in (0.0, 5e-324, 1e-40, 1.0)),
    *({"min_p": p} for p in (0.0, 5e-324, 1.0)),
    *({"repetition_penalty": x} for x in (1e-3, 1e3)),
    *({"presence_penalty": x, "frequency_penalty": x} for x in (-1e3, 1e3)),
    *({"logit_bias": ((7, x),)} for x in (-np.inf, -1e6, 1e6, 1e-320)),
    {"top_k": 2**31 - 1, "seed": 2**63 - 1, "logprobs": 20, "min_tokens": 2**31 - 1, "stop_tokens": (1, 2)},
]


@pytest.mark.parametrize("changes", EXTREMES, ids=str)
def test_what_the_engine_lets_in_the_kernels_take(changes: dict[str, Any]) -> None:
    """One row that a kernel refuses costs all other rows of its step a second computation."""
    sampling = Sampling(max_tokens=1, **changes)
    check_sampling(sampling, 100)
    table = SamplingTable(1)
    table.put(0, sampling)
    slot, ten = np.zeros(1, np.int32), np.full(1, 10, np.int32)
    batch = table.batch(slot, np.zeros((1, 20), np.int32), ten, ten // 2)
    assert 0 <= draw(np.linspace(-5, 5, 100)[None], batch).token[0] < 100
