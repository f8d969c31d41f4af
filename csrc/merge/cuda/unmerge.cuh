// unmerge and compose: gathers by a token map, of rows and of the entries of another map.
#pragma once

#include "common/cuda/row_io.cuh"
#include "merge/cuda/plan.h"
#include "merge/params.h"

namespace tokred::cuda::merging {

template <class T, int kWidth>
__global__ void __launch_bounds__(kMergeThreads)
    unmerge_kernel(const __grid_constant__ UnmergeParams p) {
  const int64_t row = int64_t{blockIdx.x} * (kMergeThreads / kWarp) + warp_id();
  if (row >= p.batch * p.tokens) return;
  const int64_t item = row / p.tokens, token = row % p.tokens;
  const int64_t slot = p.token_map[item * p.map_stride_batch + token * p.map_stride_token];
  T* x = static_cast<T*>(p.x) + row * p.channels;
  if (slot < 0 || slot >= p.num_out) return zero_row<kWidth>(x, p.channels);
  const T* y = static_cast<const T*>(p.y) + item * p.y_stride_batch + slot * p.y_stride_token;
  copy_row<kWidth>(x, y, p.channels);
}

static __global__ void __launch_bounds__(kMergeThreads)
    compose_kernel(const __grid_constant__ ComposeParams p) {
  const int64_t entry = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (entry >= p.batch * p.tokens) return;
  const int64_t item = entry / p.tokens, token = entry % p.tokens;
  const int64_t slot = p.first[item * p.first_stride_batch + token * p.first_stride_token];
  p.out[entry] = slot >= 0 && slot < p.num_out
                     ? p.second[item * p.second_stride_batch + slot * p.second_stride_token]
                     : -1;
}

}  // namespace tokred::cuda::merging
