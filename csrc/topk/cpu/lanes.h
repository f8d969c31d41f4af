// Lanes chosen by comparisons: bit masks, and stream compaction of the lanes of a mask.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

inline constexpr float kNaN = __builtin_nanf("");
inline constexpr int32_t kLaneNumbers[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                 8, 9, 10, 11, 12, 13, 14, 15};

// Bit i is set where a > b (or a == b) in lane i.
TOKRED_INLINE uint32_t greater_mask(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a.r[0], (__m512)b.r[0], _CMP_GT_OQ);
#else
  uint32_t mask = 0;
#pragma GCC unroll 4
  for (int i = 0; i < f32x16::kRegisters; ++i) {
#if defined(__AVX2__)
    const __m256 greater = (__m256)(a.r[i] > b.r[i]);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(greater)) << (8 * i);
#else
    for (int j = 0; j < f32x16::kWidth; ++j) {
      mask |= static_cast<uint32_t>(a.r[i][j] > b.r[i][j]) << (i * f32x16::kWidth + j);
    }
#endif
  }
  return mask;
#endif
}
TOKRED_INLINE uint32_t equal_mask(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a.r[0], (__m512)b.r[0], _CMP_EQ_OQ);
#else
  uint32_t mask = 0;
#pragma GCC unroll 4
  for (int i = 0; i < f32x16::kRegisters; ++i) {
#if defined(__AVX2__)
    const __m256 equal = (__m256)(a.r[i] == b.r[i]);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(equal)) << (8 * i);
#else
    for (int j = 0; j < f32x16::kWidth; ++j) {
      mask |= static_cast<uint32_t>(a.r[i][j] == b.r[i][j]) << (i * f32x16::kWidth + j);
    }
#endif
  }
  return mask;
#endif
}
// Bit i is set where lane i is negative.
TOKRED_INLINE uint32_t negative_mask(i32x16 v) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)v.r[0], _mm512_setzero_si512());
#else
  uint32_t mask = 0;
#pragma GCC unroll 4
  for (int i = 0; i < i32x16::kRegisters; ++i) {
#if defined(__AVX2__)
    mask |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)v.r[i])) << (8 * i);
#else
    for (int j = 0; j < i32x16::kWidth; ++j) {
      mask |= static_cast<uint32_t>(v.r[i][j] < 0) << (i * i32x16::kWidth + j);
    }
#endif
  }
  return mask;
#endif
}
// Bit i is set where byte i of sixteen is not zero.
TOKRED_INLINE uint32_t nonzero_mask(const uint8_t* bytes) {
#ifdef __AVX2__
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i zero = _mm_cmpeq_epi8(raw, _mm_setzero_si128());
  return static_cast<uint32_t>(_mm_movemask_epi8(zero)) ^ 0xffffu;
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(bytes[i] != 0) << i;
  return mask;
#endif
}

TOKRED_INLINE int64_t bit_count(uint32_t mask) { return __builtin_popcount(mask); }
// The lowest `count` of the bits that are set.
TOKRED_INLINE uint32_t lowest_bits(uint32_t mask, int64_t count) {
  uint32_t rest = mask;
  for (; count > 0 && rest; --count) rest &= rest - 1;
  return mask ^ rest;
}

// total + 1 in the lanes where a > b.
template <class T>
TOKRED_INLINE i32x16 count_greater(i32x16 total, Vec<T> a, Vec<T> b) {
  return map<i32x16>([&](int i) { return total.r[i] - (a.r[i] > b.r[i]); });
}
#ifdef __AVX512F__
// The compiler makes a vector of the mask first.
TOKRED_INLINE i32x16 add_one(i32x16 total, __mmask16 mask) {
  const __m512i sum = (__m512i)total.r[0];
  return {(i32x16::N)_mm512_mask_sub_epi32(sum, mask, sum, _mm512_set1_epi32(-1))};
}
TOKRED_INLINE i32x16 count_greater(i32x16 total, f32x16 a, f32x16 b) {
  return add_one(total, _mm512_cmp_ps_mask((__m512)a.r[0], (__m512)b.r[0], _CMP_GT_OQ));
}
TOKRED_INLINE i32x16 count_greater(i32x16 total, i32x16 a, i32x16 b) {
  return add_one(total, _mm512_cmpgt_epi32_mask((__m512i)a.r[0], (__m512i)b.r[0]));
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// The numbers of the bits set in a byte, ascending.
struct BitNumbers {
  uint8_t number[256][8];
};
constexpr BitNumbers bit_numbers() {
  BitNumbers table{};
  for (int byte = 0; byte < 256; ++byte) {
    int count = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (byte >> bit & 1) table.number[byte][count++] = static_cast<uint8_t>(bit);
    }
  }
  return table;
}
alignas(64) inline constexpr BitNumbers kBitNumbers = bit_numbers();
// The lanes of a mask of eight, one after another.
TOKRED_INLINE __m256i lanes_of(uint32_t mask) {
  return _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitNumbers.number[mask])));
}
#endif

// Writes the lanes of the mask one after another. Overwrites all of to[0, 16).
template <class T>
TOKRED_INLINE void pack_lanes(T* to, Vec<T> v, uint32_t mask) {
#if defined(__AVX512F__)
  const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)v.r[0]);
  _mm512_storeu_si512(to, packed);
#elif defined(__AVX2__)
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const uint32_t part = mask >> (8 * i) & 255;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_permutevar8x32_epi32((__m256i)v.r[i], lanes_of(part)));
    to += __builtin_popcount(part);
  }
#else
  T lane[kLanes];
  store(lane, v);
  int64_t count = 0;
  for (; mask; mask &= mask - 1) to[count++] = lane[__builtin_ctz(mask)];
#endif
}

// Appends the lanes of v above the limit, and their positions: lane i is at start + i, where all
// lanes of `start` are equal. Overwrites sixteen elements behind the last one.
TOKRED_INLINE void append_greater(f32x16 v, f32x16 limit, i32x16 start, float* value,
                                  int32_t* index, int64_t& count) {
#if defined(__AVX2__) && !defined(__AVX512F__)
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const uint32_t mask = _mm256_movemask_ps((__m256)(v.r[i] > limit.r[i]));
    const __m256i lanes = lanes_of(mask);
    _mm256_storeu_ps(value + count, _mm256_permutevar8x32_ps((__m256)v.r[i], lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + count),
                        _mm256_add_epi32(lanes, (__m256i)(start.r[i] + 8 * i)));
    count += __builtin_popcount(mask);
  }
#else
  const uint32_t mask = greater_mask(v, limit);
  pack_lanes(value + count, v, mask);
  pack_lanes(index + count, load(kLaneNumbers) + start, mask);
  count += bit_count(mask);
#endif
}

// The same where every lane has a position of its own.
TOKRED_INLINE void append_greater_of(f32x16 v, f32x16 limit, i32x16 position, float* value,
                                     int32_t* index, int64_t& count) {
#if defined(__AVX2__) && !defined(__AVX512F__)
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const uint32_t mask = _mm256_movemask_ps((__m256)(v.r[i] > limit.r[i]));
    const __m256i lanes = lanes_of(mask);
    _mm256_storeu_ps(value + count, _mm256_permutevar8x32_ps((__m256)v.r[i], lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + count),
                        _mm256_permutevar8x32_epi32((__m256i)position.r[i], lanes));
    count += __builtin_popcount(mask);
  }
#else
  const uint32_t mask = greater_mask(v, limit);
  pack_lanes(value + count, v, mask);
  pack_lanes(index + count, position, mask);
  count += bit_count(mask);
#endif
}

// Appends the lanes of v above `low` but not above `high`. Overwrites sixteen elements behind.
TOKRED_INLINE void pack_between(f32x16 v, f32x16 low, f32x16 high, float* value, int64_t& count) {
#if defined(__AVX2__) && !defined(__AVX512F__)
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 above = (__m256)(v.r[i] > high.r[i]);
    const uint32_t mask = _mm256_movemask_ps(_mm256_andnot_ps(above, (__m256)(v.r[i] > low.r[i])));
    _mm256_storeu_ps(value + count, _mm256_permutevar8x32_ps((__m256)v.r[i], lanes_of(mask)));
    count += __builtin_popcount(mask);
  }
#else
  const uint32_t mask = greater_mask(v, low) & ~greater_mask(v, high);
  pack_lanes(value + count, v, mask);
  count += bit_count(mask);
#endif
}

}  // namespace tokred::TOKRED_ISA
