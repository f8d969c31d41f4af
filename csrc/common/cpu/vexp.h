// exp of sixteen lanes, the same bits on every instruction set.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

// exp(x) for x <= 88, within 1 ulp; 0 below -87.7, NaN for NaN. With x = n ln 2 + r it is
// 2^n exp(r), and exp(r) a minimax polynomial of degree 6 on |r| <= ln 2 / 2.
TOKRED_INLINE f32x16 exp(f32x16 x) {
  // Adding 1.5 * 2^23 rounds to an integer, which stands in the low bits; 127 is the exponent bias.
  constexpr float kRound = 12582912.0f + 127.0f;
  // -88 gives the biased exponent 0, hence exactly 0.
  x = max(splat(-88.0f), x);
  const f32x16 rounded = fma(x, splat(0x1.715476p+0f), splat(kRound));
  const f32x16 n = rounded - splat(kRound);
  f32x16 r = fma(n, splat(-0x1.62e400p-1f), x);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  f32x16 p = splat(0x1.6a23d0p-10f);
  p = fma(p, r, splat(0x1.123a20p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return map<f32x16>(
      [&](int i) { return p.r[i] * (f32x16::N)((Native<float>::bits)rounded.r[i] << 23); });
}

TOKRED_INLINE f64x16 exp(f64x16 x) {
  double lane[kLanes];
  store(lane, x);
  for (int i = 0; i < kLanes; ++i) lane[i] = std::exp(lane[i]);
  return load(lane);
}

}  // namespace tokred::TOKRED_ISA
