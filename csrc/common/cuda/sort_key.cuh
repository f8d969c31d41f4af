// Floats as integers of the opposite order, for sorts by score.
#pragma once

#include "common/cuda/numbers.cuh"

namespace tokred::cuda {

// Descends with x over all floats, +0 before -0, and the float of such a key.
__device__ __forceinline__ uint32_t descending_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float from_descending_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key : ~key & 0x7fffffffu);
}

}  // namespace tokred::cuda
