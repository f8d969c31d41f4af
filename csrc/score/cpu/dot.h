// qk_score, block_score, attention_rows: dot products of up to four rows with keys that lie
// anywhere: sixteen partial sums each, as in dot_row, with sums over the lanes of four keys at a
// time.
#pragma once

#include "attention/cpu/head_scores.h"
#include "common/cpu/prefetch.h"

namespace tokred::TOKRED_ISA {

// Keys are prefetched so many keys early: hardware prefetch stops at the end of a page, and does
// not know where a paged key lies.
constexpr int64_t kAhead = 16;

// The first two steps of sum(): four lanes are left. Copying parts out of the registers instead
// would make the compiler keep the sums in such parts all along.
TOKRED_INLINE Wide<float, 4> fold(f32x16 v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto half = __builtin_shufflevector(v.r[0], v.r[0], 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v.r[0], v.r[0], 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const auto half = v.r[0] + v.r[1];
#endif
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
  return (v.r[0] + v.r[2]) + (v.r[1] + v.r[3]);
#endif
}
// The sums of four vectors, lane by lane.
TOKRED_INLINE Wide<float, 4> sums(const Wide<float, 4>* folded) {
  const Wide<float, 4> low = __builtin_shufflevector(folded[0], folded[1], 0, 4, 1, 5) +
                             __builtin_shufflevector(folded[0], folded[1], 2, 6, 3, 7);
  const Wide<float, 4> high = __builtin_shufflevector(folded[2], folded[3], 0, 4, 1, 5) +
                              __builtin_shufflevector(folded[2], folded[3], 2, 6, 3, 7);
  return __builtin_shufflevector(low, high, 0, 1, 4, 5) +
         __builtin_shufflevector(low, high, 2, 3, 6, 7);
}

// The groups of sixteen dimensions that a dot product runs over.
struct Steps {
  static constexpr int64_t kMax = 2 * kMaxHeadDim / kLanes;
  int64_t count = 0;      // whole groups
  int64_t at[kMax];      // their first dimensions
  int64_t rest = 0;  // the dimensions behind the last whole group, or 0 where they are unused

  // The groups of `dim` dimensions for which used(group) holds.
  template <class Used>
  Steps(int64_t dim, const Used& used) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      if (!used(d / kLanes)) continue;
      if (dim - d < kLanes) rest = dim - d;
      if (dim - d >= kLanes) at[count++] = d;
    }
  }
};
inline Steps all_steps(int64_t dim) {
  return Steps(dim, [](int64_t) { return true; });
}

// scores[row][four keys] = query rows . keys, sixteen partial sums each.
template <int kCount, class T>
TOKRED_INLINE void score_four(const float* query, int64_t stride, const T* keys,
                              const int64_t* offset, int64_t dim, const Steps& steps,
                              float* scores) {
  constexpr int kTogether = kCount == 1 ? 4 : kCount == 2 ? 2 : 1;  // up to eight registers of sums
  Wide<float, 4> folded[kCount][4];
#pragma GCC unroll 1
  for (int first = 0; first < 4; first += kTogether) {
    f32x16 sum[kTogether][kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
#pragma GCC unroll 4
      for (int row = 0; row < kCount; ++row) sum[i][row] = splat(0.0f);
    }
    const auto step = [&](int64_t d, auto load_key) {
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        const f32x16 x = load_key(keys + offset[first + i] + d);
#pragma GCC unroll 4
        for (int row = 0; row < kCount; ++row) {
          sum[i][row] = fma(x, load(query + row * stride + d), sum[i][row]);
        }
      }
    };
    for (int64_t i = 0; i < steps.count; ++i) {
      step(steps.at[i], [](const T* x) { return load_as(x); });
    }
    if (steps.rest > 0) {
      step(dim - steps.rest, [&](const T* x) { return load_row(x, steps.rest); });
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
#pragma GCC unroll 4
      for (int row = 0; row < kCount; ++row) folded[row][first + i] = fold(sum[i][row]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kCount; ++row) {
    const Wide<float, 4> four = sums(folded[row]);
    std::memcpy(scores + row * kScoreChunk, &four, sizeof four);
  }
}

template <int kCount, class T>
__attribute__((noinline)) static void score_rows_of(const float* query, int64_t stride,
                                                    const T* keys, const Visible& visible,
                                                    int64_t dim, const Steps& steps,
                                                    float* scores) {
  for (int64_t i = 0; i < visible.count; i += 4) {
    for (int64_t ahead = i + kAhead; ahead < i + kAhead + 4 && ahead < visible.count; ++ahead) {
      constexpr int64_t kLine = 4 / sizeof(T);  // steps of a cache line
      for (int64_t j = 0; j < steps.count; j += kLine) {
        prefetch_line(keys + visible.offset[ahead] + steps.at[j]);
      }
    }
    score_four<kCount>(query, stride, keys, visible.offset + i, dim, steps, scores + i);
  }
}

// scores[row][visible key] for up to four rows of `stride` floats, zeros behind `dim`.
template <class T>
void score_rows(const float* query, int64_t rows, int64_t stride, const T* keys,
                const Visible& visible, int64_t dim, const Steps& steps, float* scores) {
  switch (rows) {
    case 1: score_rows_of<1>(query, stride, keys, visible, dim, steps, scores); break;
    case 2: score_rows_of<2>(query, stride, keys, visible, dim, steps, scores); break;
    case 3: score_rows_of<3>(query, stride, keys, visible, dim, steps, scores); break;
    default: score_rows_of<4>(query, stride, keys, visible, dim, steps, scores); break;
  }
}

}  // namespace tokred::TOKRED_ISA
