// Radix select: finds the key of a rank by histograms of eleven bits. Keys may come in any order
// and from anywhere; only counts of them are used, so the order of atomics never shows.
#pragma once

#include "common/cuda/block.cuh"
#include "topk/cuda/key.cuh"
#include "topk/cuda/plan.h"

namespace tokred::cuda::selecting {

struct KeyRange {
  uint64_t low, high;
};

template <int kThreads>
struct NarrowShared {
  int histogram[kTopkBins];
  BlockScratch<int> partial;
  BlockScratch<uint64_t> partial_keys;
  int bin, upto;  // the bin that has the rank, and how many keys there are up to its end
  int count;      // of keys pushed
};

// The maximum of the block's keys, in every thread.
template <int kThreads>
__device__ __forceinline__ uint64_t block_max(uint64_t x, BlockScratch<uint64_t>& scratch) {
  x = warp_max(x);
  if (lane_id() == 0) scratch.partial[warp_id()] = x;
  __syncthreads();
  x = lane_id() < kThreads / kWarp ? scratch.partial[lane_id()] : 0;
  __syncthreads();
  return warp_max(x);
}

// add(..) of x over the threads before this one, 0 before the first; `add` is associative.
template <int kThreads, class Add>
__device__ __forceinline__ uint64_t block_exclusive_scan(uint64_t x,
                                                         BlockScratch<uint64_t>& scratch, Add add) {
  const auto scan = [&](uint64_t y) {
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, y, step);
      if (lane_id() >= step) y = add(other, y);
    }
    return y;
  };
  const auto before = [](uint64_t y, int lane) {
    const uint64_t other = __shfl_up_sync(kAllLanes, y, 1);
    return lane == 0 ? 0 : other;
  };
  const uint64_t inclusive = scan(x);
  if (lane_id() == kWarp - 1) scratch.partial[warp_id()] = inclusive;
  __syncthreads();
  const uint64_t partial = lane_id() < kThreads / kWarp ? scratch.partial[lane_id()] : 0;
  __syncthreads();
  const uint64_t warps = __shfl_sync(kAllLanes, before(scan(partial), lane_id()), warp_id());
  return add(warps, before(inclusive, lane_id()));
}

// In which bin the rank-th key lies, where `before` keys precede the bins; for the whole block.
template <int kThreads>
__device__ __forceinline__ void find_bin(NarrowShared<kThreads>& s, int before, int64_t rank) {
  constexpr int kOwn = kTopkBins / kThreads;
  const int* own = s.histogram + threadIdx.x * kOwn;
  int sum = 0, total;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i];
  before += block_exclusive_sum<kThreads>(sum, s.partial, total);
  if (before < rank && rank <= before + sum) {
    int i = 0;
    while (before + own[i] < rank) before += own[i++];
    s.bin = static_cast<int>(threadIdx.x) * kOwn + i;
    s.upto = before + own[i];
  }
  __syncthreads();
}

// A key that at least `rank` and at most `limit` of the keys do not exceed; kLastKey where there
// are fewer than `rank`. each(f) calls f(key) for every key, by the whole block; where the key
// sought lies outside `range`, which is only a guess, more passes follow.
template <int kThreads, class Each>
__device__ uint64_t narrow(KeyRange range, int64_t rank, int64_t limit, NarrowShared<kThreads>& s,
                           Each each) {
  for (;;) {
    const int shift = max(0, 64 - __clzll(range.high - range.low) - 11);
    for (int i = static_cast<int>(threadIdx.x); i < kTopkBins; i += kThreads) s.histogram[i] = 0;
    __syncthreads();
    int lower = 0, within = 0, below, inside;
    each([&](uint64_t key) {
      if (key < range.low) {
        ++lower;
      } else if (key <= range.high) {
        ++within;
        atomicAdd(&s.histogram[(key - range.low) >> shift], 1);
      }
    });
    block_exclusive_sum<kThreads>(lower, s.partial, below);
    block_exclusive_sum<kThreads>(within, s.partial, inside);
    if (rank <= below) {
      range = {0, range.low - 1};
    } else if (rank > int64_t{below} + inside) {
      if (range.high == kLastKey) return kLastKey;
      range = {range.high + 1, kLastKey};
    } else {
      find_bin<kThreads>(s, below, rank);
      range.low += static_cast<uint64_t>(s.bin) << shift;
      range.high = min(range.high - range.low, (uint64_t{1} << shift) - 1) + range.low;
      if (s.upto <= limit) return range.high;
    }
  }
}

}  // namespace tokred::cuda::selecting
