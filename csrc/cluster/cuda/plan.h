// Tiles and launch plans of the cluster ops.
#pragma once

#include "common/cuda/similarity_plan.h"

namespace tokred::cuda {

inline constexpr int kEdgeThreads = 256;
inline constexpr int kLabelThreads = 512;

// Example: B = 1, 24 x 24 tokens: 72 blocks of eight warps, a warp a token.
constexpr LaunchPlan plan_grid_edges(int64_t tokens) {
  const int64_t blocks = divide_up(tokens, kEdgeThreads / 32);
  return {{capped(blocks), 1, 1}, kEdgeThreads, 0};
}
// Example: B = 16: 16 blocks, an item each; room for a partial sum of each warp.
constexpr LaunchPlan plan_grid_labels(int64_t batch) {
  return {{capped(batch), 1, 1}, kLabelThreads, 4 * 32};
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
  return {{capped(blocks), 1, 1}, kNearestThreads, kNearestBytes};
}
// A warp for each of `rows` rows. Example: B = 1, K = 256: 32 blocks of eight warps.
constexpr LaunchPlan plan_cluster_rows(int64_t rows) {
  const int64_t blocks = divide_up(rows, kClusterThreads / 32);
  return {{capped(blocks), 1, 1}, kClusterThreads, 0};
}
// A block for each centroid and 1024 channels; it looks through 1024 neighbours at a time.
// Example: B = 1, M = 256, D = 256: 256 blocks of 8 KiB.
inline constexpr int kMemberEntries = 4 * kClusterThreads;
inline constexpr int kMemberChannels = 4 * kClusterThreads;
constexpr LaunchPlan plan_members(int64_t clusters, int64_t channels) {
  const int64_t blocks = clusters * divide_up(channels, kMemberChannels);
  return {{blocks < kMaxBlocks ? blocks : kMaxBlocks, 1, 1},
          kClusterThreads,
          int64_t{8} * kMemberEntries + 4 * 32};
}
inline constexpr int kDistanceThreads = 256;
inline constexpr int kDistanceMembers = 64;   // rows and columns of a tile
inline constexpr int kDistanceChannels = 16;  // of a tile
constexpr int64_t kDistanceBytes = int64_t{8} * kDistanceChannels * raw_pitch(kDistanceMembers);

// Example: B = 16, N = 588: 160 blocks of 64 members.
constexpr LaunchPlan plan_distance_sums(int64_t batch, int64_t tokens) {
  const int64_t blocks = batch * divide_up(tokens, kDistanceMembers);
  return {{capped(blocks), 1, 1}, kDistanceThreads, kDistanceBytes};
}
// A block an item.
constexpr LaunchPlan plan_cluster_items(int64_t batch) {
  return {{capped(batch), 1, 1}, kRoundThreads, 0};
}

// greedy_select: eight lanes a token. A block has an item for all steps, or all items are split
// into parts and every step is a launch.
inline constexpr int kGreedyThreads = 512;
inline constexpr int kGreedyLanes = 8;
inline constexpr int kGreedyGroups = kGreedyThreads / kGreedyLanes;
inline constexpr int64_t kGreedyItem = 1 << 17;  // numbers that a block passes over at every step
inline constexpr int64_t kGreedyPart = 1 << 15;
inline constexpr int64_t kMaxGreedyParts = 256;
inline constexpr int64_t kGreedySharedBytes = 8 * 32;  // a best score and its token for each warp

// Example: [16, 1024, 64]: 1. [1, 65536, 64]: 128 parts of 512 tokens.
constexpr int64_t greedy_parts(int64_t tokens, int64_t channels) {
  if (tokens * channels <= kGreedyItem) return 1;
  const int64_t parts = divide_up(tokens * channels, kGreedyPart);
  const int64_t most = tokens < kMaxGreedyParts ? tokens : kMaxGreedyParts;
  return parts < most ? parts : most;
}
// A group of lanes a token. Example: [16, 1024, 64]: 256 blocks.
constexpr LaunchPlan plan_greedy_tokens(int64_t tokens) {
  const int64_t blocks = divide_up(tokens, kGreedyGroups);
  return {{capped(blocks), 1, 1}, kGreedyThreads, 0};
}
// A block a token that is compared with all others, or a part of an item.
constexpr LaunchPlan plan_greedy_blocks(int64_t blocks) {
  return {{capped(blocks), 1, 1}, kGreedyThreads, kGreedySharedBytes};
}

// Three f32 and an i32 of every token, and the best of every part at two steps.
constexpr int64_t greedy_scratch_bytes(int64_t batch, int64_t tokens, int64_t channels) {
  return 16 * batch * tokens + 16 * batch * greedy_parts(tokens, channels);
}

// dpc_knn: blocks of 64 rows against all tokens, with room for a tile of their distances.
inline constexpr int kPlaceThreads = 256;
constexpr int64_t distance_shared_bytes(bool is_float, bool async) {
  return similarity_shared_bytes(kNarrowTiles, is_float, async) +
         int64_t{4} * kNarrowTiles.rows() * (kSimilarityColumns + 1);
}
// Example: [32, 729, C]: 384 blocks of four warps.
constexpr LaunchPlan plan_distance_rows(int64_t batch, int64_t tokens, bool is_float, bool async) {
  const int64_t blocks = batch * divide_up(tokens, kNarrowTiles.rows());
  return {{capped(blocks), 1, 1},
          kNarrowTiles.threads(),
          distance_shared_bytes(is_float, async),
          "dpc_knn"};
}
// A thread an entry.
constexpr LaunchPlan plan_places(int64_t entries) {
  const int64_t blocks = divide_up(entries, kPlaceThreads);
  return {{capped(blocks), 1, 1}, kPlaceThreads, 0};
}

}  // namespace tokred::cuda
