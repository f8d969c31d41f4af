// Tiles and launch plans of the match ops.
#pragma once

#include "common/cuda/similarity_plan.h"

namespace tokred::cuda {

inline constexpr int64_t kSmallItem = 1024;  // tokens up to which one block maps a whole item
inline constexpr int kMapThreads = 512;
inline constexpr int64_t kSortChunk = 8192;  // keys sorted in shared memory at a time

inline constexpr SimilarityTiles kWideTiles{4, 2};  // 128 rows: half the reads of b

// Where a block has a whole item, and passes over b once for so many of its rows.
inline constexpr SimilarityTiles kItemTiles{8, 1};  // 128 rows
inline constexpr SimilarityTiles kWideItemTiles{12, 2};  // 384 rows

// Sizes that the plans depend on.
struct MatchShape {
  int64_t batch, rows;  // of a
  bool is_float;  // fp32, else 16-bit
  bool aligned;  // all rows start at multiples of 16 bytes
  bool general;  // weights, a band or k > 1

  constexpr bool async() const { return aligned && !is_float; }  // rows are copied asynchronously
};

// Of a small item's map: 20 bytes a token, and a partial sum for each of up to 32 warps.
inline constexpr int64_t kSmallMapBytes = 20 * kSmallItem + 4 * 32;
inline constexpr int64_t kLargeMapBytes = 8 * kSortChunk + 4 * 32;

// The wide tiles pay once they fill a large device twice: B = 64, 577 tokens (289 sources) make 192
// wide blocks, too few, and 320 narrow ones; B = 8, 16384 tokens (8192) make 512 wide ones. The
// choice never changes a result.
constexpr SimilarityTiles match_tiles(const MatchShape& s) {
  const bool many = s.batch * divide_up(s.rows, kWideTiles.rows()) >= 264;
  return s.async() && !s.general && many ? kWideTiles : kNarrowTiles;
}
constexpr LaunchPlan plan_match(const MatchShape& s) {
  const SimilarityTiles tiles = match_tiles(s);
  const int64_t blocks = s.batch * divide_up(s.rows, tiles.rows());
  return {{capped(blocks), 1, 1},
          tiles.threads(),
          similarity_shared_bytes(tiles, s.is_float, s.async()),
          "match"};
}

// Rows of up to 64 channels: terms of the tiles of columns, in the workspace, then the matches.
struct ColumnTerms {
  float scale[kSimilarityColumns], add[kSimilarityColumns];
};
inline constexpr int kShortStages = 3;  // tiles of b in shared memory
inline constexpr int kTermThreads = 128;
constexpr int64_t column_tiles(int64_t columns) { return divide_up(columns, kSimilarityColumns); }

constexpr LaunchPlan plan_column_terms(int64_t batch, int64_t columns) {
  return {{capped(batch * column_tiles(columns)), 1, 1},
          kTermThreads,
          tile_bytes(kSimilarityChannels, kSimilarityColumns, 1) + 16 * kSimilarityColumns};
}
constexpr LaunchPlan plan_match_short(const MatchShape& s) {
  const SimilarityTiles tiles = match_tiles(s);
  const int rows = tiles.rows() + kShortStages * kSimilarityColumns;
  return {{capped(s.batch * divide_up(s.rows, tiles.rows())), 1, 1},
          tiles.threads(),
          tile_bytes(kSimilarityChannels, rows, 1) + 16 * tiles.rows() +
              kShortStages * static_cast<int64_t>(sizeof(ColumnTerms)),
          "match"};
}

constexpr int64_t small_item_bytes(const MatchShape& s, SimilarityTiles tiles) {
  return similarity_shared_bytes(tiles, s.is_float, s.async()) + kSmallMapBytes;
}
constexpr SimilarityTiles item_tiles(const MatchShape& s, int64_t shared_limit) {
  const bool wide = s.async() && s.rows > kItemTiles.rows() &&
                    small_item_bytes(s, kWideItemTiles) <= shared_limit;
  return wide ? kWideItemTiles : kItemTiles;
}
// Example: B = 64, 577 tokens in bf16: 64 blocks of 384 threads, each passing once over its item.
constexpr LaunchPlan plan_small_items(const MatchShape& s, int64_t shared_limit) {
  const SimilarityTiles tiles = item_tiles(s, shared_limit);
  return {{capped(s.batch), 1, 1},
          tiles.threads(),
          small_item_bytes(s, tiles),
          "bipartite_soft_matching"};
}
// Whether similarity and map of an item fit one block and its shared memory. In f32 they do not fit
// 99 KB, and take two launches.
constexpr bool is_small_item(const MatchShape& s, int64_t tokens, int64_t shared_limit) {
  return tokens <= kSmallItem && s.rows <= kSmallItem &&
         plan_small_items(s, shared_limit).shared_bytes <= shared_limit;
}
constexpr LaunchPlan plan_large_items(int64_t batch) {
  return {{capped(batch), 1, 1}, kMapThreads, kLargeMapBytes, "bipartite_soft_matching"};
}

constexpr int64_t sort_length(int64_t count) {
  int64_t length = 2;
  while (length < count) length *= 2;
  return length;
}

// Scratch of a large item's map in global memory: sort keys u64, ranks i32 [sources], and two i32
// tables [tokens]. 16384 tokens in default sets: 8192 * 12 + 16384 * 8 = 224 KiB.
constexpr int64_t map_scratch_bytes(int64_t tokens, int64_t sources) {
  return 8 * sort_length(sources) + round_up(4 * (sources + 2 * tokens), 16);
}

// A block solves an assignment problem of n <= m lines: five tables of its m columns (two f64, two
// i32) and of its n rows (three i32), in shared memory where they fit.
inline constexpr int kAssignmentThreads = 256;
inline constexpr int64_t kAssignmentScratch = 1024;  // of reductions over the block
inline constexpr int64_t kMaxAssignmentShared = 96 << 10;  // two blocks an H200's multiprocessor
constexpr int64_t assignment_state_bytes(int64_t n, int64_t m) {
  return round_up(24 * m + 12 * n, 16);
}
constexpr bool assignment_in_shared(int64_t n, int64_t m) {
  return kAssignmentScratch + assignment_state_bytes(n, m) <= kMaxAssignmentShared;
}
// Example: B = 64, 256 x 256: 64 blocks of 256 threads with 1 + 9 KiB each.
constexpr LaunchPlan plan_assignment(int64_t batch, int64_t n, int64_t m) {
  const int64_t state = assignment_in_shared(n, m) ? assignment_state_bytes(n, m) : 0;
  return {
      {capped(batch), 1, 1}, kAssignmentThreads, kAssignmentScratch + state, "linear_assignment"};
}

// sinkhorn: costs by tiles of 64 sources; a block an item for the steps; tiles of 32 anchors by 64
// channels for the aggregation, over 32 sources at a time.
inline constexpr int kSinkhornThreads = 256;
inline constexpr int64_t kSinkhornShared = 4 * (32 + 32 + 2 * kSinkhornThreads);
inline constexpr int kAggregationSources = 32, kAggregationAnchors = 32, kAggregationChannels = 64;
inline constexpr int64_t kAggregationShared =
    4 * kAggregationSources * (kAggregationAnchors + kAggregationChannels);

constexpr LaunchPlan plan_sinkhorn_costs(int64_t batch, int64_t sources, bool is_float,
                                         bool is_async) {
  const int64_t blocks = batch * divide_up(sources, kNarrowTiles.rows());
  return {{capped(blocks), 1, 1},
          kNarrowTiles.threads(),
          similarity_shared_bytes(kNarrowTiles, is_float, is_async),
          "sinkhorn"};
}
constexpr LaunchPlan plan_sinkhorn(int64_t batch) {
  return {{capped(batch), 1, 1}, kSinkhornThreads, kSinkhornShared};
}
// Example: B = 32, 126 anchors, C = 1152: 32 * 4 * 18 = 2304 blocks of 12 KiB.
constexpr LaunchPlan plan_sinkhorn_aggregation(int64_t batch, int64_t anchors, int64_t channels) {
  const int64_t blocks =
      batch * divide_up(anchors, kAggregationAnchors) * divide_up(channels, kAggregationChannels);
  return {{capped(blocks), 1, 1}, kSinkhornThreads, kAggregationShared};
}

// sinkhorn_backward: the same block an item for the steps; a warp a row for the norms; tiles of 64
// sources by 32 anchors, over 32 channels at a time; and of 32 rows by 64 channels for gradients.
inline constexpr int kWeightSources = 64, kWeightAnchors = 32, kWeightChannels = 32;
constexpr LaunchPlan plan_sinkhorn_norms(int64_t rows) {
  const int64_t blocks = divide_up(rows, kSinkhornThreads / 32);
  return {{capped(blocks), 1, 1}, kSinkhornThreads, 0};
}
// Example: B = 32, M = 603, N = 126: 32 * 10 * 4 = 1280 blocks of 13 KiB.
constexpr LaunchPlan plan_sinkhorn_weights(int64_t batch, int64_t sources, int64_t anchors) {
  const int64_t blocks =
      batch * divide_up(sources, kWeightSources) * divide_up(anchors, kWeightAnchors);
  return {{capped(blocks), 1, 1},
          kSinkhornThreads,
          int64_t{4} * kWeightChannels * (kWeightSources + 4 + kWeightAnchors + 1)};
}
// Example: B = 32, M = 603, C = 1152: 32 * 19 * 18 = 10944 blocks of 24 KiB.
constexpr LaunchPlan plan_sinkhorn_gradient(int64_t batch, int64_t rows, int64_t channels,
                                            bool of_sources) {
  const int64_t blocks =
      batch * divide_up(rows, kAggregationAnchors) * divide_up(channels, kAggregationChannels);
  return {{capped(blocks), 1, 1},
          kSinkhornThreads,
          (of_sources ? 2 : 1) * (kAggregationShared + 4 * kAggregationSources)};
}

}  // namespace tokred::cuda
