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

inline constexpr int kNearestThreads = 256;
inline constexpr int kNearestTokens = 128;    // of a tile
inline constexpr int kNearestClusters = 64;   // of a tile
inline constexpr int kNearestChannels = 16;   // of a tile
inline constexpr int kClusterThreads = 256;   // of kernels that give a warp to a cluster
inline constexpr int kRoundThreads = 256;

// Shared memory of a tile: both operands by channel, four longer than they are wide.
constexpr int64_t kNearestBytes =
    int64_t{4} * kNearestChannels * (raw_pitch(kNearestTokens) + raw_pitch(kNearestClusters));

// Example: B = 1, N = 65536: 512 blocks of 128 tokens.
constexpr LaunchPlan plan_nearest(int64_t batch, int64_t tokens) {
  const int64_t blocks = batch * divide_up(tokens, kNearestTokens);
  return {{blocks < kMaxBlocks ? blocks : kMaxBlocks, 1, 1}, kNearestThreads, kNearestBytes};
}
// A warp for each of `rows` rows. Example: B = 1, K = 256: 32 blocks of eight warps.
constexpr LaunchPlan plan_cluster_rows(int64_t rows) {
  const int64_t blocks = divide_up(rows, kClusterThreads / 32);
  return {{blocks < kMaxBlocks ? blocks : kMaxBlocks, 1, 1}, kClusterThreads, 0};
}
// A block an item.
constexpr LaunchPlan plan_cluster_items(int64_t batch) {
  return {{batch < kMaxBlocks ? batch : kMaxBlocks, 1, 1}, kRoundThreads, 0};
}

}  // namespace tokred::cuda
