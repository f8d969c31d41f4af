// Operands of two planes of 16 bits, x = high + low: as exact as sums in fp32 for what unpacking
// and rotation give, of which one plane would keep 8 or 11 bits.
#pragma once

#include "attention/cuda/raw_tile.cuh"

namespace tokred::cuda::attention {

template <class T>
struct Split;

template <class T>
struct Operand<Split<T>> {
  using Element = T;
  static constexpr int kPlanes = 2;
};

template <class T>
struct StoredAs<Split<T>> {
  using type = T;
};

template <class T>
__device__ __forceinline__ void split_in_two(float x, float y, uint32_t (&out)[2]) {
  const T high[2] = {from_float<T>(x), from_float<T>(y)};
  out[0] = pack(high[0], high[1]);
  out[1] = pack_pair<T>(x - to_float(high[0]), y - to_float(high[1]));
}
template <>
__device__ __forceinline__ void split_pair<Split<bf16>>(float x, float y, uint32_t (&out)[2]) {
  split_in_two<bf16>(x, y, out);
}
template <>
__device__ __forceinline__ void split_pair<Split<f16>>(float x, float y, uint32_t (&out)[2]) {
  split_in_two<f16>(x, y, out);
}

// f16 ends early: finite numbers stay finite.
template <class T>
__device__ __forceinline__ void keep_finite(float (&x)[8]) {
  if constexpr (std::is_same_v<T, f16>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (fabsf(x[i]) < kInfinity) x[i] = fminf(fmaxf(x[i], -65504.0f), 65504.0f);
    }
  }
}

}  // namespace tokred::cuda::attention
