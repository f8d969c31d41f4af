// Dot products of the tokens of two panels [C][16]: a lane is a token, sums run over the channels.
#pragma once

#include "common/cpu/register_tile.h"
#include "common/cpu/sizes.h"

namespace tokred::TOKRED_ISA {

// Channels of a few panels that fit the first-level cache together.
inline constexpr int64_t kProductChannels = 128;
inline constexpr int kProductRows =
    kTileRows<float> * kTilePanels<float> < kLanes ? kTileRows<float> * kTilePanels<float> : kLanes;

// sums[row][lane] += lane `row` of `rows` . lane of `panel`, over the channels in their order.
template <int kRows>
TOKRED_INLINE void add_products(const float* rows, const float* panel, int64_t channels,
                                int64_t row, float* sums) {
  for (; row + kRows <= kLanes; row += kRows) {
    f32x16 sum[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r] = load(sums + (row + r) * kLanes);
    for (int64_t c = 0; c < channels; ++c) {
      const f32x16 lanes = load(panel + c * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sum[r] = fma(splat(rows[c * kLanes + row + r]), lanes, sum[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(sums + (row + r) * kLanes, sum[r]);
  }
  if constexpr (kRows > 1) {
    add_products<(kRows > 4 ? 4 : kRows - 1)>(rows, panel, channels, row, sums);
  }
}

// The same for all sixteen rows: products[row][lane], [16][16].
TOKRED_INLINE void add_products(const float* rows, const float* panel, int64_t channels,
                                float* products) {
  add_products<kProductRows>(rows, panel, channels, 0, products);
}

}  // namespace tokred::TOKRED_ISA
