// Flash-Decoding, second kernel: the partial results of a decode's splits are added up.
#pragma once

#include "attention/cuda/decode.cuh"

namespace tokred::cuda::attention {

inline constexpr int kCombineWarps = kCombineThreads / kWarp;

// Of rows of up to kDim columns.
template <int kDim>
struct CombineShared {
  float out[kCombineWarps][kDim];
  float sum[kCombineWarps];
};

// One row of a row tile. Warp w adds up splits w, w + kCombineWarps, ..; then come the warps.
template <class T, int kDim = 256>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ DecodeParams p) {
  auto& shared = shared_memory<CombineShared<kDim>>();
  const AttentionParams& a = p.sparse.attention;
  const int64_t local = blockIdx.x / p.tile_rows, row = blockIdx.x % p.tile_rows;
  const int64_t row_tiles = gridDim.x / p.tile_rows, slot = local * p.splits * p.tile_rows + row;
  const RowTile row_tile(p, p.first_tile_of_launch + local);
  if (row >= row_tile.rows) return;

  float top = -kInfinity;
  for (int64_t s = lane_id(); s < p.splits; s += kWarp) {
    top = fmaxf(top, p.partial_state(row_tiles, slot + s * p.tile_rows)[0]);
  }
  top = warp_max(top);
  const float base = top == -kInfinity ? 0.0f : top;

  constexpr int kColumns = kDim / kWarp;
  float out[kColumns] = {}, sum = 0.0f;
#pragma unroll 4
  for (int64_t s = warp_id(); s < p.splits; s += kCombineWarps) {
    const float* state = p.partial_state(row_tiles, slot + s * p.tile_rows);
    const float* partial = p.partial_out(slot + s * p.tile_rows);
    const float weight = exp2_approx(state[0] - base);
    sum = fmaf(weight, state[1], sum);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = j * kWarp + lane_id();
      if (column < a.value_dim) out[j] = fmaf(weight, partial[column], out[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) shared.out[warp_id()][j * kWarp + lane_id()] = out[j];
  if (lane_id() == 0) shared.sum[warp_id()] = sum;
  __syncthreads();

#pragma unroll
  for (int first = 0; first < kDim; first += kCombineThreads) {
    const int column = first + static_cast<int>(threadIdx.x);
    if (column >= a.value_dim) return;
    float total = 0.0f, weights = 0.0f;
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) {
      total += shared.out[w][column];
      weights += shared.sum[w];
    }
    store_result<T>(a, row_tile.list.view, row_tile.first_row + static_cast<uint32_t>(row), column,
                    top, weights, total);
  }
}

}  // namespace tokred::cuda::attention
