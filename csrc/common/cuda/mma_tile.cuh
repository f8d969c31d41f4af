// Tiles in shared memory and their products on the tensor cores. f32 is split exactly into three
// bf16 planes, x = high + middle + low, and a product takes the six pairs of planes that matter:
// six times the work of bf16, for the accuracy of an fp32 dot product. (An infinity among f32
// inputs comes out as NaN.)
#pragma once

#include <type_traits>

#include "common/cuda/chunk.cuh"
#include "common/cuda/plan.h"
#include "common/cuda/ptx.cuh"
#include "common/cuda/warp.cuh"

namespace tokred::cuda {

template <class T>
struct Operand {
  using Element = T;
  static constexpr int kPlanes = 1;
};
template <>
struct Operand<float> {
  using Element = bf16;
  static constexpr int kPlanes = 3;
};

// Two planes of 16 bits, x = high + low: as exact as sums in fp32 for what unpacking and rotation
// give, of which one plane would keep 8 or 11 bits.
template <class T>
struct Split;

template <class T>
struct Operand<Split<T>> {
  using Element = T;
  static constexpr int kPlanes = 2;
};

template <class T, int kRowCount, int kHeadDim>
struct Tile {
  static constexpr int kRows = kRowCount, kDim = kHeadDim;
  static constexpr int kPitch = tile_pitch(kDim);
  alignas(16) typename Operand<T>::Element plane[Operand<T>::kPlanes][kRows][kPitch];
};

// A pair of neighbours as fragments hold them, one register a plane.
template <class T>
__device__ __forceinline__ void split_pair(float x, float y, uint32_t (&out)[Operand<T>::kPlanes]) {
  if constexpr (Operand<T>::kPlanes == 1) {
    out[0] = pack_pair<T>(x, y);
  } else {
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      const uint32_t low = __float_as_uint(x) >> 16, high = __float_as_uint(y) & 0xffff0000u;
      out[plane] = low | high;
      x -= __uint_as_float(low << 16);
      y -= __uint_as_float(high);
    }
  }
}

template <class T>
__device__ __forceinline__ void split_in_two(float x, float y, uint32_t (&out)[2]) {
  const T high[2] = {from_float<T>(x), from_float<T>(y)};
  out[0] = pack(high[0], high[1]);
  out[1] = pack_pair<T>(x - to_float(high[0]), y - to_float(high[1]));
}
template <>
__device__ __forceinline__ void split_pair<Split<bf16>>(float x, float y, uint32_t (&out)[2]) {
  split_in_two<bf16>(x, y, out);
}
template <>
__device__ __forceinline__ void split_pair<Split<f16>>(float x, float y, uint32_t (&out)[2]) {
  split_in_two<f16>(x, y, out);
}

// Clamps finite numbers to the range of f16, so that rounding makes none of them infinite.
template <class T>
__device__ __forceinline__ void keep_finite(float (&x)[8]) {
  if constexpr (std::is_same_v<T, f16>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (fabsf(x[i]) < kInfinity) x[i] = fminf(fmaxf(x[i], -65504.0f), 65504.0f);
    }
  }
}

// Loading ----------------------------------------------------------------------------------------

// The type of the numbers in memory that a tile of operands T is loaded from.
template <class T>
struct StoredAs {
  using type = T;
};
template <class T>
struct StoredAs<Split<T>> {
  using type = T;
};

template <class T>
__device__ __forceinline__ void load_eight(float (&x)[8], const T* source, int count,
                                           bool aligned) {
  if constexpr (sizeof(T) == 4) {
    if (aligned && count == 8) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Chunk bits = load_chunk(source + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * half + i] = __uint_as_float(bits.word[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(source[i]) : 0.0f;
}

// Fills a tile with rows of `dim` elements; row(r) is where row r lies, or null for a row of zeros.
// Complete once the copies have been waited for, and after a barrier. `anywhere` is any valid
// address, the source of copies of 0 bytes; `thread` numbers the kThreads that call.
template <int kThreads, class T, int kRows, int kDim, class Row>
__device__ __forceinline__ void load_tile(Tile<T, kRows, kDim>& tile,
                                          const typename StoredAs<T>::type* anywhere, int dim,
                                          bool aligned, Row row,
                                          int thread = static_cast<int>(threadIdx.x)) {
  constexpr int kPlanes = Operand<T>::kPlanes, kChunks = kDim / 8;
  // As far as registers allow.
  [[maybe_unused]] constexpr int kUnroll = kDim <= 128 ? 2 : 1;
#pragma unroll kUnroll
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, column = i % kChunks * 8;
    const auto* source = row(r);
    const int count = source ? max(0, min(dim - column, 8)) : 0;
    if (kPlanes == 1 && aligned) {
      cp_async_16(&tile.plane[0][r][column], count ? source + column : anywhere, 2 * count);
      continue;
    }
    float x[8];
    load_eight(x, source + (count ? column : 0), count, aligned);
    uint32_t pairs[4][kPlanes];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) split_pair<T>(x[2 * pair], x[2 * pair + 1], pairs[pair]);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      store_chunk(&tile.plane[plane][r][column],
                  {{pairs[0][plane], pairs[1][plane], pairs[2][plane], pairs[3][plane]}});
    }
  }
}

// Stores columns column .. column + 7 of a row.
template <class T, int kRows, int kDim>
__device__ __forceinline__ void store_eight(Tile<T, kRows, kDim>& tile, int row, int column,
                                            const float (&x)[8]) {
  uint32_t pairs[4][Operand<T>::kPlanes];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) split_pair<T>(x[2 * pair], x[2 * pair + 1], pairs[pair]);
#pragma unroll
  for (int plane = 0; plane < Operand<T>::kPlanes; ++plane) {
    store_chunk(&tile.plane[plane][row][column],
                {{pairs[0][plane], pairs[1][plane], pairs[2][plane], pairs[3][plane]}});
  }
}

// Products ---------------------------------------------------------------------------------------

// A 16 x 16 left operand.
template <class T>
struct Left {
  uint32_t plane[Operand<T>::kPlanes][4];
};

// d += a . (plane `plane` of the right operand), less the pairs too small to matter.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Left<T>& a, const uint32_t (&b)[2],
                                         int plane) {
#pragma unroll
  for (int other = Operand<T>::kPlanes - 1 - plane; other >= 0; --other) {
    mma(typename Operand<T>::Element{}, d, a.plane[other], b);
  }
}

template <class T, int kRows, int kDim>
__device__ __forceinline__ void load_left(Left<T>& a, const Tile<T, kRows, kDim>& tile, int row,
                                          int column) {
#pragma unroll
  for (int plane = 0; plane < Operand<T>::kPlanes; ++plane) {
    ldmatrix_x4(a.plane[plane],
                &tile.plane[plane][row + lane_id() % 16][column + lane_id() / 16 * 8]);
  }
}

// Two 16 x 8 right operands of one plane: rows of the tile as their columns, or (kTransposed) as
// their rows.
template <bool kTransposed, class T, int kRows, int kDim>
__device__ __forceinline__ void load_right(uint32_t (&b)[2][2], const Tile<T, kRows, kDim>& tile,
                                           int plane, int row, int column) {
  const int lane = lane_id();
  uint32_t r[4];
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(r, &tile.plane[plane][row + lane % 16][column + lane / 16 * 8]);
  } else {
    ldmatrix_x4(r, &tile.plane[plane][row + lane % 8 + lane / 16 * 8][column + lane / 8 % 2 * 8]);
  }
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}

// Tiles 2 j, 2 j + 1 of each out[i] += a[i] . the right operands at row, column of the tile. Tensor
// cores align addends to the largest of them and cut off low bits: so the products of several
// planes are summed from zero, the small ones first, and fp32 arithmetic adds these sums to out.
template <bool kTransposed, class T, int kRowTiles, int kTiles, int kRows, int kDim>
__device__ __forceinline__ void add_products(float (&out)[kRowTiles][kTiles][4], int j,
                                             const Left<T> (&a)[kRowTiles],
                                             const Tile<T, kRows, kDim>& tile, int row,
                                             int column) {
  constexpr int kPlanes = Operand<T>::kPlanes;
  [[maybe_unused]] float sum[kRowTiles][2][4] = {};
#pragma unroll
  for (int plane = kPlanes - 1; plane >= 0; --plane) {
    uint32_t b[2][2];
    load_right<kTransposed>(b, tile, plane, row, column);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply(kPlanes == 1 ? out[i][2 * j + n] : sum[i][n], a[i], b[n], plane);
      }
    }
  }
  if constexpr (kPlanes > 1) {
#pragma unroll
    for (int i = 0; i < 8 * kRowTiles; ++i) {
      out[i / 8][2 * j + i / 4 % 2][i % 4] += sum[i / 8][i / 4 % 2][i % 4];
    }
  }
}

// out[i] = rows of the left operand . rows of the tile, 16 rows on the left for each i; left(k, i)
// gives columns 16 k .. 16 k + 15 of them. Of several planes the columns from `columns` on, which
// are zero, are left out.
template <int kDim, class T, int kRowTiles, int kColumns, class LeftAt>
__device__ __forceinline__ void multiply_by_rows(float (&out)[kRowTiles][kColumns / 8][4],
                                                 const Tile<T, kColumns, kDim>& tile, LeftAt left,
                                                 int columns = kDim) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][j][e] = 0.0f;
    }
  }
  [[maybe_unused]] constexpr int kUnroll =
      Operand<T>::kPlanes == 1 ? (kDim <= 128 ? kDim / 16 : 2) : 1;
#pragma unroll kUnroll
  for (int k = 0; k < kDim / 16 && (Operand<T>::kPlanes == 1 || 16 * k < columns); ++k) {
    Left<T> a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) a[i] = left(k, i);
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      add_products<false>(out, j, a, tile, 16 * j, 16 * k);
    }
  }
}

// out[i] += weights[i] . tile: products of one kind become the left operand of the next, since a
// lane holds the same rows and columns of both. Of several planes the columns from `columns` on are
// left out, and a branch every 64 columns makes the compiler add their sums to `out` before it
// begins others: a wide head has no registers for all of them.
template <class T, int kRowTiles, int kColumns, int kDim>
__device__ __forceinline__ void accumulate(float (&out)[kRowTiles][kDim / 8][4],
                                           const float (&weights)[kRowTiles][kColumns / 8][4],
                                           const Tile<T, kColumns, kDim>& tile,
                                           int columns = kDim) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    Left<T> a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const float* w = &weights[i][2 * k + quarter / 2][quarter % 2 * 2];
        uint32_t pair[Operand<T>::kPlanes];
        split_pair<T>(w[0], w[1], pair);
#pragma unroll
        for (int plane = 0; plane < Operand<T>::kPlanes; ++plane) {
          a[i].plane[plane][quarter] = pair[plane];
        }
      }
    }
#pragma unroll
    for (int first = 0; first < kDim; first += 64) {
      if (Operand<T>::kPlanes > 1 && first >= columns) continue;
#pragma unroll
      for (int column = first; column < min(first + 64, kDim); column += 16) {
        add_products<true>(out, column / 16, a, tile, 16 * k, column);
      }
    }
  }
}

// Stores columns column, column + 1 of a row of `dim`.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int dim, float x, float y) {
  if (column < dim) row[column] = from_float<T>(x);
  if (column + 1 < dim) row[column + 1] = from_float<T>(y);
}

}  // namespace tokred::cuda
