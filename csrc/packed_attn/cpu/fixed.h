// packed_attention: sixteen-bit fixed point, in which f16 and bf16 queries, and weights, are
// multiplied by codes. Products of two pairs share an instruction and nothing is rounded until they
// are summed, so it takes half the multiplications of f32. A step is a power of two, at most 2^-14
// of the largest number that shares it: of a bf16 row the channels down to 2^-7 of the largest one
// are exact, of an f16 row those down to 2^-4, and all others are off by half a step.
#pragma once

#include "attention/cpu/rows.h"
#include "common/cpu/dispatch.h"
#include "kv_pack/cpu/codes.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace tokred::TOKRED_ISA {

// A power of two that one unit stands for, and its inverse.
struct FixedStep {
  float step, inverse;
};

TOKRED_INLINE float power_of_two(int32_t biased_exponent) {
  const int32_t bits = biased_exponent << 23;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The step of x[0, count): the largest number takes fifteen bits. NaN unless all are finite, and
// with it whatever they are multiplied by.
TOKRED_INLINE FixedStep fixed_step(const float* x, int64_t count) {
  const auto greater_lanes = [](auto a, auto b) { return a > b ? a : b; };
  i32x16 most = splat(0);  // magnitudes are in the order of their bits
  for (int64_t first = 0; first < count; first += kLanes) {
    const f32x16 number = load_row(x + first, count - first);
    most = map<i32x16>(
        [&](int i) { return greater_lanes((i32x16::N)number.r[i] & INT32_MAX, most.r[i]); });
  }
  int32_t exponent = max_lane(most) >> 23;
  if (exponent == 255) return {NAN, 0.0f};
  if (exponent < 15) exponent = 15;  // a lower one has no inverse
  return {power_of_two(exponent - 14), power_of_two(254 + 14 - exponent)};
}

// Sixteen numbers of units, to the nearest; what would be 32768 is 32767.
TOKRED_INLINE void store_units(int16_t* p, f32x16 units) {
  const i32x16 number = round_even(units);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16((__m512i)number.r[0]));
#elif defined(__AVX2__)
  const __m256i quarters = _mm256_packs_epi32((__m256i)number.r[0], (__m256i)number.r[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(quarters, 0xd8));
#else
  int32_t lane[kLanes];
  store(lane, number);
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<int16_t>(lane[i] < INT16_MAX ? lane[i] : INT16_MAX);
  }
#endif
}
// The pair at p, everywhere.
TOKRED_INLINE Register<int32_t> load_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair - Register<int32_t>{};
}

// total + the product of the lower halves + that of the upper ones, as signed numbers.
template <bool kVnni>
TOKRED_INLINE Register<int32_t> add_products(Register<int32_t> a, Register<int32_t> b,
                                             Register<int32_t> total) {
#if defined(__AVX512F__)
  if constexpr (kVnni) {
    // Every assembler knows it; the compiler would want all of the file to be for such machines.
    asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
    return total;
  }
  return total + (Register<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  // GCC would keep several products at once, and run out of registers.
  Register<int32_t> product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(total), "=&v"(product) : "v"(a), "v"(b));
  return total;
#elif defined(__SSE2__)
  return total + (Register<int32_t>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return total + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// f.template operator()<whether the machine multiplies and adds pairs in one instruction>().
template <class F>
TOKRED_INLINE void visit_vnni(const F& f) {
#ifdef __AVX512F__
  if (has_vnni()) return f.template operator()<true>();
#endif
  f.template operator()<false>();
}

}  // namespace tokred::TOKRED_ISA
