// Tiles and launch plans of the topk ops.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kTopkBins = 2048;  // of a histogram, one digit of 11 bits

// A warp has a short segment in registers; a block has eight warps.
inline constexpr int kTopkWarps = 8;
inline constexpr int kTopkWarpChosen = 256;
inline constexpr int kTopkWarpBins = 256 + 4;  // of its histogram, the last for what lies outside
inline constexpr int64_t kTopkWarpColumns = 33 * 32;

// A block that selects from a segment: `keys` that may be chosen, of which it sorts up to `chosen`.
struct TopkTiles {
  int threads, keys, chosen;

  // Room for them, a histogram, and partial results.
  constexpr int64_t shared_bytes() const {
    return 8 * (int64_t{keys} + chosen) + 4 * kTopkBins + (8 + 4) * 32 + 16;
  }
  friend constexpr bool operator==(const TopkTiles&, const TopkTiles&) = default;
};
inline constexpr TopkTiles kSmallTopk{256, 2048, 512};  // 28 KB
inline constexpr TopkTiles kWideTopk{512, 7168, 4096};  // 96 KB: two an SM of 227
inline constexpr int64_t kSmallTopkColumns = 1 << 16;

// Segments split among blocks, where they are too few to fill a device: at least so many columns a
// block, so many keys that it may hand on, and blocks in all.
inline constexpr int64_t kSplitColumns = 8192;
inline constexpr int64_t kSplitKeys = 4096;
inline constexpr int64_t kSplitBlocks = 264;
inline constexpr int64_t kMaxSplitSegments = 128;

// Segments sorted whole: chunks sorted by a block each, then merged, so many keys a block.
inline constexpr int kSortThreads = 512;
inline constexpr int kSortItems = 8;
inline constexpr int64_t kSortChunkKeys = int64_t{kSortThreads} * kSortItems;
inline constexpr int kMergeSortThreads = 256;
inline constexpr int kMergeSortItems = 8;
inline constexpr int64_t kMergeSortKeys = int64_t{kMergeSortThreads} * kMergeSortItems;
inline constexpr int kSortedThreads = 512;

// Sizes that the plans depend on. The path never changes a result.
struct TopkShape {
  int64_t segments, columns,
      k;  // of all rows, of a segment, entries chosen of it
  bool has_top_p;

  constexpr int64_t max_chosen() const { return k < columns ? k : columns; }
};

enum class TopkPath { warp, small, wide, split, sorted };

constexpr TopkPath topk_path(const TopkShape& s) {
  if (s.columns <= kTopkWarpColumns && s.max_chosen() <= kTopkWarpChosen && !s.has_top_p) {
    return TopkPath::warp;
  }
  if (s.max_chosen() > kWideTopk.chosen) return TopkPath::sorted;
  if (s.segments <= kMaxSplitSegments && s.columns >= 2 * kSplitColumns) return TopkPath::split;
  return s.max_chosen() <= kSmallTopk.chosen && s.columns <= kSmallTopkColumns ? TopkPath::small
                                                                               : TopkPath::wide;
}

constexpr int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// Example: [18432, 289]: 2304 blocks of eight warps.
constexpr LaunchPlan plan_topk_warps(int64_t segments) {
  return {{capped(divide_up(segments, kTopkWarps)), 1, 1},
          32 * kTopkWarps,
          kTopkWarps * (8 * kTopkWarpChosen + 4 * kTopkWarpBins)};
}
// Example: [256, 131072], k = 2048: 256 blocks of 512 threads, two an SM, all at once.
constexpr LaunchPlan plan_topk_blocks(int64_t segments, const TopkTiles& tiles) {
  return {{capped(segments), 1, 1}, tiles.threads, tiles.shared_bytes(), "topk"};
}

// Example: [8, 131072]: 16 parts of 8192 columns, 128 blocks. [1, 1048576]: 128 blocks as well.
constexpr int64_t topk_parts(const TopkShape& s) {
  const int64_t wanted = at_most(divide_up(kSplitBlocks, s.segments), kWideTopk.threads);
  return at_most(wanted, s.columns / kSplitColumns);
}
constexpr int64_t topk_part_columns(const TopkShape& s) {
  return divide_up(s.columns, topk_parts(s));
}
constexpr LaunchPlan plan_topk_parts(const TopkShape& s) {
  return {{s.segments * topk_parts(s), 1, 1}, kWideTopk.threads, kWideTopk.shared_bytes(), "topk"};
}

// Example: [4, 131072], k = 16384: 4 * 32 blocks sort 4096 keys each; then five times 4 * 64 or
// fewer merge, as runs of more than k are cut.
constexpr LaunchPlan plan_sort_chunks(int64_t segments, int64_t columns) {
  return {{capped(segments * divide_up(columns, kSortChunkKeys)), 1, 1},
          kSortThreads,
          16 * kSortChunkKeys,
          "the sort of chunks"};
}
// Blocks for a pair of runs of `run` keys, of which the first `wanted` are kept.
constexpr int64_t merge_sort_tiles(int64_t run, int64_t wanted) {
  return divide_up(at_most(2 * run, wanted), kMergeSortKeys);
}
constexpr LaunchPlan plan_merge_runs(int64_t segments, int64_t columns, int64_t run,
                                     int64_t wanted) {
  const int64_t pairs = divide_up(columns, 2 * run);
  return {{capped(segments * pairs * merge_sort_tiles(run, wanted)), 1, 1}, kMergeSortThreads, 0};
}
constexpr LaunchPlan plan_sorted(int64_t segments) {
  return {{capped(segments), 1, 1}, kSortedThreads, (8 + 4) * 32};
}

// Scratch in bytes. Split: the keys handed on, how many, and the guess they were found with.
// [8, 131072]: 4 MB. Sorted: all keys, twice.
constexpr int64_t topk_split_bytes(const TopkShape& s) {
  const int64_t parts = s.segments * topk_parts(s);
  return 8 * (parts * kSplitKeys + s.segments) + round_up(4 * parts, 16);
}
constexpr int64_t sort_bytes(int64_t segments, int64_t columns) { return 16 * segments * columns; }

// compact: a block packs a part of a row after counting the parts before, so parts are as long as
// there are blocks for the device. Example: [1, 1048576]: 32 blocks of 32768 columns.
inline constexpr int kCompactThreads = 512;
inline constexpr int kCompactWidth = 16;  // neighbours of a thread
inline constexpr int64_t kCompactTile = int64_t{kCompactThreads} * kCompactWidth;

constexpr int64_t compact_parts(int64_t rows, int64_t columns) {
  const int64_t tiles = divide_up(columns, kCompactTile);
  int64_t parts = 1;
  while (parts < 32 && 2 * parts * rows <= 256 && 2 * parts <= tiles) parts *= 2;
  return parts;
}
constexpr LaunchPlan plan_compact(int64_t rows, int64_t columns) {
  return {{capped(rows * compact_parts(rows, columns)), 1, 1}, kCompactThreads, 4 * 32};
}

// gather_tokens: lanes enough for a row, 2 to 32, share its copy; grid row i has item i. Example:
// keys and values [1, 8, 131072, 128] in bf16, K = 2048: 16 lanes a row, 16384 rows: 2 * 1024
// blocks.
inline constexpr int kGatherThreads = 256;

constexpr int gather_lanes(int64_t units) {
  int lanes = 2;
  while (lanes < 32 && lanes < units) lanes *= 2;
  return lanes;
}
constexpr int64_t gather_blocks(int64_t rows, int64_t units) {
  return capped(divide_up(rows, kGatherThreads / gather_lanes(units)));
}
constexpr LaunchPlan plan_gather(int64_t blocks, int64_t items) {
  return {{blocks, items, 1}, kGatherThreads, 0};
}

// eviction_slot and replace_token: a block a head. Example: [8, 8] heads: 64 blocks.
inline constexpr int kEvictionThreads = 512;
inline constexpr int kReplaceThreads = 64;

constexpr LaunchPlan plan_eviction_slot(int64_t rows) {
  return {{capped(rows), 1, 1}, kEvictionThreads, 8 * 32};
}
constexpr LaunchPlan plan_replace_token(int64_t rows) {
  return {{capped(rows), 1, 1}, kReplaceThreads, 0};
}

// inverse_transform_sample: after the sort, a block a row.
inline constexpr int kSampleThreads = 256;

constexpr LaunchPlan plan_sample(int64_t rows) {
  return {{capped(rows), 1, 1}, kSampleThreads, (8 + 4) * 32};
}

}  // namespace tokred::cuda
