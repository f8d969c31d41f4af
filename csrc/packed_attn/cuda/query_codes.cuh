// Query rows that are multiplied with codes: the order of their channels, and their sums over the
// groups of packed keys, which are multiplied with the offsets of the groups.
#pragma once

#include "common/cuda/mma_tile.cuh"
#include "kv_pack/params.h"

namespace tokred::cuda::attention {

// Tiles of codes, and what is multiplied with them, have channels 1 and 2 of every four exchanged:
// so two masks make pairs of the bytes of a word.
__device__ __forceinline__ void order_codes(float (&x)[8]) {
#pragma unroll
  for (int i = 1; i < 8; i += 4) {
    const float second = x[i];
    x[i] = x[i + 1];
    x[i + 1] = second;
  }
}

// The sums of the query rows over the groups of keys; after a barrier behind their loads.
template <class C, class Shared>
__device__ __forceinline__ void sum_queries(Shared& shared, const PackFormat& f) {
  const int size = static_cast<int>(f.group_size), groups = static_cast<int>(groups_per_row(f));
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < C::kRows * groups; i += threads) {
    const int row = i % C::kRows, group = i / C::kRows;
    float sum = 0.0f;
    for (int c = group * size; c < (group + 1) * size; ++c) {
      sum += to_float(shared.query.plane[1][row][c]) + to_float(shared.query.plane[0][row][c]);
    }
    shared.query_sum[row][group] = sum;
  }
}

}  // namespace tokred::cuda::attention
