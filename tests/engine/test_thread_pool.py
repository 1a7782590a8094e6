"""The pool as Python sees it: shared, harmless to the caller, asleep when idle."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ktransformers.engine import _kernels


def weight(pool: _kernels.ThreadPool, rows: int = 64, cols: int = 32) -> _kernels.Weight:
    values = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols) / 100
    return _kernels.pack(pool, _kernels.isas()[0], 0, rows, cols, values.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_sizes_are_checked(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        _kernels.ThreadPool(threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    x = np.random.default_rng(0).normal(size=(37, 32)).astype(np.float32)
    one, many = _kernels.ThreadPool(1), _kernels.ThreadPool(threads)
    assert many.threads == threads
    np.testing.assert_array_equal(_kernels.gemm(many, weight(many), x), _kernels.gemm(one, weight(one), x))


def test_callers_exclude_each_other() -> None:
    pool = _kernels.ThreadPool(3)
    w = weight(pool)
    inputs = [np.random.default_rng(i).normal(size=(9, 32)).astype(np.float32) for i in range(4)]
    expected = [_kernels.gemm(pool, w, x) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        same = [np.array_equal(_kernels.gemm(pool, w, inputs[i]), expected[i]) for _ in range(100)]
        wrong.extend([i] * same.count(False))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert wrong == []


def test_the_callers_affinity_is_left_as_it_was() -> None:
    before = os.sched_getaffinity(0)
    pool = _kernels.ThreadPool(len(before))
    _kernels.gemm(pool, weight(pool), np.ones((3, 32), np.float32))
    assert os.sched_getaffinity(0) == before


def test_an_idle_pool_burns_no_cpu() -> None:
    pool = _kernels.ThreadPool(4)
    _kernels.gemm(pool, weight(pool), np.ones((50, 32), np.float32))

    def burnt(seconds: float) -> float:
        before = time.process_time()
        time.sleep(seconds)
        return time.process_time() - before

    # Threads spin for a moment before they sleep; on a busy machine that moment comes late.
    assert any(burnt(0.3) < 0.01 for _ in range(20))


def test_threads_end_with_the_pool() -> None:
    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir()))
    pool = _kernels.ThreadPool(6)
    assert len(list(tasks.iterdir())) == before + 5
    del pool
    assert len(list(tasks.iterdir())) == before
