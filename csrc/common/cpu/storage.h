// Storage types of tensors (float, f16, bf16, double) to and from sixteen lanes of the type that
// they are accumulated in.
#pragma once

#include "common/cpu/simd.h"
#include "common/types.h"

namespace tokred::TOKRED_ISA {

#ifdef __AVX2__
inline constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

// bf16 and f16 are stored as their bit patterns.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

TOKRED_INLINE float to_float(float x) { return x; }
TOKRED_INLINE double to_float(double x) { return x; }
TOKRED_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
TOKRED_INLINE float to_float(f16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  // Shift the exponent into place, then let a multiplication by 2^112 rebias it (subnormals too).
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // inf and NaN keep their mantissa
  if (magnitude > 0x0f800000u) bits |= 0x00400000u;   // a NaN comes out quiet
  bits |= static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

TOKRED_INLINE void from_float(float x, float& out) { out = x; }
TOKRED_INLINE void from_float(double x, double& out) { out = x; }
// Round to nearest even; NaN becomes the quiet NaN that torch writes.
TOKRED_INLINE void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = x == x ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16) : 0x7fc0u;
}
TOKRED_INLINE void from_float(float x, f16& out) {
#ifdef __F16C__
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, kNearestEven));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u | ((bits >> 13) & 0x3ffu);
  } else if (bits >= 0x47800000u) {
    half = 0x7c00u;
  } else if (bits >= 0x38800000u) {
    bits += 0xfffu + ((bits >> 13) & 1);
    half = (bits - 0x38000000u) >> 13;
  } else {
    // Subnormal: adding 0.5 puts the rounded value into the low mantissa bits.
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000u;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

#ifdef __AVX2__
// Sixteen values from their bits.
TOKRED_INLINE f32x16 widen_bf16(__m256i bits) {
#ifdef __AVX512F__
  return {(f32x16::N)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)};
#else
  const auto widen = [](__m128i half) {
    return (f32x16::N)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
  };
  return {widen(_mm256_castsi256_si128(bits)), widen(_mm256_extracti128_si256(bits, 1))};
#endif
}
TOKRED_INLINE f32x16 widen_f16(__m256i bits) {
#ifdef __AVX512F__
  return {(f32x16::N)_mm512_cvtph_ps(bits)};
#else
  return {(f32x16::N)_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
          (f32x16::N)_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
#endif
}
#else
// Eight values of sixteen bits as the upper or the lower halves of two registers, and back.
using LaneBits = Native<float>::bits;
typedef uint16_t HalfBits __attribute__((vector_size(kRegisterBytes)));
template <bool kUpper>
TOKRED_INLINE i32x16 load_halves(const void* p) {
  i32x16 out;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    HalfBits x, zero = {};
    std::memcpy(&x, static_cast<const char*>(p) + kRegisterBytes * i, kRegisterBytes);
    const HalfBits low = kUpper ? zero : x, high = kUpper ? x : zero;
    out.r[2 * i] = (LaneBits)__builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
    out.r[2 * i + 1] = (LaneBits)__builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
  }
  return out;
}
TOKRED_INLINE void store_halves(void* p, i32x16 v) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const HalfBits x = __builtin_shufflevector((HalfBits)v.r[2 * i], (HalfBits)v.r[2 * i + 1], 0, 2,
                                               4, 6, 8, 10, 12, 14);
    std::memcpy(static_cast<char*>(p) + kRegisterBytes * i, &x, kRegisterBytes);
  }
}
// As to_float() does. One function: inline, it would be a tenth of the machine code.
static inline __attribute__((noinline)) f32x16 widen_f16(const f16* p) {
  const i32x16 x = load_halves<false>(p);
  return map<f32x16>([&](int i) {
    const LaneBits magnitude = (x.r[i] & 0x7fff) << 13;
    auto bits = (LaneBits)((f32x16::N)magnitude * 0x1p112f);
    bits |= (magnitude >= 0x0f800000) & 0x7f800000;
    bits |= (magnitude > 0x0f800000) & 0x00400000;
    return (f32x16::N)(bits | (x.r[i] & 0x8000) << 16);
  });
}
// As from_float() does.
static inline __attribute__((noinline)) void narrow_f16(f16* p, f32x16 v) {
  store_halves(p, map<i32x16>([&](int i) {
                 const auto bits = (LaneBits)v.r[i];
                 const LaneBits magnitude = bits & 0x7fffffff;
                 const LaneBits tail = magnitude >> 13;
                 const LaneBits normal = (magnitude - 0x38000000 + 0xfff + (tail & 1)) >> 13;
                 const LaneBits subnormal = (LaneBits)((f32x16::N)magnitude + 0.5f) - 0x3f000000;
                 LaneBits half = magnitude >= 0x38800000 ? normal : subnormal;
                 half = magnitude >= 0x47800000 ? LaneBits{} + 0x7c00 : half;
                 half = magnitude > 0x7f800000 ? 0x7e00 | (tail & 0x3ff) : half;
                 return ((bits >> 16) & 0x8000) | half;
               }));
}
#endif

// Sixteen values of any storage type as the accumulator type.
TOKRED_INLINE f32x16 load_as(const float* p) { return load(p); }
TOKRED_INLINE f64x16 load_as(const double* p) { return load(p); }
TOKRED_INLINE f32x16 load_as(const bf16* p) {
#if defined(__AVX512F__)
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {(f32x16::N)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
#elif defined(__AVX2__)
  return map<f32x16>([&](int i) {
    __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
    return (f32x16::N)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  });
#else
  const i32x16 bits = load_halves<true>(p);
  return map<f32x16>([&](int i) { return (f32x16::N)bits.r[i]; });
#endif
}
TOKRED_INLINE f32x16 load_as(const f16* p) {
#if defined(__AVX512F__)
  return {(f32x16::N)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif defined(__F16C__)
  return map<f32x16>([&](int i) {
    return (f32x16::N)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  });
#else
  return widen_f16(p);
#endif
}

TOKRED_INLINE void store_as(float* p, f32x16 v) { store(p, v); }
TOKRED_INLINE void store_as(double* p, f64x16 v) { store(p, v); }
// bf16 rounded to nearest even, each in a lane of 32; NaN becomes the quiet NaN that torch writes.
TOKRED_INLINE i32x16 round_to_bf16(f32x16 v) {
  return map<i32x16>([&](int i) {
    const auto bits = (Native<float>::bits)v.r[i];
    const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return v.r[i] == v.r[i] ? rounded : Native<float>::bits{} + 0x7fc0;
  });
}
TOKRED_INLINE void store_as(bf16* p, f32x16 v) {
  const i32x16 rounded = round_to_bf16(v);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)rounded.r[0]));
#elif defined(__AVX2__)
#pragma GCC unroll 2
  for (int i = 0; i < f32x16::kRegisters; ++i) {
    const __m256i low = (__m256i)(rounded.r[i] & 0xffff);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_castsi256_si128(packed));
  }
#else
  store_halves(p, rounded);
#endif
}
TOKRED_INLINE void store_as(f16* p, f32x16 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v.r[0], kNearestEven));
#elif defined(__F16C__)
#pragma GCC unroll 2
  for (int i = 0; i < f32x16::kRegisters; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                     _mm256_cvtps_ph((__m256)v.r[i], kNearestEven));
  }
#else
  narrow_f16(p, v);
#endif
}

// The accumulator type of a storage type.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls f.template operator()<T>() with the storage type of `dtype`.
template <class F>
TOKRED_INLINE void visit_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: f.template operator()<float>(); break;
    case DType::f16: f.template operator()<f16>(); break;
    case DType::bf16: f.template operator()<bf16>(); break;
    case DType::f64: f.template operator()<double>(); break;
  }
}
// The same for ops that accumulate in f32, whose front ends refuse f64.
template <class F>
TOKRED_INLINE void visit_f32(DType dtype, F f) {
  visit_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) < 8) f.template operator()<T>();
  });
}

}  // namespace tokred::TOKRED_ISA
