// Launch plans of linear_attention.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kLinearThreads = 128;
inline constexpr int kLinearValues = 32;      // value dimensions of a block
inline constexpr int kLinearStepThreads = 256;
inline constexpr int kLinearStepQueries = 4;  // of a group, in one pass over the state

// Rows of a chunk: as many as two tiles of [rows][D] and a state of [D][32] leave room for on
// devices of 99 KB.
constexpr int linear_rows(int64_t head_dim) { return head_dim <= 128 ? 32 : 16; }

// Tiles of rows are one longer than they are wide, so that columns lie in different banks.
constexpr int64_t linear_pitch(int64_t head_dim) { return head_dim + 1; }

// Queries, keys, state, values, weights of pairs, w(n), the clock.
constexpr int64_t linear_shared_bytes(int64_t head_dim) {
  const int64_t rows = linear_rows(head_dim);
  return 4 * (2 * rows * linear_pitch(head_dim) + head_dim * kLinearValues + rows * kLinearValues +
              rows * (rows + 1) + (rows + 1) + (rows + 1));
}

constexpr int64_t linear_blocks(int64_t heads, int64_t value_dim) {
  return capped(heads * divide_up(value_dim, kLinearValues));
}

// A block takes 32 value dimensions of a head through all chunks. Example: B = 1, 32 heads, D =
// Dv = 128: 32 * 4 = 128 blocks of 128 threads and 57 KB.
constexpr LaunchPlan plan_linear_attention(int64_t heads, int64_t head_dim, int64_t value_dim) {
  return {{linear_blocks(heads, value_dim), 1, 1},
          kLinearThreads,
          linear_shared_bytes(head_dim),
          "linear_attention"};
}

// One row: 32 value dimensions by eight warps. Example: B = 4, 32 heads, Dv = 128: 512 blocks.
constexpr LaunchPlan plan_linear_step(int64_t heads, int64_t value_dim) {
  return {{linear_blocks(heads, value_dim), 1, 1},
          kLinearStepThreads,
          int64_t{4} * kLinearStepThreads * kLinearStepQueries};
}

}  // namespace tokred::cuda
