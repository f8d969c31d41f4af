// Tiles and launch plans of the cluster ops.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kEdgeThreads = 256;
inline constexpr int kLabelThreads = 512;

// Example: B = 1, 24 x 24 tokens: 72 blocks of eight warps, a warp a token.
constexpr LaunchPlan plan_grid_edges(int64_t tokens) {
  const int64_t blocks = divide_up(tokens, kEdgeThreads / 32);
  return {{blocks < kMaxBlocks ? blocks : kMaxBlocks, 1, 1}, kEdgeThreads, 0};
}
// Example: B = 16: 16 blocks, an item each; room for a partial sum of each warp.
constexpr LaunchPlan plan_grid_labels(int64_t batch) {
  return {{batch < kMaxBlocks ? batch : kMaxBlocks, 1, 1}, kLabelThreads, 4 * 32};
}

// Edges u8 and numbers of the roots i32, of all tokens. 16 grids of 576: 45 KiB.
constexpr int64_t grid_scratch_bytes(int64_t tokens) { return round_up(tokens, 16) + 4 * tokens; }

}  // namespace tokred::cuda
