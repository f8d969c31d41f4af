// replace_token: a block a head, of which one warp copies the row of keys and one that of values.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/warp.cuh"
#include "topk/cuda/plan.h"
#include "topk/params.h"

namespace tokred::cuda::selecting {

template <class Unit>
__device__ __forceinline__ void copy_units(char* to, const char* from, int64_t bytes) {
  const int64_t units = bytes / static_cast<int64_t>(sizeof(Unit));
  const auto* source = reinterpret_cast<const Unit*>(from);
  auto* target = reinterpret_cast<Unit*>(to);
  for (int64_t u = lane_id(); u < units; u += kWarp) target[u] = source[u];
}

__device__ __forceinline__ void replace_row(const ReplacedRows& rows, int64_t batch, int64_t head,
                                            int64_t slot) {
  char* to = static_cast<char*>(rows.tokens) + batch * rows.stride_batch + head * rows.stride_head +
             slot * rows.stride_token;
  const char* from = static_cast<const char*>(rows.token) + batch * rows.token_stride_batch +
                     head * rows.token_stride_head;
  if (is_aligned(to, rows.row_bytes, 1) && is_aligned(from, 0, 1)) {
    copy_units<Chunk>(to, from, rows.row_bytes);
  } else {
    copy_units<char>(to, from, rows.row_bytes);
  }
}

static __global__ void __launch_bounds__(kReplaceThreads)
    replace_token_kernel(const __grid_constant__ ReplaceTokenParams p) {
  for (int64_t row = blockIdx.x; row < p.batch * p.heads; row += gridDim.x) {
    const int64_t batch = row / p.heads, head = row % p.heads;
    const int64_t slot = p.slot[batch * p.slot_stride_batch + head * p.slot_stride_head];
    if (slot < 0 || slot >= p.slots) continue;
    if (warp_id() == 0) {
      replace_row(p.keys, batch, head, slot);
    } else {
      replace_row(p.values, batch, head, slot);
    }
    if (threadIdx.x > 0 || !p.position) continue;
    p.position[batch * p.position_stride_batch + head * p.position_stride_head +
               slot * p.position_stride_token] = p.new_position;
  }
}

}  // namespace tokred::cuda::selecting
