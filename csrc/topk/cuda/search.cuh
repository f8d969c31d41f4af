// Binary search, and stream compaction by a block.
#pragma once

#include "common/cuda/block.cuh"

namespace tokred::cuda::selecting {

// The first of [0, end) for which `is` holds; from there on it must hold everywhere.
template <class Is>
__device__ __forceinline__ int64_t first_where(int64_t end, Is is) {
  int64_t begin = 0;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (is(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// Calls f(rank, j) for the entries j of [begin, end) with the predicate, `rank` of which come
// before; returns their number. By the whole block.
template <int kThreads, class Predicate, class F>
__device__ __forceinline__ int64_t enumerate(int64_t begin, int64_t end, BlockScratch<int>& scratch,
                                             Predicate predicate, F f) {
  int64_t before = 0;
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t j = first + threadIdx.x;
    const bool has = j < end && predicate(j);
    int total;
    const int rank = block_exclusive_sum<kThreads>(has, scratch, total);
    if (has) f(before + rank, j);
    before += total;
  }
  return before;
}

}  // namespace tokred::cuda::selecting
