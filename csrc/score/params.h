// Params of the scoring kernels. Every pointer carries its shape; scores are f32.
#pragma once

#include "attention/score_params.h"

namespace tokred {

// mean: over the visible tokens of a block; sqrt_mean: mean * sqrt(count); min_max; mean_deviation:
// the mean and the mean absolute deviation from it. All elementwise.
enum class BlockStatistic : int32_t { mean, sqrt_mean, min_max, mean_deviation };

constexpr int64_t statistic_count(BlockStatistic statistic) {
  return statistic == BlockStatistic::min_max || statistic == BlockStatistic::mean_deviation ? 2
                                                                                             : 1;
}

// Block m holds the tokens boundaries[b][m] .. boundaries[b][m + 1] - 1 (clamped to [0, N), empty
// where they do not ascend), or [m * block_size, (m + 1) * block_size) below N where boundaries are
// null; of them those below lengths[b] and with mask true are visible. A block without visible
// tokens has count 0 and statistics 0.
struct BlockPoolParams {
  HeadTensor x;                // [B, H, N, D]
  const int32_t* boundaries;   // i32 [B | 1, M + 1], the last dimension contiguous, or null
  const int32_t* lengths;      // i32 [B] or null
  const bool* mask;            // bool [B | 1, N] or null
  int64_t boundaries_stride_batch, lengths_stride, mask_stride_batch, mask_stride_token;
  int64_t batch, heads, tokens, head_dim, blocks, block_size;
  BlockStatistic statistic;
  DType dtype;                 // of x
  float* pooled;               // f32 [B, H, M, S, D]
  int32_t* counts;             // i32 [B, M]
};

// dot:       q . k
// bounds:    sum_d max(q_d min_d, q_d max_d), k holding (min, max): an upper bound of q . k
// deviation: |dq . k| + |q . dk|, q and k holding (mean, deviation): the spread of q . k
enum class BlockRule : int32_t { dot, bounds, deviation };

// out[b][h'][i][m] = reduced over the heads scale * rule(q_i, block m); -inf where counts[b][m] is
// not positive. softmax_vote normalises over the blocks.
struct BlockScoreParams {
  HeadTensor q;                // dtype [B, Hq, L, D], or f32 [B, Hq, L, 2, D] with deviation
  HeadTensor pooled;           // pooled_dtype [B, Hkv, M, S, D], (S, D) contiguous
  const int32_t* counts;       // i32 [B | 1, M], the last dimension contiguous, or null
  int64_t counts_stride_batch;
  int64_t batch, heads_q, heads_kv, queries, blocks, head_dim;
  DType dtype, pooled_dtype;
  BlockRule rule;
  HeadReduction reduction;
  float scale;
  float* out;                  // f32 [B, H', L, M]
  void* workspace;             // block_score_workspace(params) bytes
};

// logits as in AttentionParams (v, out and lse unused). out = the logits (-inf where hidden), or
// with softmax exp(logit - log sum exp of the visible keys in [first, last)), 0 where hidden or
// where none of those is visible. Keys outside the range get their quotient as well.
struct AttentionRowsParams {
  AttentionParams attention;
  bool softmax;
  int64_t first, last;         // 0 <= first <= last <= N
  float* rows;                 // f32 [B, Hq, L, N]
};

enum class ColumnReduction : int32_t { sum, mean, max, variance };

// With w(i) p(i, j), p = exp(logit(i, j) - lse[i]) (0 where hidden or where lse is -inf):
// out[b][h][j] = offset + factor * reduction over all L queries i; variance is unbiased (0 for
// L = 1), mean divides by L, and hidden pairs count as 0. Of no queries every reduction is 0.
struct AttentionColumnsParams {
  AttentionParams attention;   // v and out unused; lse holds f32 [B, Hq, L]
  const float* weight;         // f32 [B | 1, Hq | 1, L] or null: 1
  int64_t weight_stride_batch, weight_stride_head, weight_stride_query;
  ColumnReduction reduction;
  float factor, offset;
  float* columns;              // f32 [B, Hq, N]
};

// none: 0; elu: s >= margin ? s - margin : exp(s - margin) - 1;
// gaussian: exp(-((1 - s) / d)^2 / 2) / (d sqrt(2 pi)), d = 1 - margin.
enum class Energy : int32_t { none, elu, gaussian };

// Statistics of row i of the similarities s(i, j) (metrics as in match), over the j with mask_b, in
// i's block where block_size > 0 (j / block_size == i / block_size), and other than i with
// exclude_self. mean and variance (biased: the mean square distance from the mean), largest and
// its first index (-inf, -1 where there is none; NaN never wins), the number above `threshold`, and
// the mean of the energy. A masked row, and one without partners, has mean, variance, energy and
// count 0.
struct SimilarityStatsParams {
  const void* a;               // [B, Na, C]
  const void* b;               // [B, Nb, C]
  int64_t a_stride_batch, a_stride_token, b_stride_batch, b_stride_token;
  const bool* mask_a;          // bool [B, Na] or null
  const bool* mask_b;          // bool [B, Nb] or null
  int64_t mask_a_stride_batch, mask_a_stride_token, mask_b_stride_batch, mask_b_stride_token;
  int64_t batch, rows, columns, channels;   // B, Na, Nb, C
  Metric metric;
  Energy energy_kind;
  bool exclude_self;
  int64_t block_size;
  float threshold, margin;
  DType dtype;
  float* mean;                 // f32 [B, Na], as the next three
  float* variance;
  float* largest;
  float* energy;
  int32_t* index;              // i32 [B, Na]
  int32_t* count;              // i32 [B, Na]
  void* workspace;             // similarity_stats_workspace(params) bytes
};

// ratio = |after| / |before| and cosine of the two, per row; norms that divide are clamped to
// kNormEps from below, so the ratio and the cosine of a zero row after are 0.
struct TransitionParams {
  const void* before;          // [B, N, C]
  const void* after;           // [B, N, C]
  int64_t before_stride_batch, before_stride_token, after_stride_batch, after_stride_token;
  int64_t batch, tokens, channels;
  DType dtype;
  float* ratio;                // f32 [B, N]
  float* cosine;               // f32 [B, N]
};

}  // namespace tokred
