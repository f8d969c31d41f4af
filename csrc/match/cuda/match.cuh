// match: the row arg-max of a similarity matrix that is never stored: tiles of A B^T on the tensor
// cores, row maxima in registers.
//
// B = 64, 577 tokens (289 x 288), C = 64 in bf16 on an H200: 4.7 MB in and 0.15 MB out, 1.0 us at
// 4.8 TB/s; 0.68 GFLOP, 1.7 us at the 400 TFLOP/s of mma.sync; 5.3 M scores of about seven
// instructions, 1.3 us. With the launch the floor is about 4 us; fp32 takes six products, 14 us.
#pragma once

#include "common/cuda/similarity_tile.cuh"
#include "match/cuda/plan.h"
#include "match/params.h"

namespace tokred::cuda::matching {

// kGeneral adds weights and the band.
template <class T, bool kAsyncCopies, bool kGeneralScores, SimilarityTiles kBlockTiles>
struct MatchConfig : SimilarityConfig<T, kAsyncCopies, kBlockTiles> {
  static constexpr bool kGeneral = kGeneralScores;
};

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

// Writes the best of what the four lanes of each row have found; `warp_row` is the first row of
// this warp, counted from row0.
template <int kRowTiles>
__device__ __forceinline__ void write_matches(const BestMatch<kRowTiles>& best,
                                              const MatchParams& p, const TokenRows& a,
                                              int64_t row0, int warp_row) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    float score = best.score[i / 2][i % 2];
    int index = best.index[i / 2][i % 2];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, score, step);
      const int other_index = __shfl_xor_sync(kAllLanes, index, step);
      // As an unsigned number, -1 is the largest index.
      if (other > score ||
          (other == score && static_cast<unsigned>(other_index) < static_cast<unsigned>(index))) {
        score = other;
        index = other_index;
      }
    }
    const int64_t row = row0 + warp_row + 16 * (i / 2) + 8 * (i % 2) + lane_id() / 4;
    if (lane_id() % 4 != 0 || row >= p.a.count) continue;
    const int64_t position = a.position(row), at = a.item * p.a.count + row;
    const bool found = index >= 0 && position >= 0 && !a.masked(position);
    p.score[at] = found ? score + 0.0f : -kInfinity;  // + 0 makes -0 into +0
    p.index[at] = found ? index : -1;
  }
}

// Rows [row0, row0 + kRows) of a batch item against all of b.
template <class Config>
struct RowMatcher : SimilarityRows<Config> {
  using Base = SimilarityRows<Config>;
  using Base::a, Base::s, Base::row0, Base::row_of;
  using Base::kRowTiles;
  using typename Base::Dots;
  const MatchParams& p;

  __device__ RowMatcher(const MatchParams& p, SimilarityShared<Config>& s, int64_t item,
                        int64_t row0)
      : Base(p, s, item, row0), p(p) {}

  // f(column, scores of this lane's rows) for its columns of a tile.
  template <class F>
  __device__ __forceinline__ void each_score(const Dots& dots, int64_t column0, F f) const {
    float scale[kRowTiles][2], add[kRowTiles][2], weight[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = row_of(i / 2, i % 2);
      scale[i / 2][i % 2] = s.rows.scale[row];
      add[i / 2][i % 2] = s.rows.add[row];
      weight[i / 2][i % 2] = s.rows.weight[row];
    }
#pragma unroll
    for (int j = 0; j < kSimilarityColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + lane_id() % 4 * 2 + e;
        const float column_scale = s.columns.scale[column], column_add = s.columns.add[column];
        float scores[2 * kRowTiles];
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const int tile = i / 2, half = i % 2;
          const float dot =
              this->repaired(dots[tile][j][2 * half + e], row_of(tile, half), column, column0);
          float score = fmaf(dot * scale[tile][half], column_scale, add[tile][half]) + column_add;
          if constexpr (Config::kGeneral) {
            score *= weight[tile][half] * s.columns.weight[column];
            const int64_t distance = row0 + row_of(tile, half) - (column0 + column);
            if (p.band >= 0 && (distance > p.band || -distance > p.band)) score = -kInfinity;
          }
          scores[i] = score;
        }
        f(static_cast<int>(column0) + column, scores);
      }
    }
  }

  __device__ __forceinline__ void update(BestMatch<kRowTiles>& best, const Dots& dots,
                                         int64_t column0) const {
    each_score(dots, column0, [&](int column, const float (&scores)[2 * kRowTiles]) {
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        if (scores[i] > best.score[i / 2][i % 2]) {
          best.score[i / 2][i % 2] = scores[i];
          best.index[i / 2][i % 2] = column;
        }
      }
    });
  }

  // f(dots, column0) for the tiles of b that the rows may match.
  template <class F>
  __device__ __forceinline__ void sweep_band(F f) {
    int64_t begin = 0, end = p.b.count;
    if (Config::kGeneral && p.band >= 0) {
      begin = max(int64_t{0}, row0 - p.band) / kSimilarityColumns * kSimilarityColumns;
      end = min(end, row0 + Config::kRows + p.band);
    }
    this->sweep(begin, end, f);
  }

  __device__ __forceinline__ void run() {
    BestMatch<kRowTiles> best;
    best.clear();
    sweep_band([&](const Dots& dots, int64_t column0) { update(best, dots, column0); });
    write_matches(best, p, a, row0, this->warp_row);
  }
};

// The k best partners of the same rows. Four neighbouring lanes have a row's scores; the first of
// them keeps the row's list, in place among the results, and all of them its k-th score. After the
// first tiles few scores are above that.
template <class Config>
struct RowRanker : RowMatcher<Config> {
  using Base = RowMatcher<Config>;
  using Base::a, Base::p, Base::row0, Base::row_of;
  using Base::kRowTiles;
  using typename Base::Dots;
  float last[2 * kRowTiles];  // the k-th score; inf where a row takes none

  using Base::Base;

  __device__ __forceinline__ int64_t list_of(int i) const {
    return (a.item * p.a.count + row0 + row_of(i / 2, i % 2)) * p.k;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int64_t row = row0 + row_of(i / 2, i % 2);
      const int64_t position = a.position(row);
      last[i] = position >= 0 && !a.masked(position) ? -kInfinity : kInfinity;
      if (row >= p.a.count) continue;
      for (int64_t place = lane_id() % 4; place < p.k; place += 4) {
        p.score[list_of(i) + place] = -kInfinity;
        p.index[list_of(i) + place] = -1;
      }
    }
    __syncwarp();
  }

  // Columns come in ascending order, so that a new one ranks behind its equals.
  __device__ __forceinline__ float insert(int i, float score, int column) const {
    float* scores = p.score + list_of(i);
    int32_t* columns = p.index + list_of(i);
    int64_t at = p.k - 1;
    for (; at > 0 && score > scores[at - 1]; --at) {
      scores[at] = scores[at - 1];
      columns[at] = columns[at - 1];
    }
    scores[at] = score + 0.0f;  // + 0 makes -0 into +0
    columns[at] = column;
    return scores[p.k - 1];
  }

  // Two neighbouring columns of each of four lanes: of the first lane, then of the second, ..
  __device__ __forceinline__ void rank(const float (&scores)[2][2 * kRowTiles], int column) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const bool better = scores[0][i] > last[i] || scores[1][i] > last[i];
      if (!__any_sync(kAllLanes, better)) continue;
#pragma unroll 1
      for (int n = 0; n < 8; ++n) {
        const int source = lane_id() / 4 * 4 + n / 2;
        const float even = __shfl_sync(kAllLanes, scores[0][i], source);
        const float odd = __shfl_sync(kAllLanes, scores[1][i], source);
        const float score = n % 2 ? odd : even;
        float kth = last[i];
        if (score > kth && lane_id() % 4 == 0) kth = insert(i, score, column + n);
        last[i] = __shfl_sync(kAllLanes, kth, lane_id() / 4 * 4);
      }
    }
  }

  __device__ __forceinline__ void run() {
    clear();
    this->sweep_band([&](const Dots& dots, int64_t column0) {
      float scores[2][2 * kRowTiles];
      this->each_score(dots, column0, [&](int column, const float (&some)[2 * kRowTiles]) {
        const int e = column % 2;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          if (e == 0) scores[0][i] = some[i];
          if (e == 1) scores[1][i] = some[i];
        }
        if (e == 1) rank(scores, column - 1 - lane_id() % 4 * 2);
      });
    });
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    match_kernel(const __grid_constant__ MatchParams p) {
  auto& s = shared_memory<SimilarityShared<Config>>();
  const int64_t tiles = (p.a.count + Config::kRows - 1) / Config::kRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    RowMatcher<Config>(p, s, block / tiles, block % tiles * Config::kRows).run();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    match_many_kernel(const __grid_constant__ MatchParams p) {
  auto& s = shared_memory<SimilarityShared<Config>>();
  const int64_t tiles = (p.a.count + Config::kRows - 1) / Config::kRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    RowRanker<Config>(p, s, block / tiles, block % tiles * Config::kRows).run();
  }
}

}  // namespace tokred::cuda::matching
