// Shared memory, and reductions and scans over a block of one dimension.
#pragma once

#include "common/cuda/warp.cuh"

namespace tokred::cuda {

// The block's dynamic shared memory as the struct that documents it; LaunchPlan::shared_bytes must
// cover it. It starts as garbage.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  static_assert(alignof(T) <= 16);
#ifdef TOKRED_SIMT
  return *static_cast<T*>(simt::shared_memory());
#else
  extern __shared__ uint4 tokred_shared_memory[];
  return *reinterpret_cast<T*>(tokred_shared_memory);
#endif
}

// Room for one partial result per warp.
template <class T>
struct BlockScratch {
  T partial[kWarp];
};

// The sum over the block, in every thread.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x, BlockScratch<float>& scratch) {
  x = warp_sum(x);
  if (lane_id() == 0) scratch.partial[warp_id()] = x;
  __syncthreads();
  x = lane_id() < kThreads / kWarp ? scratch.partial[lane_id()] : 0.0f;
  __syncthreads();
  return warp_sum(x);
}

// The sum of x over the threads before this one, and over all of them in `total`.
template <int kThreads>
__device__ __forceinline__ int block_exclusive_sum(int x, BlockScratch<int>& scratch, int& total) {
  const int inclusive = warp_inclusive_sum(x);
  if (lane_id() == kWarp - 1) scratch.partial[warp_id()] = inclusive;
  __syncthreads();
  const int partial = lane_id() < kThreads / kWarp ? scratch.partial[lane_id()] : 0;
  __syncthreads();
  const int sums = warp_inclusive_sum(partial);
  total = __shfl_sync(kAllLanes, sums, kWarp - 1);
  const int before = __shfl_sync(kAllLanes, sums - partial, warp_id());
  return before + inclusive - x;
}

}  // namespace tokred::cuda
