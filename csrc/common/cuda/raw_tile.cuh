// Tiles of f32 as they lie in memory, for kernels that read each of them once: copies can be
// asynchronous, and numbers are split into bf16 planes on their way into the tensor cores.
#pragma once

#include "common/cuda/mma_tile.cuh"

namespace tokred::cuda {

template <int kRowCount, int kHeadDim>
struct RawTile {
  static constexpr int kRows = kRowCount, kDim = kHeadDim;
  alignas(16) float row[kRows][raw_pitch(kDim)];
};

template <class T, int kRows, int kDim>
struct StreamedTileOf {
  using type = Tile<T, kRows, kDim>;
};
template <int kRows, int kDim>
struct StreamedTileOf<float, kRows, kDim> {
  using type = RawTile<kRows, kDim>;
};
template <class T, int kRows, int kDim>
using StreamedTile = typename StreamedTileOf<T, kRows, kDim>::type;

// As load_tile of a Tile.
template <int kThreads, int kRows, int kDim, class Row>
__device__ __forceinline__ void load_tile(RawTile<kRows, kDim>& tile, const float* anywhere,
                                          int dim, bool aligned, Row row, int thread) {
  constexpr int kChunks = kDim / 4;
#pragma unroll 2
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, column = i % kChunks * 4;
    const float* source = row(r);
    const int count = source ? max(0, min(dim - column, 4)) : 0;
    if (aligned) {
      cp_async_16(&tile.row[r][column], count ? source + column : anywhere, 4 * count);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) tile.row[r][column + e] = e < count ? source[column + e] : 0.0f;
  }
}

// Stores columns column .. column + 7 of a row.
template <int kRows, int kDim>
__device__ __forceinline__ void store_eight(RawTile<kRows, kDim>& tile, int row, int column,
                                            const float (&x)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) tile.row[row][column + e] = x[e];
}
// A 16 x 8 right operand from its pairs of rows 2t, 2t + 1 and 2t + 8, 2t + 9 (see mma).
__device__ __forceinline__ void multiply_split(float (&d)[4], const Left<float>& a, float2 low,
                                               float2 high) {
  uint32_t pairs[2][3];
  split_pair<float>(low.x, low.y, pairs[0]);
  split_pair<float>(high.x, high.y, pairs[1]);
  float sum[4] = {};  // of its own, see add_products
#pragma unroll
  for (int plane = 2; plane >= 0; --plane) {
    const uint32_t b[2] = {pairs[0][plane], pairs[1][plane]};
    multiply(sum, a, b, plane);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += sum[e];
}

// As multiply_by_rows and accumulate of a Tile.
template <int kDim, int kColumns, class LeftAt>
__device__ __forceinline__ void multiply_by_rows(float (&out)[1][kColumns / 8][4],
                                                 const RawTile<kColumns, kDim>& tile, LeftAt left) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[0][j][e] = 0.0f;
  }
#pragma unroll 2
  for (int k = 0; k < kDim / 16; ++k) {
    const Left<float> a = left(k, 0);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float* row = &tile.row[8 * j + lane_id() / 4][16 * k + lane_id() % 4 * 2];
      multiply_split(out[0][j], a, {row[0], row[1]}, {row[8], row[9]});
    }
  }
}

template <int kColumns, int kDim>
__device__ __forceinline__ void accumulate(float (&out)[1][kDim / 8][4],
                                           const float (&weights)[1][kColumns / 8][4],
                                           const RawTile<kColumns, kDim>& tile) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    Left<float> a;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float* w = &weights[0][2 * k + quarter / 2][quarter % 2 * 2];
      uint32_t pair[3];
      split_pair<float>(w[0], w[1], pair);
#pragma unroll
      for (int plane = 0; plane < 3; ++plane) a.plane[plane][quarter] = pair[plane];
    }
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const int row = 16 * k + lane_id() % 4 * 2, column = 8 * j + lane_id() / 4;
      multiply_split(out[0][j], a, {tile.row[row][column], tile.row[row + 1][column]},
                     {tile.row[row + 8][column], tile.row[row + 9][column]});
    }
  }
}

}  // namespace tokred::cuda
