// similarity_stats: tiles of similarities, and running statistics of each row in the registers of
// four lanes (mean and variance by Chan, Golub and LeVeque).
#pragma once

#include "common/cuda/similarity_tile.cuh"
#include "score/cuda/moments.cuh"
#include "score/cuda/plan.h"
#include "score/params.h"

namespace tokred::cuda::scoring {

struct SimilarityArgs {
  TokenPairs pairs;
  SimilarityStatsParams p;
};

// A lane's statistics of a row: its share of the columns so far.
struct SimilarityState {
  Moments moments;
  float largest = -kInfinity, energy = 0.0f;
  int index = -1, above = 0;
  int first = 0, last = 0;  // the columns that may be partners, less `self`
  int self = -1;

  // The statistics of four lanes, in the first of them.
  __device__ __forceinline__ void merge_lanes() {
    moments.merge_lanes<4>();
    energy = warp_sum<4>(energy);
    above = warp_sum<4>(above);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest, step);
      const int other_index = __shfl_xor_sync(kAllLanes, index, step);
      // As unsigned numbers, -1 is the maximum.
      if (other > largest ||
          (other == largest && static_cast<unsigned>(other_index) < static_cast<unsigned>(index))) {
        largest = other;
        index = other_index;
      }
    }
  }
};

// The energy of a similarity; the gaussian's constant factor comes at the end.
__device__ __forceinline__ float energy_of(float score, Energy kind, float margin,
                                           float inverse_width) {
  if (kind == Energy::elu) {
    const float distance = score - margin;
    return distance < 0.0f ? expf(distance) - 1.0f : distance;
  }
  const float distance = (1.0f - score) * inverse_width;
  return expf(-0.5f * distance * distance);
}

template <class Config>
struct RowStatistics : SimilarityRows<Config> {
  using Base = SimilarityRows<Config>;
  using Dots = typename Base::Dots;
  static constexpr int kRows = 2 * Base::kRowTiles;  // of a lane
  static constexpr int kScores = kSimilarityColumns / 4;     // of a lane and row in a tile
  const SimilarityStatsParams& q;
  const float inverse_width;  // of the gaussian energy
  SimilarityState state[kRows];

  __device__ RowStatistics(const SimilarityArgs& args, SimilarityShared<Config>& shared,
                           int64_t item, int64_t row0)
      : Base(args.pairs, shared, item, row0), q(args.p), inverse_width(1.0f / (1.0f - q.margin)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row0 + this->row_of(i / 2, i % 2);
      state[i].last = static_cast<int>(q.columns);
      if (q.exclude_self) state[i].self = static_cast<int>(row);
      if (q.block_size <= 0) continue;
      const int64_t first = row / q.block_size * q.block_size;
      state[i].first = static_cast<int>(min(first, q.columns));
      state[i].last = static_cast<int>(min(q.columns - first, q.block_size) + first);
    }
  }

  static __device__ __forceinline__ int column_of(int j) {
    return 8 * (j / 2) + lane_id() % 4 * 2 + j % 2;
  }

  // Dot products to similarities. Those that do not count come out as whatever they are.
  __device__ __forceinline__ void to_similarities(Dots& dots, int64_t column0) const {
    const auto& rows = this->s.rows;
    const auto& columns = this->s.columns;
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      const int column = column_of(j);
      const float scale = columns.scale[column], add = columns.add[column];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = this->row_of(i / 2, i % 2);
        float& x = dots[i / 2][j / 2][2 * (i % 2) + j % 2];
        x = fmaf(this->repaired(x, row, column, column0) * rows.scale[row], scale, rows.add[row]) +
            add;
      }
    }
  }

  // Which columns of this lane may be partners of a row; a bit each.
  __device__ __forceinline__ unsigned partners_of(const SimilarityState& row, unsigned usable,
                                                  int column0) const {
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      const int column = column0 + column_of(j);
      if (column < row.first || column >= row.last || column == row.self) usable &= ~(1u << j);
    }
    return usable;
  }

  // Adds similarities score(0) .. score(kScores - 1), of which `partners` count, to a row.
  template <class Score>
  __device__ __forceinline__ void add(SimilarityState& row, Score score, unsigned partners,
                                      int column0) const {
    if (partners == 0) return;
    const auto counts = [&](int j) { return (partners >> j & 1) != 0; };
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      if (!counts(j)) continue;
      total += score(j);
      row.above += score(j) > q.threshold;
      if (score(j) > row.largest) {
        row.largest = score(j);
        row.index = column0 + column_of(j);
      }
    }
    const auto count = static_cast<float>(__popc(partners));
    Moments part{count, total / count, 0.0f};
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      const float distance = score(j) - part.mean;
      if (counts(j)) part.squares = fmaf(distance, distance, part.squares);
    }
    row.moments.merge(part);
    if (q.energy_kind == Energy::none) return;
    float energy = 0.0f;
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      if (counts(j)) energy += energy_of(score(j), q.energy_kind, q.margin, inverse_width);
    }
    row.energy += energy;
  }

  __device__ __forceinline__ void update(Dots& dots, int64_t column0) {
    const int first = static_cast<int>(column0);
    unsigned usable = 0;  // a column that is masked or beyond the last has weight 0
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      usable |= this->s.columns.weight[column_of(j)] != 0.0f ? 1u << j : 0u;
    }
    to_similarities(dots, column0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      add(
          state[i], [&](int j) { return dots[i / 2][j / 2][2 * (i % 2) + j % 2]; },
          partners_of(state[i], usable, first), first);
    }
  }

  __device__ __forceinline__ void write() {
    constexpr float kInverseRootTwoPi = 0.3989422804014327f;
    const float energy_factor =
        q.energy_kind == Energy::gaussian ? kInverseRootTwoPi * inverse_width : 1.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      SimilarityState& result = state[i];
      result.merge_lanes();
      const int64_t row = this->row0 + this->row_of(i / 2, i % 2);
      if (lane_id() % 4 != 0 || row >= q.rows) continue;
      const int64_t at = this->a.item * q.rows + row;
      const bool alone = result.moments.count == 0.0f || this->a.masked(row);
      const float inverse = alone ? 0.0f : 1.0f / result.moments.count;
      q.mean[at] = alone ? 0.0f : result.moments.mean;
      q.variance[at] = alone ? 0.0f : result.moments.squares * inverse;
      q.energy[at] = alone ? 0.0f : result.energy * inverse * energy_factor;
      q.largest[at] = alone ? -kInfinity : result.largest + 0.0f;  // + 0 makes -0 into +0
      q.index[at] = alone ? -1 : result.index;
      q.count[at] = alone ? 0 : result.above;
    }
  }

  __device__ __forceinline__ void run() {
    int64_t begin = 0, end = q.columns;
    if (q.block_size > 0) {
      const int64_t last_row = min(this->row0 + Config::kRows, q.rows) - 1;
      const int64_t last_block = last_row / q.block_size * q.block_size;
      begin = this->row0 / q.block_size * q.block_size / kSimilarityColumns * kSimilarityColumns;
      end = min(q.columns - last_block, q.block_size) + last_block;
    }
    this->sweep(begin, end, [&](Dots& dots, int64_t column0) { update(dots, column0); });
    write();
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    similarity_stats_kernel(const __grid_constant__ SimilarityArgs args) {
  auto& shared = shared_memory<SimilarityShared<Config>>();
  const int64_t tiles = (args.p.rows + Config::kRows - 1) / Config::kRows;
  const int64_t item = blockIdx.x / tiles;
  RowStatistics<Config>(args, shared, item, blockIdx.x % tiles * Config::kRows).run();
}

}  // namespace tokred::cuda::scoring
