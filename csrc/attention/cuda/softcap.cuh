// The softcap of logits, softcap * tanh(scale * product), in units of log 2.
#pragma once

#include "attention/cuda/visibility.cuh"

namespace tokred::cuda::attention {

// What products are multiplied by on their way to logits: nothing after cap_product().
__device__ __forceinline__ float logit_scale(const AttentionParams& p) {
  return p.softcap > 0 ? 1.0f : static_cast<float>(p.scale) * kLog2E;
}

// tanh(x) within 2e-7, and within 1e-6 of itself: 1 - 2 / (exp(2|x|) + 1), or below 0.35, where
// that cancels, the series to x^9. tanhf() needs so many registers that tiles of logits would
// spill.
__device__ __forceinline__ float compact_tanh(float x) {
  const float a = fabsf(x), square = a * a;
  float series = fmaf(square, 0x1.664f48p-6f, -0x1.ba1ba2p-5f);
  series = fmaf(square, series, 0x1.111112p-3f);
  series = fmaf(square, series, -0x1.555556p-2f);
  series = fmaf(a * square, series, a);
  const float quotient = 1.0f - __fdividef(2.0f, exp2_approx(2 * kLog2E * a) + 1.0f);
  return copysignf(a < 0.35f ? series : quotient, x);
}

// Where there is a softcap: the product becomes a logit, but for its bias. Returns the derivative
// of the logit by scale * product, 1 where there is none.
__device__ __forceinline__ float cap_product(float& product, const AttentionParams& p) {
  if (!(p.softcap > 0)) return 1.0f;
  const auto cap = static_cast<float>(p.softcap);
  const float x = compact_tanh(product * static_cast<float>(p.scale));
  product = cap * kLog2E * x;
  return cap - cap * x * x;
}

// The gradient of a product from that of its logit; exactly 0 where the pair may be hidden.
__device__ __forceinline__ float grad_product(float grad, float slope) {
  return grad == 0.0f ? 0.0f : grad * slope;
}

// cap_product() of a tile.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void cap_products(float (&product)[kRowTiles][kTiles][4],
                                             const AttentionParams& p) {
  if (!(p.softcap > 0)) return;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) cap_product(product[i][j][e], p);
    }
  }
}

}  // namespace tokred::cuda::attention
