// Launch plans of the merge ops.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeSlots = 16;           // slots of a block: two for each of its warps
inline constexpr int64_t kFusedTokens = 1024;    // up to here every block lists its own members
inline constexpr int kItemThreads = 512;         // of a block that walks along one item
inline constexpr int kScanThreads = 512;         // 16 warps, each with 32 tokens of 32 channels
inline constexpr int kListThreads = 512;
inline constexpr int kListSlots = 1024;          // slots of a block that only lists members

// Whether each merging block finds its members itself. It reads the whole map, so above
// kFusedTokens a kernel of its own lists the members of all slots once.
constexpr bool lists_members_in_block(int64_t tokens) { return tokens <= kFusedTokens; }

// A count for each warp and slot, and a partial sum for each of up to 32 warps.
constexpr int64_t member_counts_bytes(int threads, int slots) {
  return 4 * (int64_t{threads} / 32 * slots + 32);
}

// Example: B = 64, N = 577, M = 561, any C: 64 * 36 = 2304 blocks of 256 threads, one launch.
constexpr LaunchPlan plan_merge(int64_t batch, int64_t num_out) {
  return {{batch * divide_up(num_out, kMergeSlots), 1, 1},
          kMergeThreads,
          member_counts_bytes(kMergeThreads, kMergeSlots) + 4 * (kMergeSlots + 1 + kFusedTokens)};
}

// Example: B = 2, M = 3072: 2 * 3 = 6 blocks of 512 threads and 64 KB.
constexpr LaunchPlan plan_list_members(int64_t batch, int64_t num_out) {
  return {{batch * divide_up(num_out, kListSlots), 1, 1},
          kListThreads,
          member_counts_bytes(kListThreads, kListSlots),
          "merge"};
}

// A warp for each row. Example: B = 64, N = 577: 64 * 577 / 8 = 4616 blocks of 8 warps.
constexpr LaunchPlan plan_merge_rows(int64_t rows) {
  return {{divide_up(rows, kMergeThreads / 32), 1, 1}, kMergeThreads, 0};
}

// A thread for each entry. Example: B = 2, N = 577: 5 blocks.
constexpr LaunchPlan plan_compose(int64_t entries) {
  return {{divide_up(entries, kMergeThreads), 1, 1}, kMergeThreads, 0};
}

// A block for each item, with a partial result per warp. Example: B = 32: 32 blocks.
constexpr LaunchPlan plan_item_scan(int64_t batch) { return {{batch, 1, 1}, kItemThreads, 4 * 32}; }

// A block for 32 channels of an item. Example: B = 4, C = 768: 4 * 24 = 96 blocks of 16 warps.
constexpr LaunchPlan plan_ema_scan(int64_t batch, int64_t channels) {
  constexpr int64_t kWarps = kScanThreads / 32;
  return {{batch * divide_up(channels, 32), 1, 1}, kScanThreads, 4 * kWarps * (32 + 1)};
}

}  // namespace tokred::cuda
