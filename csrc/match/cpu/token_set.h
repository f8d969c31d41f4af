// Rows of a TokenSet: where they stand, and whether they are masked.
#pragma once

#include "common/cpu/simd.h"
#include "match/params.h"

namespace tokred::TOKRED_ISA {

// The position of row t of a set in batch item `item`, or -1 where the row points nowhere.
TOKRED_INLINE int64_t row_position(const TokenSet& set, int64_t item, int64_t t) {
  const int64_t position =
      set.rows ? set.rows[item * set.rows_stride_batch + t] : set.first + set.step * t;
  return position >= 0 && position < set.tokens ? position : -1;
}
TOKRED_INLINE bool row_masked(const TokenSet& set, int64_t item, int64_t position) {
  return set.mask && !set.mask[item * set.mask_stride_batch + position * set.mask_stride_token];
}

}  // namespace tokred::TOKRED_ISA
