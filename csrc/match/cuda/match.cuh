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
    for (int j = 0; j < kSimilarityColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + lane_id() % 4 * 2 + e;
        const float column_scale = s.columns.scale[column], column_add = s.columns.add[column];
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
        // As an unsigned number, -1 is the largest index.
        if (other > score ||
            (other == score && static_cast<unsigned>(other_index) < static_cast<unsigned>(index))) {
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

  __device__ __forceinline__ void run() {
    int64_t begin = 0, end = p.b.count;
    if (Config::kGeneral && p.band >= 0) {
      begin = max(int64_t{0}, row0 - p.band) / kSimilarityColumns * kSimilarityColumns;
      end = min(end, row0 + Config::kRows + p.band);
    }
    BestMatch<kRowTiles> best;
    best.clear();
    this->sweep(begin, end,
                [&](const Dots& dots, int64_t column0) { update(best, dots, column0); });
    write(best);
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

}  // namespace tokred::cuda::matching
