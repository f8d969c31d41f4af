// The Hadamard rotation of common/hadamard.h: butterflies in f32, the shortest step first, the same
// bits on every instruction set.
#pragma once

#include "common/cpu/simd.h"
#include "common/hadamard.h"

namespace tokred::TOKRED_ISA {

// (a, b) -> (a + b, a - b) for the lanes that are kStep apart.
template <int kStep>
TOKRED_INLINE f32x16 butterfly(f32x16 v) {
  constexpr int kWidth = f32x16::kWidth;
  if constexpr (kStep >= kWidth) {
    constexpr int kApart = kStep / kWidth;
    return map<f32x16>(
        [&](int i) { return i & kApart ? v.r[i - kApart] - v.r[i] : v.r[i] + v.r[i + kApart]; });
  } else {
    using Bits = Native<float>::bits;
    Bits sign{};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sign[i] = i & kStep ? INT32_MIN : 0;
    const f32x16 partner = exchange_lanes<kStep>(v);
    return map<f32x16>([&](int i) {  // b - a is b + (-a) bit for bit
      return partner.r[i] + (f32x16::N)((Bits)v.r[i] ^ sign);
    });
  }
}

// 1 / sqrt(n) rounded to f32, n a power of two.
TOKRED_INLINE float inverse_root(int64_t n) {
  float root = 1.0f;
  for (; n >= 4; n /= 4) root *= 0.5f;
  return n == 2 ? root * 0.70710678118654752f : root;
}

// In place, dim a multiple of 16.
TOKRED_INLINE void rotate_row(float* x, int64_t dim) {
  const int64_t size = hadamard_size(dim);
  const f32x16 scale = splat(inverse_root(size));
  for (int64_t d = 0; d < dim; d += kLanes) {
    const f32x16 v = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + d)))));
    store(x + d, size == kLanes ? v * scale : v);
  }
  int64_t step = kLanes;
  for (; step < size / 2; step *= 4) {  // two steps at once
    const f32x16 last = splat(4 * step == size ? inverse_root(size) : 1.0f);
    for (int64_t first = 0; first < dim; first += 4 * step) {
      for (float* p = x + first; p < x + first + step; p += kLanes) {
        const f32x16 a = load(p), b = load(p + step);
        const f32x16 c = load(p + 2 * step), d = load(p + 3 * step);
        const f32x16 ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        store(p, (ab + cd) * last);
        store(p + step, (a_b + c_d) * last);
        store(p + 2 * step, (ab - cd) * last);
        store(p + 3 * step, (a_b - c_d) * last);
      }
    }
  }
  if (step == size) return;
  for (int64_t first = 0; first < dim; first += 2 * step) {
    for (float* p = x + first; p < x + first + step; p += kLanes) {
      const f32x16 a = load(p), b = load(p + step);
      store(p, (a + b) * scale);
      store(p + step, (a - b) * scale);
    }
  }
}

}  // namespace tokred::TOKRED_ISA
