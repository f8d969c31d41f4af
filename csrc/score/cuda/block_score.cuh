// block_score: tiles of query rows and pooled blocks in the registers of a part of a warp, as in
// qk_score. Rows are the queries of all heads of a group, in turns, so that they share the blocks.
#pragma once

#include "attention/cuda/head_scores.cuh"
#include "score/cuda/plan.h"
#include "score/params.h"

namespace tokred::cuda::scoring {

// One rule's tile: kRows query rows, as far as registers allow, by kScoreRows blocks.
template <BlockRule kBlockRule>
struct BlockTile {
  static constexpr BlockRule kRule = kBlockRule;
  static constexpr int kStatistics = kRule == BlockRule::dot ? 1 : 2;
  static constexpr int kRows = kRule == BlockRule::dot      ? kScoreRows
                               : kRule == BlockRule::bounds ? 2
                                                            : 1;
  static constexpr int kTerms = kRule == BlockRule::deviation ? 2 : 1;  // sums a score
  static constexpr int kSums = kTerms * kRows * kScoreRows;
  float block[kStatistics][kScoreRows][8];
  float sum[kSums];  // number (term * kRows + row) * kScoreRows + block

  __device__ __forceinline__ void add(int row, const float (&q)[kTerms][8]) {
#pragma unroll
    for (int i = 0; i < kScoreRows; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float x = block[0][i][c];
        float& first = sum[row * kScoreRows + i];
        if constexpr (kRule == BlockRule::dot) {
          first = fmaf(q[0][c], x, first);
        } else if constexpr (kRule == BlockRule::bounds) {
          first += max_or_nan(q[0][c] * x, q[0][c] * block[1][i][c]);
        } else {
          float& second = sum[(kRows + row) * kScoreRows + i];
          first = fmaf(q[1][c], x, first);
          second = fmaf(q[0][c], block[1][i][c], second);
        }
      }
    }
  }
};

template <BlockRule kRule, int kLanes>
struct BlockScorer {
  using Tile = BlockTile<kRule>;
  static constexpr int kSums = Tile::kSums;
  static constexpr int kResults = kSums > kLanes ? kSums / kLanes : 1;
  const BlockScoreParams& p;
  float* out;  // f32 [B, Hq, L, M]
  const int64_t batch, head;
  const uint32_t group, rows;  // row r is query r / group of the r % group-th head; rows < 2^32
  const int lane, dim;
  const bool q_aligned, pooled_aligned;

  __device__ BlockScorer(const BlockScoreParams& p, float* out, int64_t item)
      : p(p), out(out), batch(item / p.heads_kv), head(item % p.heads_kv),
        group(static_cast<uint32_t>(p.heads_q / p.heads_kv)),
        rows(static_cast<uint32_t>(p.queries * group)), lane(lane_id() % kLanes),
        dim(static_cast<int>(p.head_dim)),
        q_aligned(is_aligned(p.q, p.dtype) && (Tile::kTerms == 1 || dim % 8 == 0)),
        pooled_aligned(is_aligned(p.pooled, p.pooled_dtype) &&
                       (Tile::kStatistics == 1 || dim % 8 == 0)) {}

  __device__ __forceinline__ bool exists(int64_t block) const {
    return block < p.blocks && (!p.counts || p.counts[batch * p.counts_stride_batch + block] > 0);
  }

  __device__ __forceinline__ void load_blocks(Tile& tile, int64_t first) const {
#pragma unroll
    for (int s = 0; s < Tile::kStatistics; ++s) {
      int64_t offset[kScoreRows];
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
        offset[i] = exists(first + i)
                        ? batch * p.pooled.stride_batch + head * p.pooled.stride_head +
                              (first + i) * p.pooled.stride_token + s * dim
                        : -1;
      }
      load_rows(tile.block[s], p.pooled.data, p.pooled_dtype, offset, 8 * lane, dim,
                pooled_aligned);
    }
  }

  // This lane's part of the sums of the rows `first` on.
  __device__ __forceinline__ void multiply(Tile& tile, uint32_t first) const {
#pragma unroll
    for (float& x : tile.sum) x = 0.0f;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const uint32_t row = min(first + r, rows - 1);
      int64_t offset[Tile::kTerms];
#pragma unroll
      for (int term = 0; term < Tile::kTerms; ++term) {
        offset[term] = batch * p.q.stride_batch + (head * group + row % group) * p.q.stride_head +
                       row / group * p.q.stride_token + term * dim;
      }
      float q[Tile::kTerms][8];
      load_rows(q, p.q.data, p.dtype, offset, 8 * lane, dim, q_aligned);
      tile.add(r, q);
    }
  }

  __device__ __forceinline__ void store(Tile& tile, uint32_t first_row, int64_t first_block,
                                        unsigned visible) const {
    sum_and_share<kLanes, kSums>(tile.sum);
    if constexpr (Tile::kTerms == 2) {
      // The second terms lie in the upper half of the lanes.
#pragma unroll
      for (int j = 0; j < kResults; ++j) {
        const float x = fabsf(tile.sum[j]);
        tile.sum[j] = x + __shfl_xor_sync(kAllLanes, x, kLanes / 2);
      }
    }
    if (kLanes > kSums && lane % (kLanes / kSums) != 0) return;
#pragma unroll
    for (int j = 0; j < kResults; ++j) {
      const int number = lane * kSums / kLanes + j, i = number % kScoreRows;
      const uint32_t row = first_row + number / kScoreRows;
      const int64_t block = first_block + i;
      if (number >= Tile::kRows * kScoreRows || row >= rows || block >= p.blocks) {
        continue;
      }
      const int64_t flat =
          (batch * p.heads_q + head * group + row % group) * p.queries + row / group;
      out[flat * p.blocks + block] = visible >> i & 1 ? tile.sum[j] * p.scale : -kInfinity;
    }
  }
};

template <BlockRule kRule, int kLanes>
__global__ void __launch_bounds__(kScoreThreads, 2)
    block_score_kernel(const __grid_constant__ BlockScoreParams p, float* out) {
  using Scorer = BlockScorer<kRule, kLanes>;
  constexpr int kStep = kScoreThreads / kLanes * kScoreRows;
  const int64_t rows = p.queries * (p.heads_q / p.heads_kv);
  const int64_t row_parts = (rows + kBlockScoreRows - 1) / kBlockScoreRows;
  const int64_t block_parts = (p.blocks + kStep - 1) / kStep;
  const Scorer scorer(p, out, blockIdx.x / row_parts / block_parts);
  const int64_t first_row = blockIdx.x % row_parts * kBlockScoreRows;
  const int64_t first_block = blockIdx.x / row_parts % block_parts * kStep +
                              static_cast<int>(threadIdx.x) / kLanes * kScoreRows;
  typename Scorer::Tile tile;
  scorer.load_blocks(tile, first_block);
  unsigned visible = 0;
#pragma unroll
  for (int i = 0; i < kScoreRows; ++i) visible |= scorer.exists(first_block + i) ? 1u << i : 0u;
  const int64_t last_row = min(first_row + kBlockScoreRows, rows);
  for (auto row = static_cast<uint32_t>(first_row); row < last_row; row += Scorer::Tile::kRows) {
    scorer.multiply(tile, row);
    scorer.store(tile, row, first_block, visible);
  }
}

}  // namespace tokred::cuda::scoring
