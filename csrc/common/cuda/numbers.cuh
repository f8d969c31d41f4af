// 16-bit floats as bits: the same types for nvcc, and for the host compiler of the emulation.
#pragma once

#include <cstdint>
#ifdef TOKRED_SIMT
#include "simt.h"
#endif

namespace tokred::cuda {

inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kNaN = __builtin_nanf("");

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(uint32_t{x.bits} << 16);
}

// from_float<T>(x): round to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

#ifdef TOKRED_SIMT

inline float to_float(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  return __uint_as_float(bits | uint32_t(x.bits & 0x8000) << 16);
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};  // as the instruction does
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint16_t sign = uint16_t(__float_as_uint(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (!(magnitude < 65520.0f)) return {uint16_t(x != x ? 0x7fff : sign | 0x7c00)};
  // Adding a power of two leaves the rounded significand in the low bits of the sum.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const float rounded = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  return {uint16_t(sign | (((exponent + 14) << 10) + int(rounded)))};
}

// pack_pair<T>(low, high): two neighbours of a row, rounded, as one register.
template <class T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

#else

__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

#endif

// Two neighbours of a row as one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  return low.bits | uint32_t{high.bits} << 16;
}

// max and min of two numbers, NaN where either is.
__device__ __forceinline__ float max_or_nan(float x, float y) { return y > x || y != y ? y : x; }
__device__ __forceinline__ float min_or_nan(float x, float y) { return y < x || y != y ? y : x; }

}  // namespace tokred::cuda
