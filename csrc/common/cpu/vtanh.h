// tanh of sixteen lanes, the same bits on every instruction set.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

// tanh(x), within 3 ulp, also where x is small; NaN for NaN. It is m / (m + 2) with
// m = exp(2x) - 1. With 2x = n ln 2 + r that is 2^n (exp(r) - 1) + (2^n - 1), and exp(r) - 1 is
// r + r^2 p(r), p of degree 4 on |r| <= ln 2 / 2.
TOKRED_INLINE f32x16 tanh(f32x16 x) {
  // Adding 1.5 * 2^23 rounds to an integer, which stands in the low bits; 127 is the exponent bias.
  constexpr float kRound = 12582912.0f + 127.0f;
  // From |x| = 10 on the result is rounded to 1.
  const f32x16 y = min(splat(20.0f), max(splat(-20.0f), x + x));
  const f32x16 rounded = fma(y, splat(0x1.715476p+0f), splat(kRound));
  const f32x16 n = rounded - splat(kRound);
  f32x16 r = fma(n, splat(-0x1.62e400p-1f), y);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  f32x16 p = splat(0x1.6a23d0p-10f);
  p = fma(p, r, splat(0x1.123a20p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  const f32x16 small = fma(r * r, p, r);
  const f32x16 power =
      map<f32x16>([&](int i) { return (f32x16::N)((Native<float>::bits)rounded.r[i] << 23); });
  const f32x16 m = fma(power, small, power - splat(1.0f));
  return m / (m + splat(2.0f));
}

TOKRED_INLINE f64x16 tanh(f64x16 x) {
  double lane[kLanes];
  store(lane, x);
  for (int i = 0; i < kLanes; ++i) lane[i] = std::tanh(lane[i]);
  return load(lane);
}

}  // namespace tokred::TOKRED_ISA
