// Rotated values that one block does not hold whole: rows of out are rotated back afterwards.
#pragma once

#include "attention/params.h"
#include "kv_pack/cuda/codes.cuh"
#include "packed_attn/cuda/plan.h"

namespace tokred::cuda::attention {

// Rotates the rows of out back, a warp each.
__global__ void __launch_bounds__(kCombineThreads)
    rotate_out_kernel(const __grid_constant__ AttentionParams p) {
  const int64_t flat = int64_t{blockIdx.x} * (kCombineThreads / kWarp) + warp_id();
  if (flat >= p.batch * p.heads_q * p.queries) return;
  float* row = static_cast<float*>(p.out) + flat % p.queries * p.out_stride_token +
               flat / p.queries % p.heads_q * p.out_stride_head +
               flat / p.queries / p.heads_q * p.out_stride_batch + 8 * lane_id();
  const bool exists = 8 * lane_id() < p.value_dim;
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = exists ? row[i] : 0.0f;
  packing::rotate_row(x, p.value_dim);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (exists) row[i] = x[i];
  }
}

}  // namespace tokred::cuda::attention
