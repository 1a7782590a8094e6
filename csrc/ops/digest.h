// A digest of large memory, about as fast as it can be read.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/thread_pool.h"

namespace kt {

// 64 bits that tell two contents of the same size apart, by chance alone: it is no match for who looks for a collision.
// The same on every machine and for any number of threads.
uint64_t digest(ThreadPool& pool, const uint8_t* data, size_t size);

}  // namespace kt
