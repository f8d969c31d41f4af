// Squared distances of rows to panels of sixteen columns, from differences.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

inline constexpr int kDistanceRows = 4;  // of a register tile

// squared[i] = |row[i] - column|^2 for the sixteen columns [C][16].
TOKRED_INLINE void squared_distances(const float* const (&row)[kDistanceRows], const float* columns,
                                     int64_t channels, f32x16 (&squared)[kDistanceRows]) {
  for (int i = 0; i < kDistanceRows; ++i) squared[i] = splat(0.0f);
  for (int64_t c = 0; c < channels; ++c) {
    const f32x16 column = load(columns + c * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kDistanceRows; ++i) {
      const f32x16 difference = splat(row[i][c]) - column;
      squared[i] = fma(difference, difference, squared[i]);
    }
  }
}

}  // namespace tokred::TOKRED_ISA
