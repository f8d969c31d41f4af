// match of short rows, 16-bit and of at most 64 channels: every warp keeps its rows of a in
// registers, and the terms of the columns are computed once, by a kernel of their own.
//
// B = 64, 2048 rows of each side, C = 64 on an H200: 268 M scores are 34 GFLOP, 69 us of mma.sync;
// with 8.4 instructions each, 76 us of issue slots. The terms read 17 MB, 4 us, in a launch before.
// Rescanning only tiles whose maximum wins would save nothing here: of 32 lanes with 16 scores of a
// row tile each, one finds a new maximum in most of the 32 tiles.
#pragma once

#include "match/cuda/match.cuh"

namespace tokred::cuda::matching {

template <class T, SimilarityTiles kBlockTiles>
struct ShortConfig : SimilarityConfig<T, true, kBlockTiles> {
  static constexpr int kStages = kShortStages;
};

template <class Config>
struct ShortShared {
  SimilarityTile<typename Config::Type, Config::kRows> a;
  SimilarityTile<typename Config::Type, kSimilarityColumns> b[Config::kStages];
  SimilarityTerms<Config::kRows> rows;
  ColumnTerms columns[Config::kStages];
};

// Terms of a tile of columns ---------------------------------------------------------------------

template <class T>
struct TermsShared {
  SimilarityTile<T, kSimilarityColumns> tile;
  SimilarityTerms<kSimilarityColumns> terms;
};

// Block i computes those of tile i of all items' tiles; columns that may not win score NaN.
template <class T>
__global__ void __launch_bounds__(kTermThreads)
    column_terms_kernel(const __grid_constant__ MatchParams p) {
  struct Loads : SimilarityConfig<T, true, kNarrowTiles> {};
  static_assert(Loads::kThreads == kTermThreads);
  auto& s = shared_memory<TermsShared<T>>();
  const int64_t tiles = column_tiles(p.b.count);
  auto* out = static_cast<ColumnTerms*>(p.workspace);
  const int thread = static_cast<int>(threadIdx.x);
  TileLoader<Loads, kSimilarityColumns> load;
  for (int64_t tile = blockIdx.x; tile < p.batch * tiles; tile += gridDim.x) {
    const TokenRows b{p.b, tile / tiles};
    const int64_t column0 = tile % tiles * kSimilarityColumns;
    __syncthreads();  // whoever used this memory before is done
    load.prefetch(s.tile, b, column0, 0, p.channels);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    add_squares<kTermThreads>(s.terms.squared, s.tile, true, [](int, float) {});
    __syncthreads();
    if (thread < kSimilarityColumns) {
      set_terms<true>(s.terms, thread, b, column0 + thread, s.terms.squared[thread], p.metric);
      const float add = s.terms.add[thread];
      out[tile].scale[thread] = add == -kInfinity ? kNaN : s.terms.scale[thread];
      out[tile].add[thread] = add;
    }
  }
}

// Copies of the tiles of an item's columns -------------------------------------------------------

template <class Config>
struct ColumnLoader {
  using T = typename Config::Type;
  static constexpr int kSteps = kSimilarityColumns * 8 / Config::kThreads;
  static constexpr int kStepRows = Config::kThreads / 8;

  const TokenRows& b;
  const ColumnTerms* terms;
  const T* source;  // of this thread's first row of the next tile, where rows are evenly spaced
  int64_t step;  // from a row to that of the next copy, in elements
  int64_t left;  // rows from this thread's first on
  int column, bytes;  // of a row, this thread's channels

  __device__ ColumnLoader(const MatchParams& p, const TokenRows& b)
      : b(b),
        terms(static_cast<const ColumnTerms*>(p.workspace) + b.item * column_tiles(p.b.count)) {
    const int thread = static_cast<int>(threadIdx.x);
    column = thread % 8 * 8;
    bytes = 2 * max(0, min(static_cast<int>(p.channels) - column, 8));
    const int64_t pitch = p.b.step * p.b.stride_token;
    source = b.row<T>(p.b.first) + thread / 8 * pitch + (bytes ? column : 0);
    step = kStepRows * pitch;
    const int64_t spaced = p.b.first < p.b.tokens ? (p.b.tokens - p.b.first - 1) / p.b.step + 1 : 0;
    left = min(p.b.count, spaced) - thread / 8;
  }

  // To be called for tile after tile.
  __device__ __forceinline__ void prefetch(SimilarityTile<T, kSimilarityColumns>& tile,
                                           ColumnTerms& tile_terms, int64_t number) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < 32) {
      cp_async_16(reinterpret_cast<char*>(&tile_terms) + 16 * thread,
                  reinterpret_cast<const char*>(terms + number) + 16 * thread);
    }
    T* to = &tile.plane[0][thread / 8][column];
    constexpr int kPitch = kStepRows * SimilarityTile<T, kSimilarityColumns>::kPitch;
    if (b.set.rows) {
#pragma unroll 1
      for (int i = 0; i < kSteps; ++i) {
        const int64_t at = b.position(number * kSimilarityColumns + thread / 8 + i * kStepRows);
        const T* from = b.row<T>(at < 0 ? 0 : at) + (bytes ? column : 0);
        cp_async_16(to + i * kPitch, from, at < 0 ? 0 : bytes);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool inside = left > i * kStepRows;
      cp_async_16(to + i * kPitch, inside ? source : static_cast<const T*>(b.set.data),
                  inside ? bytes : 0);
      source += step;
    }
    left -= kSimilarityColumns;
  }
};

// Matches ----------------------------------------------------------------------------------------

template <class Config>
struct ShortMatcher {
  using T = typename Config::Type;
  static constexpr int kRowTiles = Config::kTiles.row_tiles;
  static constexpr int kChannelSteps = kSimilarityChannels / 16;

  Left<T> a[kChannelSteps][kRowTiles];
  float scale[2 * kRowTiles], add[2 * kRowTiles];
  BestMatch<kRowTiles> best;

  __device__ __forceinline__ void take_rows(const ShortShared<Config>& s, int warp_row) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = warp_row + 16 * (i / 2) + 8 * (i % 2) + lane_id() / 4;
      scale[i] = s.rows.scale[row];
      add[i] = s.rows.add[row];
    }
#pragma unroll
    for (int k = 0; k < kChannelSteps; ++k) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) load_left(a[k][i], s.a, warp_row + 16 * i, 16 * k);
    }
    best.clear();
  }

  // kOffsets: the metric adds terms; elsewhere they are 0.
  template <bool kOffsets>
  __device__ __forceinline__ void update(const SimilarityTile<T, kSimilarityColumns>& b,
                                         const ColumnTerms& terms, int column0) {
#pragma unroll
    for (int j = 0; j < kSimilarityColumns / 16; ++j) {
      float dots[kRowTiles][2][4] = {};
#pragma unroll
      for (int k = 0; k < kChannelSteps; ++k) {
        add_products<false>(dots, 0, a[k], b, 16 * j, 16 * k);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int e = n % 2, column = 16 * j + n / 2 * 8 + lane_id() % 4 * 2 + e;
        const float column_scale = terms.scale[column];
        const float column_add = kOffsets ? terms.add[column] : 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          float score = dots[i / 2][n / 2][i % 2 * 2 + e] * scale[i];
          score = kOffsets ? fmaf(score, column_scale, add[i]) + column_add : score * column_scale;
          if (score > best.score[i / 2][i % 2]) {
            best.score[i / 2][i % 2] = score;
            best.index[i / 2][i % 2] = column0 + column;
          }
        }
      }
    }
  }
};

// Rows [row0, row0 + kRows) of a batch item against all of b.
template <class Config>
__device__ __forceinline__ void match_short(const MatchParams& p, ShortShared<Config>& s,
                                            int64_t item, int64_t row0) {
  constexpr int kStages = Config::kStages;
  const TokenRows a{p.a, item}, b{p.b, item};
  const int warp_row = warp_id() * 16 * Config::kTiles.row_tiles;
  const int tiles = static_cast<int>(column_tiles(p.b.count));
  ColumnLoader<Config> load_b(p, b);
  __syncthreads();  // whoever used this memory before is done
  {
    TileLoader<Config, Config::kRows> load_a;
    load_a.prefetch(s.a, a, row0, 0, p.channels);
    cp_async_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles) load_b.prefetch(s.b[tile], s.columns[tile], tile);
    cp_async_commit();
  }
  cp_async_wait<kStages - 1>();
  __syncthreads();
  add_squares<Config::kThreads>(s.rows.squared, s.a, true, [&](int row, float sum) {
    set_terms<false>(s.rows, row, a, row0 + row, sum, p.metric);
  });
  __syncthreads();
  ShortMatcher<Config> matcher;
  matcher.take_rows(s, warp_row);
  const bool offsets = p.metric == Metric::l2 || p.metric == Metric::half_cosine;
  int stage = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const int next = tile + kStages - 1, before = stage == 0 ? kStages - 1 : stage - 1;
    if (next < tiles) load_b.prefetch(s.b[before], s.columns[before], next);
    cp_async_commit();
    const int column0 = tile * kSimilarityColumns;
    if (offsets) {
      matcher.template update<true>(s.b[stage], s.columns[stage], column0);
    } else {
      matcher.template update<false>(s.b[stage], s.columns[stage], column0);
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  write_matches(matcher.best, p, a, row0, warp_row);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 3)
    match_short_kernel(const __grid_constant__ MatchParams p) {
  auto& s = shared_memory<ShortShared<Config>>();
  const int64_t tiles = (p.a.count + Config::kRows - 1) / Config::kRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    match_short<Config>(p, s, block / tiles, block % tiles * Config::kRows);
  }
}

}  // namespace tokred::cuda::matching
