// Rows of channels: partial loads and stores, norms and dot products with a fixed summation order.
#pragma once

#include "simd.h"

namespace tokred::TOKRED_ISA {

// The first `count` <= 16 values, zeros behind them.
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> load_row(const T* p, int64_t count) {
  if (count >= kLanes) return load_as(p);
  T lane[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
  return load_as(lane);
}
template <class T>
TOKRED_INLINE void store_row(T* p, Vec<Accumulator<T>> v, int64_t count) {
  if (count >= kLanes) {
    store_as(p, v);
    return;
  }
  T lane[kLanes];
  store_as(lane, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
}

// Sixteen partial sums over the channels, then one tree.
template <class T>
TOKRED_INLINE Accumulator<T> dot_row(const T* x, const T* y, int64_t channels) {
  auto total = splat(Accumulator<T>(0));
  for (int64_t c = 0; c < channels; c += kLanes) {
    total = fma(load_row(x + c, channels - c), load_row(y + c, channels - c), total);
  }
  return sum(total);
}
template <class T>
TOKRED_INLINE Accumulator<T> squared_norm(const T* x, int64_t channels) {
  return dot_row(x, x, channels);
}

}  // namespace tokred::TOKRED_ISA
