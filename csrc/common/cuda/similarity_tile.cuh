// Similarities of rows of a and all rows of b, tile by tile: dot products on the tensor cores, over
// 64 channels at a time, and the norms and offsets that make similarities of them. match keeps the
// best of each row, similarity_stats its statistics.
#pragma once

#include "common/cuda/block.cuh"
#include "common/cuda/mma_tile.cuh"
#include "common/cuda/similarity_plan.h"
#include "common/types.h"

namespace tokred::cuda {

// kAsync: 16-bit rows at 16-byte boundaries, copied asynchronously, the next tile during this one.
// Otherwise any rows, through registers.
template <class T, bool kAsyncCopies, SimilarityTiles kBlockTiles>
struct SimilarityConfig {
  using Type = T;
  static constexpr bool kAsync = kAsyncCopies;
  static constexpr SimilarityTiles kTiles = kBlockTiles;
  static constexpr int kPlanes = Operand<T>::kPlanes;
  static constexpr int kStages = kAsync ? 2 : 1;
  static constexpr int kThreads = kTiles.threads(), kRows = kTiles.rows();
};

template <class T, int kRows>
using SimilarityTile = Tile<T, kRows, kSimilarityChannels>;

// Terms that turn dot products into similarities: s(i, j) = ((dot * scale_i) * scale_j + add_i) +
// add_j, times weight_i * weight_j.
template <int kCount>
struct SimilarityTerms {
  float squared[kCount], scale[kCount], add[kCount], weight[kCount];
};

template <class Config>
struct SimilarityShared {
  SimilarityTile<typename Config::Type, Config::kRows> a[Config::kStages];
  SimilarityTile<typename Config::Type, kSimilarityColumns> b[Config::kStages];
  SimilarityTerms<Config::kRows> rows;
  SimilarityTerms<kSimilarityColumns> columns;
};

// The tokens of one batch item in a set.
struct TokenRows {
  const TokenSet& set;
  int64_t item;

  // Where row t stands, or -1 where it points nowhere.
  __device__ int64_t position(int64_t t) const {
    if (t >= set.count) return -1;
    const int64_t at =
        set.rows ? set.rows[item * set.rows_stride_batch + t] : set.first + set.step * t;
    return at >= 0 && at < set.tokens ? at : -1;
  }
  __device__ bool masked(int64_t position) const {
    return set.mask && !set.mask[item * set.mask_stride_batch + position * set.mask_stride_token];
  }
  __device__ float weight(int64_t position) const {
    if (!set.weight) return 1.0f;
    return set.weight[item * set.weight_stride_batch + position * set.weight_stride_token];
  }
  template <class T>
  __device__ const T* row(int64_t position) const {
    return static_cast<const T*>(set.data) + item * set.stride_batch + position * set.stride_token;
  }
};

// Loading ----------------------------------------------------------------------------------------

// Eight neighbours of a row.
template <class T>
struct alignas(16) Eight {
  T x[8];
};

template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* source, int count, bool aligned) {
  Eight<T> out;
  if (aligned && count == 8) {
#pragma unroll
    for (int i = 0; i < 8; i += 16 / sizeof(T)) store_chunk(&out.x[i], load_chunk(source + i));
    return out;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out.x[i] = i < count ? source[i] : T{};
  return out;
}

// As split_pair, but that numbers that are not finite stay whole, in the first plane.
__device__ __forceinline__ void split_finite(float x, bf16 (&part)[3]) {
  const bool finite = fabsf(x) < kInfinity;
  if (!finite) x = x == x ? x : __uint_as_float(0x7fc00000);
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    const uint32_t bits = __float_as_uint(x) & 0xffff0000u;
    part[plane].bits = static_cast<uint16_t>(bits >> 16);
    x = finite ? x - __uint_as_float(bits) : 0.0f;
  }
}

template <class T, int kRows>
__device__ __forceinline__ void store_eight(SimilarityTile<T, kRows>& tile, int row, int column,
                                            const Eight<T>& in) {
  if constexpr (sizeof(T) == 2) {
    store_chunk(&tile.plane[0][row][column], load_chunk(&in));
  } else {
    bf16 part[8][3];
#pragma unroll
    for (int i = 0; i < 8; ++i) split_finite(in.x[i], part[i]);
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      Chunk chunk;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        chunk.word[i] = pack(part[2 * i][plane], part[2 * i + 1][plane]);
      }
      store_chunk(&tile.plane[plane][row][column], chunk);
    }
  }
}

// Brings 64 channels of kRows rows to shared memory: prefetch, then store_staged, then a barrier.
template <class Config, int kRows>
struct TileLoader {
  using T = typename Config::Type;
  static constexpr int kColumns = kSimilarityChannels / 8;
  static constexpr int kSteps = (kRows * kColumns + Config::kThreads - 1) / Config::kThreads;
  Eight<T> staged[Config::kAsync ? 1 : kSteps];

  static __device__ __forceinline__ int place(int step) {
    return step * Config::kThreads + static_cast<int>(threadIdx.x);
  }

  __device__ __forceinline__ void prefetch(SimilarityTile<T, kRows>& tile, const TokenRows& tokens,
                                           int64_t row0, int64_t channel0, int64_t channels) {
    const TokenSet& set = tokens.set;
    const bool aligned = is_aligned(set.data, set.stride_batch | set.stride_token, sizeof(T));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int row = place(step) / kColumns, column = place(step) % kColumns * 8;
      if (row >= kRows) break;
      const int64_t position = tokens.position(row0 + row);
      const int64_t left = position < 0 ? 0 : channels - channel0 - column;
      const int count = left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
      const T* source = tokens.row<T>(count ? position : 0) + (count ? channel0 + column : 0);
      if constexpr (Config::kAsync) {
        cp_async_16(&tile.plane[0][row][column], source, count * static_cast<int>(sizeof(T)));
      } else {
        staged[step] = load_eight(source, count, aligned);
      }
    }
  }

  __device__ __forceinline__ void store_staged(SimilarityTile<T, kRows>& tile) {
    if constexpr (!Config::kAsync) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int row = place(step) / kColumns, column = place(step) % kColumns * 8;
        if (row < kRows) store_eight(tile, row, column, staged[step]);
      }
    }
  }
};

// Products ---------------------------------------------------------------------------------------

// dot[i][j] += 16 rows of a, number row0 + 16 i, times 8 rows of b, number 8 j, over 64 channels.
template <class T, int kRows, int kRowTiles>
__device__ __forceinline__ void multiply(float (&dot)[kRowTiles][kSimilarityColumns / 8][4],
                                         const SimilarityTile<T, kRows>& a,
                                         const SimilarityTile<T, kSimilarityColumns>& b, int row0) {
#pragma unroll 1
  for (int k = 0; k < kSimilarityChannels; k += 16) {
    Left<T> left[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_left(left[i], a, row0 + 16 * i, k);
#pragma unroll
    for (int j = 0; j < kSimilarityColumns / 16; ++j) {
      add_products<false>(dot, j, left, b, 16 * j, k);
    }
  }
}

// The sum of squares of eight channels of a row, in order.
template <class T, int kRows>
__device__ __forceinline__ float sum_squares(const SimilarityTile<T, kRows>& tile, int row,
                                             int column) {
  using Element = typename Operand<T>::Element;
  Eight<Element> part[Operand<T>::kPlanes];
#pragma unroll
  for (int plane = 0; plane < Operand<T>::kPlanes; ++plane) {
    store_chunk(&part[plane], load_chunk(&tile.plane[plane][row][column]));
  }
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    float x = to_float(part[0].x[c]);
    if constexpr (sizeof(T) == 4) x += to_float(part[1].x[c]) + to_float(part[2].x[c]);
    sum = fmaf(x, x, sum);
  }
  return sum;
}

// Adds the squares of a tile's 64 channels to the rows' sums, and calls done(row, sum so far) once
// for every row. The order of the sums does not depend on the number of threads.
template <int kThreads, class T, int kRows, class Done>
__device__ __forceinline__ void add_squares(float (&squared)[kRows],
                                            const SimilarityTile<T, kRows>& tile, bool first,
                                            Done done) {
  constexpr int kGroups = kSimilarityChannels / 8,
                kSteps = (kRows * kGroups + kThreads - 1) / kThreads;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const int place = step * kThreads + static_cast<int>(threadIdx.x);
    const int row = place / kGroups, column = place % kGroups * 8;
    float sum = row < kRows ? sum_squares(tile, row, column) : 0.0f;
    sum = warp_sum<kGroups>(sum);
    if (row < kRows && column == 0) {
      if (!first) sum += squared[row];
      squared[row] = sum;
      done(row, sum);
    }
  }
}

// Similarities -----------------------------------------------------------------------------------

template <bool kColumns, int kCount>
__device__ __forceinline__ void set_terms(SimilarityTerms<kCount>& terms, int slot,
                                          const TokenRows& tokens, int64_t row, float squared,
                                          Metric metric) {
  const int64_t position = tokens.position(row);
  const bool usable = position >= 0 && !tokens.masked(position);
  const float inverse_norm = 1.0f / fmaxf(sqrtf(squared), kNormEps);
  float scale = 1.0f, add = 0.0f;
  switch (metric) {
    case Metric::cosine: scale = inverse_norm; break;
    case Metric::half_cosine:
      scale = kColumns ? 0.5f * inverse_norm : inverse_norm;
      add = kColumns ? 0.5f : 0.0f;
      break;
    case Metric::l2:
      scale = kColumns ? 2.0f : 1.0f;
      add = -squared;
      break;
    case Metric::dot: break;
  }
  terms.scale[slot] = scale;
  // An unusable column scores -inf or, weighted, NaN; neither wins.
  terms.add[slot] = usable || !kColumns ? add : -kInfinity;
  terms.weight[slot] = usable ? tokens.weight(position) : 0.0f;
}

// The dot product of two rows that the split cannot give: inf * 0 of a lower plane would be NaN.
__device__ __forceinline__ float dot_in_order(const float* x, const float* y, int64_t channels) {
  float sum = 0.0f;
  for (int64_t c = 0; c < channels; ++c) sum = fmaf(x[c], y[c], sum);
  return sum;
}

// Rows [row0, row0 + kRows) of a, of one batch item, against rows of b.
template <class Config>
struct SimilarityRows {
  using T = typename Config::Type;
  static constexpr int kRowTiles = Config::kTiles.row_tiles;
  using Dots = float[kRowTiles][kSimilarityColumns / 8][4];

  const TokenPairs& pairs;
  SimilarityShared<Config>& s;
  TokenRows a, b;
  int64_t row0, chunks;
  int warp_row;  // the first row of this warp in the tile

  __device__ SimilarityRows(const TokenPairs& pairs, SimilarityShared<Config>& s, int64_t item,
                            int64_t row0)
      : pairs(pairs), s(s), a{pairs.a, item}, b{pairs.b, item}, row0(row0),
        chunks(pairs.channels > 0 ? (pairs.channels + kSimilarityChannels - 1) / kSimilarityChannels
                                  : 1),
        warp_row(warp_id() * 16 * kRowTiles) {}

  // The row of a tile that holds element e of row tile i.
  __device__ __forceinline__ int row_of(int i, int half) const {
    return warp_row + 16 * i + lane_id() / 4 + 8 * half;
  }

  __device__ __forceinline__ void sum_tile(int stage, int64_t column0, int64_t chunk,
                                           bool first_tile) {
    const bool last = chunk == chunks - 1;
    if (first_tile) {
      add_squares<Config::kThreads>(
          s.rows.squared, s.a[chunks > 1 ? stage : 0], chunk == 0, [&](int row, float sum) {
            if (last) set_terms<false>(s.rows, row, a, row0 + row, sum, pairs.metric);
          });
    }
    add_squares<Config::kThreads>(
        s.columns.squared, s.b[stage], chunk == 0, [&](int column, float sum) {
          if (last) set_terms<true>(s.columns, column, b, column0 + column, sum, pairs.metric);
        });
  }

  __device__ __forceinline__ float repaired(float dot, int row, int column, int64_t column0) const {
    if constexpr (sizeof(T) == 4) {
      if (!(s.rows.squared[row] + s.columns.squared[column] < kInfinity)) {
        const int64_t i = a.position(row0 + row), j = b.position(column0 + column);
        if (i >= 0 && j >= 0) return dot_in_order(a.row<T>(i), b.row<T>(j), pairs.channels);
      }
    }
    return dot;
  }

  // update(dots, column0) for every tile of columns in [begin, end), in order; it may overwrite the
  // dots. The terms of the tile's rows and columns are in shared memory then. Warps without rows
  // only help with loading.
  template <class Update>
  __device__ __forceinline__ void sweep(int64_t begin, int64_t end, Update update) {
    const int64_t steps =
        (max(begin, end) - begin + kSimilarityColumns - 1) / kSimilarityColumns * chunks;
    TileLoader<Config, Config::kRows> load_a;
    TileLoader<Config, kSimilarityColumns> load_b;
    const auto prefetch = [&](int64_t step) {
      const int stage = static_cast<int>(step % Config::kStages);
      const int64_t channel0 = step % chunks * kSimilarityChannels;
      if (chunks > 1) load_a.prefetch(s.a[stage], a, row0, channel0, pairs.channels);
      if (chunks == 1 && step == 0) load_a.prefetch(s.a[0], a, row0, 0, pairs.channels);
      load_b.prefetch(s.b[stage], b, begin + step / chunks * kSimilarityColumns, channel0,
                      pairs.channels);
      if constexpr (Config::kAsync) cp_async_commit();
    };
    const auto store_staged = [&](int64_t step) {
      const int stage = static_cast<int>(step % Config::kStages);
      if (chunks > 1 || step == 0) load_a.store_staged(s.a[chunks > 1 ? stage : 0]);
      load_b.store_staged(s.b[stage]);
      if constexpr (Config::kAsync) cp_async_wait<0>();
    };

    Dots dots;
    const bool busy = row0 + warp_row < a.set.count;
    __syncthreads();  // the tiles before have been read
    if (steps > 0) prefetch(0);
    for (int64_t step = 0; step < steps; ++step) {
      store_staged(step);
      __syncthreads();
      if (step + 1 < steps) prefetch(step + 1);
      const int stage = static_cast<int>(step % Config::kStages);
      const int64_t chunk = step % chunks, column0 = begin + step / chunks * kSimilarityColumns;
      sum_tile(stage, column0, chunk, step < chunks);
      if (chunk == 0) {
#pragma unroll
        for (int i = 0; i < kRowTiles * kSimilarityColumns / 2; ++i) {
          dots[i / (kSimilarityColumns / 2)][i / 4 % (kSimilarityColumns / 8)][i % 4] = 0.0f;
        }
      }
      if (busy) multiply(dots, s.a[chunks > 1 ? stage : 0], s.b[stage], warp_row);
      if (chunk == chunks - 1) {
        __syncthreads();  // the terms are there
        if (busy) update(dots, column0);
      }
      if constexpr (!Config::kAsync) __syncthreads();  // the tile may be overwritten
    }
  }
};

}  // namespace tokred::cuda
