// Reductions and scans over the 32 lanes of a warp, as fixed trees.
#pragma once

#include "common/cuda/numbers.cuh"

namespace tokred::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// Every group of kWidth neighbouring lanes gets its own result, in all of its lanes.
template <int kWidth = kWarp, class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <int kWidth = kWarp, class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// x summed over the lanes up to and including this one.
__device__ __forceinline__ int warp_inclusive_sum(int x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, step);
    if (lane_id() >= step) x += other;
  }
  return x;
}

// How many lanes below this one have the predicate.
__device__ __forceinline__ int lanes_before(unsigned ballot) {
  return __popc(ballot & ((1u << lane_id()) - 1));
}

}  // namespace tokred::cuda
