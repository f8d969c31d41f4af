// Best matches, fused: tiles of A B^T on the tensor cores, row maxima in registers, the similarity
// matrix nowhere.
//
// B = 64, 577 tokens (289 x 288), C = 64 in bf16 on an H200: 4.7 MB in and 0.15 MB out, 1.0 us at
// 4.8 TB/s; 0.68 GFLOP, 1.7 us at the 400 TFLOP/s of mma.sync; 5.3 M scores of about seven
// instructions, 1.3 us. With the launch the floor is about 4 us; fp32 takes six products, 14 us.
#pragma once

#include "match/cuda/tile.cuh"

namespace tokred::cuda::matching {

template <bool kColumns, int kCount>
__device__ __forceinline__ void set_terms(MatchTerms<kCount>& terms, int slot, const Side& side,
                                          int64_t row, float squared, Metric metric) {
  const int64_t position = side.position(row);
  const bool usable = position >= 0 && !side.masked(position);
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
  terms.weight[slot] = usable ? side.weight(position) : 0.0f;
}

// The dot product of two rows that the split cannot give: inf * 0 of a lower plane would be NaN.
__device__ __forceinline__ float dot_in_order(const float* x, const float* y, int64_t channels) {
  float sum = 0.0f;
  for (int64_t c = 0; c < channels; ++c) sum = fmaf(x[c], y[c], sum);
  return sum;
}

// A lane's best match of the rows lane / 4 and lane / 4 + 8 of each of its row tiles.
template <int kRowTiles>
struct BestMatch {
  float score[kRowTiles][2];
  int index[kRowTiles][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      score[i / 2][i % 2] = -kInfinity;
      index[i / 2][i % 2] = -1;
    }
  }
};

// Rows [row0, row0 + kRows) of a batch item against all of b.
template <class Config>
struct RowMatcher {
  using T = typename Config::Type;
  static constexpr int kRowTiles = Config::kTiles.row_tiles;
  using Dots = float[kRowTiles][kMatchColumns / 8][4];

  const MatchParams& p;
  MatchShared<Config>& s;
  Side a, b;
  int64_t row0, chunks;
  int warp_row;  // the first row of this warp in the tile

  __device__ RowMatcher(const MatchParams& p, MatchShared<Config>& s, int64_t item, int64_t row0)
      : p(p), s(s), a{p.a, item}, b{p.b, item}, row0(row0),
        chunks(p.channels > 0 ? (p.channels + kMatchChannels - 1) / kMatchChannels : 1),
        warp_row(warp_id() * 16 * kRowTiles) {}

  // The row of a tile that holds element e of row tile i.
  __device__ __forceinline__ int row_of(int i, int half) const {
    return warp_row + 16 * i + lane_id() / 4 + 8 * half;
  }

  __device__ __forceinline__ void sum_tile(int stage, int64_t column0, int64_t chunk,
                                           bool first_tile) {
    const bool last = chunk == chunks - 1;
    if (first_tile) {
      add_squares<Config::kThreads>(s.rows.squared, s.a[chunks > 1 ? stage : 0], chunk == 0,
                                    [&](int row, float sum) {
        if (last) set_terms<false>(s.rows, row, a, row0 + row, sum, p.metric);
      });
    }
    add_squares<Config::kThreads>(s.columns.squared, s.b[stage], chunk == 0,
                                  [&](int column, float sum) {
      if (last) set_terms<true>(s.columns, column, b, column0 + column, sum, p.metric);
    });
  }

  __device__ __forceinline__ float repaired(float dot, int row, int column, int64_t column0) const {
    if constexpr (sizeof(T) == 4) {
      if (!(s.rows.squared[row] + s.columns.squared[column] < kInfinity)) {
        const int64_t i = a.position(row0 + row), j = b.position(column0 + column);
        if (i >= 0 && j >= 0) return dot_in_order(a.row<T>(i), b.row<T>(j), p.channels);
      }
    }
    return dot;
  }

  __device__ __forceinline__ void update(BestMatch<kRowTiles>& best, const Dots& dots,
                                         int64_t column0) const {
    float scale[kRowTiles][2], add[kRowTiles][2], weight[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = row_of(i / 2, i % 2);
      scale[i / 2][i % 2] = s.rows.scale[row];
      add[i / 2][i % 2] = s.rows.add[row];
      weight[i / 2][i % 2] = s.rows.weight[row];
    }
#pragma unroll
    for (int j = 0; j < kMatchColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + lane_id() % 4 * 2 + e;
        const float column_scale = s.columns.scale[column], column_add = s.columns.add[column];
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const int tile = i / 2, half = i % 2;
          const float dot =
              repaired(dots[tile][j][2 * half + e], row_of(tile, half), column, column0);
          float score = fmaf(dot * scale[tile][half], column_scale, add[tile][half]) + column_add;
          if constexpr (Config::kGeneral) {
            score *= weight[tile][half] * s.columns.weight[column];
            const int64_t distance = row0 + row_of(tile, half) - (column0 + column);
            if (p.band >= 0 && (distance > p.band || -distance > p.band)) score = -kInfinity;
          }
          if (score > best.score[tile][half]) {
            best.score[tile][half] = score;
            best.index[tile][half] = static_cast<int>(column0) + column;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write(BestMatch<kRowTiles>& best) const {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      float score = best.score[i / 2][i % 2];
      int index = best.index[i / 2][i % 2];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, score, step);
        const int other_index = __shfl_xor_sync(kAllLanes, index, step);
        // As unsigned numbers, -1 is the greatest index.
        if (other > score || (other == score && static_cast<unsigned>(other_index) <
                                                    static_cast<unsigned>(index))) {
          score = other;
          index = other_index;
        }
      }
      const int64_t row = row0 + row_of(i / 2, i % 2);
      if (lane_id() % 4 != 0 || row >= p.a.count) continue;
      const int64_t position = a.position(row), at = a.item * p.a.count + row;
      const bool found = index >= 0 && position >= 0 && !a.masked(position);
      p.score[at] = found ? score + 0.0f : -kInfinity;  // + 0 makes -0 into +0
      p.index[at] = found ? index : -1;
    }
  }

  // update(dots, column0) for every tile of columns in [begin, end), in order; it may overwrite the
  // dots. The terms of the tile's rows and columns are in shared memory then. Warps without rows
  // only help with loading.
  template <class Update>
  __device__ __forceinline__ void sweep(int64_t begin, int64_t end, Update update) {
    const int64_t steps = (max(begin, end) - begin + kMatchColumns - 1) / kMatchColumns * chunks;
    Loader<Config, Config::kRows> load_a;
    Loader<Config, kMatchColumns> load_b;
    const auto fetch = [&](int64_t step) {
      const int stage = static_cast<int>(step % Config::kStages);
      const int64_t channel0 = step % chunks * kMatchChannels;
      if (chunks > 1) load_a.fetch(s.a[stage], a, row0, channel0, p.channels);
      if (chunks == 1 && step == 0) load_a.fetch(s.a[0], a, row0, 0, p.channels);
      load_b.fetch(s.b[stage], b, begin + step / chunks * kMatchColumns, channel0, p.channels);
      if constexpr (Config::kAsync) cp_async_commit();
    };
    const auto land = [&](int64_t step) {
      const int stage = static_cast<int>(step % Config::kStages);
      if (chunks > 1 || step == 0) load_a.land(s.a[chunks > 1 ? stage : 0]);
      load_b.land(s.b[stage]);
      if constexpr (Config::kAsync) cp_async_wait<0>();
    };

    Dots dots;
    const bool busy = row0 + warp_row < p.a.count;
    __syncthreads();  // whoever used this memory before is done
    if (steps > 0) fetch(0);
    for (int64_t step = 0; step < steps; ++step) {
      land(step);
      __syncthreads();
      if (step + 1 < steps) fetch(step + 1);
      const int stage = static_cast<int>(step % Config::kStages);
      const int64_t chunk = step % chunks, column0 = begin + step / chunks * kMatchColumns;
      sum_tile(stage, column0, chunk, step < chunks);
      if (chunk == 0) {
#pragma unroll
        for (int i = 0; i < kRowTiles * kMatchColumns / 2; ++i) {
          dots[i / (kMatchColumns / 2)][i / 4 % (kMatchColumns / 8)][i % 4] = 0.0f;
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

  __device__ __forceinline__ void run() {
    int64_t begin = 0, end = p.b.count;
    if (Config::kGeneral && p.band >= 0) {
      begin = max(int64_t{0}, row0 - p.band) / kMatchColumns * kMatchColumns;
      end = min(end, row0 + Config::kRows + p.band);
    }
    BestMatch<kRowTiles> best;
    best.clear();
    sweep(begin, end, [&](const Dots& dots, int64_t column0) { update(best, dots, column0); });
    write(best);
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    match_kernel(const __grid_constant__ MatchParams p) {
  auto& s = shared_memory<MatchShared<Config>>();
  const int64_t tiles = (p.a.count + Config::kRows - 1) / Config::kRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    RowMatcher<Config>(p, s, block / tiles, block % tiles * Config::kRows).run();
  }
}

}  // namespace tokred::cuda::matching
