// Launch plans of unmerged_attention.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kUnmergedThreads = 128;
inline constexpr int kUnmergedRows = 32;      // queries of a block
inline constexpr int kMemberThreads = 256;

// Dimensions of q, k and v in registers and shared memory, and keys of a tile: what fits 99 KB.
constexpr int unmerged_dim(int64_t head_dim, int64_t value_dim) {
  const int64_t widest = head_dim > value_dim ? head_dim : value_dim;
  return widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
}
constexpr int unmerged_keys(int dim) { return dim <= 128 ? 32 : 16; }

// Queries and keys [rows][dim + 1], values [rows][dim], weights [32][keys + 1], tokens of both.
constexpr int64_t unmerged_shared_bytes(int dim) {
  const int keys = unmerged_keys(dim);
  return int64_t{4} * ((kUnmergedRows + keys) * (dim + 1) + keys * dim +
                       kUnmergedRows * (keys + 1) + kUnmergedRows + keys);
}

// A block for 32 queries of a head. Example: B = 1, 28 heads, L = 729, D = 128: 28 * 23 = 644
// blocks of 128 threads and 55 KB.
constexpr LaunchPlan plan_unmerged_attention(int64_t heads, int64_t queries, int dim) {
  return {{heads * divide_up(queries, kUnmergedRows), 1, 1},
          kUnmergedThreads,
          unmerged_shared_bytes(dim),
          "unmerged_attention"};
}

// A block lists the queries of every token of an item, a warp takes the mean of one.
constexpr LaunchPlan plan_list_queries(int64_t batch) { return {{batch, 1, 1}, kMemberThreads, 0}; }
constexpr LaunchPlan plan_mean_of_queries(int64_t rows) {
  return {{divide_up(rows, kMemberThreads / 32), 1, 1}, kMemberThreads, 0};
}

}  // namespace tokred::cuda
