// similarity_stats: the statistics of sixteen rows, a row a lane, a tile of columns at a time.
#pragma once

#include "attention/cpu/visibility.h"
#include "common/cpu/vexp.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {

// The running statistics of sixteen rows.
struct Statistics {
  alignas(64) float number[kLanes];
  alignas(64) float mean[kLanes];
  alignas(64) float squares[kLanes];  // sum of the squared distances from the mean
  alignas(64) float largest[kLanes];
  alignas(64) float energy[kLanes];
  alignas(64) int32_t index[kLanes];
  alignas(64) int32_t count[kLanes];

  void clear() {
    for (int lane = 0; lane < kLanes; ++lane) {
      number[lane] = mean[lane] = squares[lane] = energy[lane] = 0;
      largest[lane] = -kInfinity<float>;
      index[lane] = -1;
      count[lane] = 0;
    }
  }

  // Joins the mean and squares of another set (Chan, Golub and LeVeque).
  void join(f32x16 other_number, f32x16 other_mean, f32x16 other_squares) {
    const f32x16 old = load(mean), distance = other_mean - old;
    const f32x16 before = load(number), after = before + other_number;
    const f32x16 share = other_number / max(after, splat(1.0f));
    store(number, after);
    store(mean, fma(distance, share, old));
    store(squares, load(squares) + other_squares + distance * distance * (share * before));
  }
};

// Which lanes are partners of a column: those in its block, and not the row of the same number.
struct Partners {
  i32x16 row, block;  // row is -1, which no column has, where pairs i = j count
  int64_t block_size;

  // row_of(lane) is the row's number.
  template <class RowOf>
  Partners(const SimilarityStatsParams& p, const RowOf& row_of) : block_size(p.block_size) {
    int32_t rows[kLanes], blocks[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = p.exclude_self ? static_cast<int32_t>(row_of(i)) : -1;
      blocks[i] = block_of(row_of(i));
    }
    row = load(rows);
    block = load(blocks);
  }
  int32_t block_of(int64_t i) const {
    return block_size > 0 ? static_cast<int32_t>(i / block_size) : 0;
  }
  // 1 in the lanes that are partners, 0 in the others.
  f32x16 of(int32_t column) const {
    const i32x16 self = splat(column), here = splat(block_of(column));
    return map<f32x16>([&](int i) {
      const auto partner = (block.r[i] == here.r[i]) & (row.r[i] != self.r[i]);
      return partner ? f32x16::N{} + 1 : f32x16::N{};
    });
  }
};

// How many of the pairs of the rows [row, end] with columns [first, last] are partners.
TOKRED_INLINE Coverage coverage_of(const SimilarityStatsParams& p, int64_t row, int64_t end,
                                   int64_t first, int64_t last) {
  Coverage result = Coverage::all;
  if (p.block_size > 0) {
    if (last / p.block_size < row / p.block_size || first / p.block_size > end / p.block_size) {
      return Coverage::none;
    }
    const int64_t lowest = min(first, row), highest = max(last, end);
    if (lowest / p.block_size != highest / p.block_size) result = Coverage::some;
  }
  if (p.exclude_self && first <= end && row <= last) result = Coverage::some;
  return result;
}

// A pair's energy is a function of its similarity.
template <Energy kEnergy>
struct EnergyOf {
  float margin, inverse_width, height;

  explicit EnergyOf(const SimilarityStatsParams& p)
      : margin(p.margin), inverse_width(1.0f / (1.0f - p.margin)),
        height(inverse_width * 0.3989422804014327f) {}
  __attribute__((always_inline)) f32x16 operator()(f32x16 s) const {
    if constexpr (kEnergy == Energy::elu) {
      const f32x16 distance = s - splat(margin);
      return select_greater(distance, splat(0.0f), distance, exp(distance) - splat(1.0f));
    } else {
      const f32x16 z = (splat(1.0f) - s) * splat(inverse_width);
      return exp(z * z * splat(-0.5f)) * splat(height);
    }
  }
};

// A tile [count][16] joins the statistics. kAll: every lane is a partner of every column.
template <bool kAll, Energy kEnergy>
__attribute__((noinline)) static void add_tile(const SimilarityStatsParams& p, const float* tile,
                                               const int32_t* index, int64_t count,
                                               const Partners& partners, Statistics& statistics) {
  alignas(64) float member[kBlock * kLanes];
  const EnergyOf<kEnergy> energy_of(p);
  const f32x16 zero = splat(0.0f), one = splat(1.0f), threshold = splat(p.threshold);
  const i32x16 plus = splat(int32_t{1}), nothing = splat(int32_t{0});
  f32x16 total = zero, number = zero, energy = zero, best = load(statistics.largest);
  i32x16 winner = load(statistics.index), above = load(statistics.count);
  for (int64_t j = 0; j < count; ++j) {
    f32x16 s = load(tile + j * kLanes), rated = s;
    if constexpr (!kAll) {
      const f32x16 is_member = partners.of(index[j]);
      store(member + j * kLanes, is_member);
      number = number + is_member;
      rated = select_greater(is_member, zero, s, splat(-kInfinity<float>));
      s = select_greater(is_member, zero, s, zero);
    }
    total = total + s;
    above = above + select_greater(rated, threshold, plus, nothing);
    winner = select_greater(rated, best, splat(index[j]), winner);
    best = select_greater(rated, best, rated, best);
    if constexpr (kEnergy != Energy::none) {
      const f32x16 e = energy_of(s);
      energy = energy + (kAll ? e : select_greater(load(member + j * kLanes), zero, e, zero));
    }
  }
  if constexpr (kAll) number = splat(static_cast<float>(count));
  const f32x16 mean = total / max(number, one);
  f32x16 squares = zero;
  for (int64_t j = 0; j < count; ++j) {
    f32x16 distance = load(tile + j * kLanes) - mean;
    if constexpr (!kAll) {
      distance = select_greater(load(member + j * kLanes), zero, distance, zero);
    }
    squares = fma(distance, distance, squares);
  }
  statistics.join(number, mean, squares);
  store(statistics.largest, best);
  store(statistics.index, winner);
  store(statistics.count, above);
  store(statistics.energy, load(statistics.energy) + energy);
}

template <Energy kEnergy>
TOKRED_INLINE void add_tile(Coverage coverage, const SimilarityStatsParams& p, const float* tile,
                            const int32_t* index, int64_t count, const Partners& partners,
                            Statistics& statistics) {
  if (coverage == Coverage::all) {
    add_tile<true, kEnergy>(p, tile, index, count, partners, statistics);
  } else {
    add_tile<false, kEnergy>(p, tile, index, count, partners, statistics);
  }
}

}  // namespace tokred::TOKRED_ISA
