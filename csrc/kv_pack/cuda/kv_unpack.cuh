// kv_unpack: rows of codes back to numbers. A part of a warp has a row, eight neighbouring channels
// a lane.
#pragma once

#include "common/cuda/row_io.cuh"
#include "kv_pack/cuda/codes.cuh"
#include "kv_pack/cuda/groups.cuh"
#include "kv_pack/cuda/plan.h"

namespace tokred::cuda::packing {

// Rows [B, H, S] of a packed tensor, in order.
template <class T, int kLanes>
__global__ void __launch_bounds__(kPackThreads)
    unpack_kernel(const __grid_constant__ KvUnpackParams p) {
  const PackedRows& packed = p.packed;
  const PackFormat& f = packed.format;
  const int dim = static_cast<int>(f.head_dim);
  const int channel = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int64_t row =
      int64_t{blockIdx.x} * (kPackThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  const int64_t token = row % packed.rows, head = row / packed.rows % p.heads;
  const int64_t batch = row / packed.rows / p.heads;
  float x[8] = {};
  if (row < p.batch * p.heads * packed.rows && channel < dim) {
    RowReader reader(packed, batch, head, channel, CodeReader(f, channel));
    reader.numbers(x, token);
  }
  if (f.rotated) rotate_row(x, dim);
  if (row >= p.batch * p.heads * packed.rows) return;
  auto* to = static_cast<T*>(const_cast<void*>(p.out.data)) + batch * p.out.stride_batch +
             head * p.out.stride_head + token * dim;
  store_eight(to, channel, dim, is_aligned(p.out, p.dtype), x);
}

}  // namespace tokred::cuda::packing
