// Rows that will be read soon, on their way to the second-level cache while products keep the core
// busy, some of their lines at a time: a burst of prefetches fills the queue of misses. The queue
// of the first-level cache is short (24 lines on Zen 4): prefetches to it reach half of the
// bandwidth.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

// Inlined: GCC drops calls of functions that only prefetch.
TOKRED_INLINE void prefetch_line(const void* at) { __builtin_prefetch(at, 0, 2); }

// Lines `first`, first + step, ... of a row.
template <class T>
TOKRED_INLINE void prefetch_lines(const T* row, int64_t dim, int64_t first, int64_t step) {
  constexpr int64_t kOfLine = 64 / sizeof(T);
  for (int64_t i = first * kOfLine; i < dim; i += step * kOfLine) prefetch_line(row + i);
}

}  // namespace tokred::TOKRED_ISA
