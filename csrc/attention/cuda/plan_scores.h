// Launch plans of scores of queries and keys, and of the reduction of heads. The choice of a plan
// never changes a result.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kScoreThreads = 256;
inline constexpr int kScoreRows = 4;  // rows of either side in a tile of products
inline constexpr int kSoftmaxThreads = 512;

// The lanes that share a row of up to 256 elements, eight neighbours each.
constexpr int score_lanes(int64_t dim) { return dim <= 64 ? 8 : dim <= 128 ? 16 : 32; }

// The rows that a block of threads has in registers at once.
constexpr int64_t score_step(int lanes) { return int64_t{kScoreThreads} / lanes * kScoreRows; }

// Lanes that share a list of dimensions instead of a row.
inline constexpr int kGatherLanes = 16;

// A block of threads for a chunk of the keys of one key head (of all of them for head_mean): short
// chunks where there are few. Example: B = 1, Hkv = 8, N = 32768, D = 128: steps of 64 keys, and
// 8 * 128 = 1024 blocks of 256 keys; N = 4096: 8 * 64 = 512 blocks of 64.
constexpr int64_t qk_score_chunk(int64_t heads, int64_t keys, int lanes) {
  const int64_t step = score_step(lanes), longest = 4 * step;
  return heads * divide_up(keys, longest) >= 528 ? longest : step;
}
constexpr LaunchPlan plan_qk_score(int64_t heads, int64_t keys, int lanes) {
  return {{heads * divide_up(keys, qk_score_chunk(heads, keys, lanes)), 1, 1}, kScoreThreads, 0};
}

// A thread for each of `count` numbers.
constexpr LaunchPlan plan_score_elements(int64_t count) {
  return {{divide_up(count, kScoreThreads), 1, 1}, kScoreThreads, 0};
}

// A block for each row of a softmax, and one partial result a warp.
constexpr LaunchPlan plan_softmax_rows(int64_t rows) {
  return {{capped(rows), 1, 1}, kSoftmaxThreads, 4 * 32};
}

}  // namespace tokred::cuda
