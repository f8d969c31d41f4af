// Tiles and launch plans of the score kernels. What a plan chooses never changes a result.
#pragma once

#include "attention/cuda/plan.h"
#include "attention/cuda/plan_scores.h"
#include "common/cuda/similarity_plan.h"

namespace tokred::cuda {

inline constexpr int kPoolWide = 8;             // warps that share a long block of tokens
inline constexpr int64_t kPoolLong = 256;       // tokens from which a block is long
inline constexpr int64_t kBlockScoreRows = 64;  // query rows that a block of threads scores
inline constexpr int64_t kRowTileKeys = 512;    // keys that a block of attention_rows scores

// A warp for each row. Example: B = 64, N = 577: 64 * 577 / 8 = 4616 blocks.
constexpr LaunchPlan plan_transition(int64_t rows) {
  return {{divide_up(rows, kScoreThreads / 32), 1, 1}, kScoreThreads, 0};
}

// The warps that share a block of tokens, given its mean length.
constexpr int pool_warps(int64_t tokens, int64_t blocks) {
  return tokens >= kPoolLong * blocks ? kPoolWide : 1;
}
// Eight warps, each or all with a pooled block. Example: B = 8, H = 8, N = 32768 in blocks of 64:
// 8 * 8 * 512 / 8 = 4096 blocks of 256 threads; as one block (M = 1), 64 of them.
constexpr LaunchPlan plan_block_pool(int64_t batch, int64_t heads, int64_t tokens, int64_t blocks) {
  const int warps = pool_warps(tokens, blocks);
  return {{divide_up(batch * heads * blocks * warps, kPoolWide), 1, 1},
          kScoreThreads,
          warps == 1 ? 0 : 2 * 4 * 256 * kPoolWide + 4 * kPoolWide};
}

// A block of threads for kBlockScoreRows query rows of a key head and one step of pooled blocks.
// Example: B = 1, Hq = 32, Hkv = 8, L = M = 512, D = 128: 8 * 32 * 8 = 2048 blocks.
constexpr LaunchPlan plan_block_score(int64_t heads, int64_t rows, int64_t blocks, int lanes) {
  return {{heads * divide_up(rows, kBlockScoreRows) * divide_up(blocks, score_step(lanes)), 1, 1},
          kScoreThreads,
          0};
}

// attention_rows and attention_columns: one side owned, the other streamed.
// They fit 99 KB.
constexpr AttentionTiles score_tiles(int dim, bool is_float) {
  if (is_float) return {dim <= 128 ? 4 : 2, 1, dim <= 128 ? 32 : 16, 1, 3};
  return {4, dim <= 64 ? 2 : 1, dim <= 128 ? 64 : 32, 2, 1};
}

// The tiles, and what is known of each of their rows: 16 and 4 bytes, or 4 and 24.
constexpr int64_t score_tiles_bytes(int dim, bool is_float, int owned, int streamed) {
  const AttentionTiles t = score_tiles(dim, is_float);
  return tile_bytes(dim, t.rows(), t.planes) + owned * t.rows() +
         t.stages * (tile_bytes(dim, t.columns, t.planes) + streamed * t.columns);
}
constexpr int64_t attention_rows_shared_bytes(int dim, bool is_float) {
  return score_tiles_bytes(dim, is_float, 16, 4);
}
constexpr int64_t attention_columns_shared_bytes(int dim, bool is_float) {
  return score_tiles_bytes(dim, is_float, 4, 24);
}

// The shapes that the plans of attention_rows and attention_columns depend on.
struct ScoreShape {
  int64_t batch, heads_q, heads_kv, queries, keys, head_dim;
  bool is_float;

  constexpr int64_t rows() const { return queries * (heads_q / heads_kv); }  // of a key head
};

// A block for tiles.rows() query rows of a key head and a chunk of keys. Example: Hq = 32, Hkv = 8,
// L = 32, N = 32768, D = 128 in bf16: 128 rows a key head, 8 * 2 * 64 = 1024 blocks of 128 threads.
constexpr LaunchPlan plan_attention_rows(const ScoreShape& s) {
  const int dim = padded_head_dim(s.head_dim);
  const AttentionTiles t = score_tiles(dim, s.is_float);
  const int64_t tiles = divide_up(s.rows(), t.rows()) * divide_up(s.keys, kRowTileKeys);
  return {{s.batch * s.heads_kv * tiles, 1, 1},
          t.threads(),
          attention_rows_shared_bytes(dim, s.is_float),
          "attention_rows"};
}

// A block for tiles.rows() keys of a query head. Example: B = 8, H = 6, N = 1370, D = 64 in bf16:
// 48 * 11 = 528 blocks.
constexpr LaunchPlan plan_attention_columns(const ScoreShape& s) {
  const int dim = padded_head_dim(s.head_dim);
  const AttentionTiles t = score_tiles(dim, s.is_float);
  return {{s.batch * s.heads_q * divide_up(s.keys, t.rows()), 1, 1},
          t.threads(),
          attention_columns_shared_bytes(dim, s.is_float),
          "attention_columns"};
}

// A block for 64 rows of a. Example: B = 8, Na = 1370: 8 * 22 = 176 blocks of 128 threads.
constexpr LaunchPlan plan_similarity_stats(int64_t batch, int64_t rows, bool is_float, bool async) {
  return {{batch * divide_up(rows, kNarrowTiles.rows()), 1, 1},
          kNarrowTiles.threads(),
          similarity_shared_bytes(kNarrowTiles, is_float, async),
          "similarity_stats"};
}

}  // namespace tokred::cuda
