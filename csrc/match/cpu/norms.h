// Squared norms of sixteen rows at once: the sum of each takes as long as that of four.
#pragma once

#include "attention/cpu/rows.h"

namespace tokred::TOKRED_ISA {

// squared_norm() of sixteen rows, the same bits; 0 of a null one.
template <class T>
TOKRED_INLINE Vec<Accumulator<T>> squared_norms(const T* const (&rows)[kLanes], int64_t channels) {
  alignas(64) Accumulator<T> partial[kLanes * kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const T* const x = rows[lane];
    auto total = splat(Accumulator<T>(0));
    for (int64_t c = 0; x && c < channels; c += kLanes) {
      const auto some = load_row(x + c, channels - c);
      total = fma(some, some, total);
    }
    store(partial + lane * kLanes, total);
  }
  return sum_each(partial);
}

// inverse_norm() of sixteen.
TOKRED_INLINE f32x16 inverse_norm(f32x16 squared) {
  return splat(1.0f) / max(splat(kNormEps), sqrt(squared));
}

}  // namespace tokred::TOKRED_ISA
