// Comparisons of lanes as bits, and lanes of float32 as float64.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

// Bit i: whether lane i of a is greater than that of b.
template <class T>
TOKRED_INLINE uint32_t greater_lanes(Vec<T> a, Vec<T> b) {
  uint32_t lanes = 0;
#pragma GCC unroll 8
  for (int i = 0; i < Vec<T>::kRegisters; ++i) {
    const auto greater = a.r[i] > b.r[i];
#pragma GCC unroll 16
    for (int j = 0; j < Vec<T>::kWidth; ++j) {
      lanes |= static_cast<uint32_t>(greater[j] & 1) << (i * Vec<T>::kWidth + j);
    }
  }
  return lanes;
}
#ifdef __AVX2__
TOKRED_INLINE uint32_t greater_lanes(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a.r[0], (__m512)b.r[0], _CMP_GT_OQ);
#else
  const auto lanes = [&](int i) {
    return static_cast<uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.r[i], (__m256)b.r[i], _CMP_GT_OQ)));
  };
  return lanes(0) | lanes(1) << 8;
#endif
}
TOKRED_INLINE uint32_t greater_lanes(f64x16 a, f64x16 b) {
  uint32_t all = 0;
#pragma GCC unroll 4
  for (int i = 0; i < f64x16::kRegisters; ++i) {
#ifdef __AVX512F__
    const uint32_t lanes = _mm512_cmp_pd_mask((__m512d)a.r[i], (__m512d)b.r[i], _CMP_GT_OQ);
#else
    const uint32_t lanes =
        _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a.r[i], (__m256d)b.r[i], _CMP_GT_OQ));
#endif
    all |= lanes << (i * f64x16::kWidth);
  }
  return all;
}
#endif
// The same numbers in float64.
TOKRED_INLINE f64x16 widen(f64x16 v) { return v; }
TOKRED_INLINE f64x16 widen(f32x16 v) {
  using Half __attribute__((vector_size(kRegisterBytes / 2))) = float;
  return map<f64x16>([&](int i) {
    Half half;
    std::memcpy(&half, reinterpret_cast<const char*>(&v) + i * sizeof half, sizeof half);
    return __builtin_convertvector(half, f64x16::N);
  });
}

}  // namespace tokred::TOKRED_ISA
