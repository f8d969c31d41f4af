// Mean and variance of numbers that come in parts.
#pragma once

#include "common/cuda/warp.cuh"

namespace tokred::cuda::scoring {

struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;  // squares: of the distances from the mean

  // The moments of both parts (Chan, Golub and LeVeque 1979).
  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0.0f) return;
    const float total = count + other.count, delta = other.mean - mean;
    const float share = other.count / total;
    mean = fmaf(delta, share, mean);
    squares += other.squares + delta * delta * count * share;
    count = total;
  }

  // Of kWidth neighbouring lanes, in the first of them.
  template <int kWidth>
  __device__ __forceinline__ void merge_lanes() {
#pragma unroll
    for (int step = 1; step < kWidth; step *= 2) {
      Moments other;
      other.count = __shfl_xor_sync(kAllLanes, count, step);
      other.mean = __shfl_xor_sync(kAllLanes, mean, step);
      other.squares = __shfl_xor_sync(kAllLanes, squares, step);
      merge(other);
    }
  }
};

}  // namespace tokred::cuda::scoring
