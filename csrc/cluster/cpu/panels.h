// Tokens as panels [C][16 lanes] in f32, with what makes distances of dot products.
#pragma once

#include "common/cpu/register_tile.h"
#include "common/cpu/row.h"
#include "common/cpu/sizes.h"

namespace tokred::TOKRED_ISA {

// distance = scale * dot + offset_i + offset_j: of l2 it is the square. Offsets are sums in the
// order of the dot products, so that equal rows have the distance 0 exactly.
TOKRED_INLINE float distance_scale(Metric metric) { return metric == Metric::l2 ? -2.0f : -1.0f; }

TOKRED_INLINE bool is_masked(const TokenSet& x, int64_t item, int64_t token) {
  return x.mask && !x.mask[item * x.mask_stride_batch + token * x.mask_stride_token];
}
template <class T>
TOKRED_INLINE const T* token_row(const TokenSet& x, int64_t item, int64_t token) {
  return static_cast<const T*>(x.data) + item * x.stride_batch + token * x.stride_token;
}

// Packs the tokens [token0, token0 + 16), of unit length for cosine, and writes their offsets and
// squared norms, these as they came. Tokens that do not take part are zeros, their squared norm
// NaN: masked ones, those past the end, and those whose squared norm is not finite.
template <class T>
void pack_panel(const TokenSet& x, int64_t item, int64_t token0, int64_t channels, Metric metric,
                float* panel, float* offset, float* squared) {
  constexpr int64_t kChannels = 64;  // transposed at a time
  const T* rows[kLanes];
  float scale[kLanes];
  bool is_null[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t token = token0 + lane;
    rows[lane] = nullptr;
    scale[lane] = 1.0f;
    squared[lane] = __builtin_nanf("");
    is_null[lane] = false;
    if (token >= x.tokens || is_masked(x, item, token)) continue;
    const T* row = token_row<T>(x, item, token);
    const float sum = squared_norm(row, channels);
    if (!(sum < __builtin_inff())) continue;
    rows[lane] = row;
    squared[lane] = sum;
    if (metric == Metric::cosine) {
      scale[lane] = inverse_norm(sum);
      is_null[lane] = __builtin_sqrtf(sum) < kNormEps;
    }
  }
  f32x16 norm = splat(0.0f);
  for (int64_t c = 0; c < channels; c += kChannels) {
    const int64_t count = min(kChannels, channels - c);
    alignas(64) float chunk[kLanes * kChannels];
    for (int lane = 0; lane < kLanes; ++lane) {
      float* to = chunk + lane * count;
      if (rows[lane]) pack_row(rows[lane] + c, count, to);
      for (int64_t i = 0; i < count; ++i) to[i] = rows[lane] ? to[i] * scale[lane] : 0.0f;
    }
    transpose(chunk, kLanes, count, panel + c * kLanes);
    for (int64_t i = c; i < c + count; ++i) {
      const f32x16 lanes = load(panel + i * kLanes);
      norm = fma(lanes, lanes, norm);
    }
  }
  store(offset, norm);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (metric == Metric::dot) offset[lane] = 0.0f;
    if (metric == Metric::cosine) offset[lane] = is_null[lane] ? 0.5f : 0.5f * offset[lane];
  }
}

// One token of the panels as a row.
TOKRED_INLINE void unpack_token(const float* panels, int64_t channels, int64_t token, float* row) {
  const float* lane = panels + token / kLanes * channels * kLanes + token % kLanes;
  for (int64_t c = 0; c < channels; ++c) row[c] = lane[c * kLanes];
}

// The first of the largest of `count` numbers, a multiple of sixteen; -1 where none is above -inf.
TOKRED_INLINE int64_t first_max(const float* numbers, int64_t count) {
  f32x16 best = splat(-__builtin_inff());
  i32x16 where = splat(int32_t{-1});
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32x16 some = load(numbers + i);
    where = select_greater(some, best, splat(static_cast<int32_t>(i)), where);
    best = select_greater(some, best, some, best);
  }
  const float largest = max_lane(best);
  float lane[kLanes];
  int32_t block[kLanes];
  store(lane, best);
  store(block, where);
  int64_t first = -1;
  for (int i = 0; i < kLanes; ++i) {
    if (block[i] < 0 || lane[i] != largest) continue;
    if (first < 0 || block[i] + i < first) first = block[i] + i;
  }
  return first;
}

}  // namespace tokred::TOKRED_ISA
