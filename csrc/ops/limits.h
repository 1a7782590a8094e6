// How fast this machine computes and reads, measured: the bounds that benchmarks are held against.
#pragma once
#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/thread_pool.h"

namespace kt {

// Operations per second (a multiplication and an addition are two) of the table's dot product on all threads of the pool:
// the best of the short rounds that fit in `seconds`, as what disturbs a round only makes it longer. 0: there is none.
double measure_peak(ThreadPool& pool, const KernelTable& table, Activation kind, double seconds);

// Bytes per second that all threads together read of `bytes` in huge pages, the best of several passes within `seconds`
// (two at least). std::bad_alloc.
double measure_read(ThreadPool& pool, const KernelTable& table, int64_t bytes, double seconds);

}  // namespace kt
