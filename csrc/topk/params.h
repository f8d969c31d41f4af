// Parameters of the topk kernels. Every pointer carries its shape; R is the number of rows.
#pragma once

#include "common/types.h"

namespace tokred {

enum class RowOrder : int32_t { score, position };

inline constexpr int64_t kMaxRowDims = 3;
// Probabilities are summed as integers of this many fractional bits (rounded down), so that the sum
// is the same in any order and on any device. A probability is clamped to [0, 2^20] first, top_p to
// at most 2^20; NaN counts as 0. Sums of many need more than 64 bits, or additions that saturate.
inline constexpr int kProbabilityBits = 40;

// The rows of a [d0, d1, d2, N] tensor whose last dimension is contiguous. Row r is
// (r / (d1 d2), r / d2 % d1, r % d2); strides in elements, 0 broadcasts. Unused leading dimensions
// have size 1.
struct RowView {
  const void* data = nullptr;
  int64_t size[kMaxRowDims] = {1, 1, 1};
  int64_t stride[kMaxRowDims] = {0, 0, 0};
};

// A row has `segments` = max(1, ceil(columns / block_size)) segments of block_size columns (one of
// all columns where block_size is 0); each is selected from on its own and is a row of the outputs.
// Entry j of row r takes part where j < length(r), and is
//   forced     where j < num_sinks, or j >= length(r) - num_locals, or must_keep[r][j];
//   candidate  where it is not forced, and its score is above -inf (NaN is not) and, with
//              has_threshold, above the threshold.
// The order of a segment's entries is: forced before candidates, then score descending (NaN as
// -inf; -0 equals 0), then index ascending. The first min(k, row_k[r]) of them are chosen; with
// has_top_p only as many as it takes for their probabilities (the scores, kProbabilityBits) to
// exceed top_p, that is the number of prefixes whose sum is <= top_p plus one, but at least min_k.
// Chosen entries are written in that order, or by position; -1 (score -inf) fills the rest of k.
// Values are the scores as ranked: NaN is written as -inf and -0 as +0.
struct TopkParams {
  RowView scores;              // dtype [d0, d1, d2, N]
  RowView lengths;             // i32 [R] by RowView or null: all columns
  RowView row_k;               // i32 [R] by RowView or null: k
  RowView must_keep;           // bool [d0, d1, d2, N] or null
  int64_t rows, columns, k, segments, block_size;
  int64_t num_sinks, num_locals;
  bool has_top_p, has_threshold;
  double top_p;
  int64_t min_k;
  float threshold;
  RowOrder order;
  DType dtype;                 // f32, f16 or bf16
  float* values;               // f32 [R, segments, k]
  int32_t* indices;            // i32 [R, segments, k], positions in the row
  int32_t* counts;             // i32 [R, segments], chosen entries
  void* workspace;             // topk_workspace(params) bytes
};

// indices[r]: the positions j < length(r), ascending, where the row is true (bool rows) or above
// the threshold (float rows), or of a list the entries selected[j] >= 0; at most `capacity` of
// them, -1 behind them. counts[r]: how many were written.
struct CompactParams {
  RowView selected;            // bool, i32 or dtype [d0, d1, d2, N]
  RowView lengths;             // i32 [R] or null
  int64_t rows, columns, capacity;
  bool is_bool, is_list;       // neither: scores of dtype
  DType dtype;
  float threshold;
  int32_t* indices;            // i32 [R, capacity]
  int32_t* counts;             // i32 [R]
};

// One tensor of a gather, seen as [B, H, N, row]: `heads` is 1 for a tensor without heads.
// out[b][h][i] = source[b][h][indices[b][h][i]], and zeros where the index is outside [0, N).
struct GatherItem {
  const void* source;          // [B, H, N, row_bytes], rows contiguous, strides in bytes
  int64_t stride_batch, stride_head, stride_token;
  void* out;                   // [B, H, K, row_bytes] contiguous
  int64_t heads, tokens, row_bytes;
};

inline constexpr int64_t kMaxGatherItems = 16;

struct GatherParams {
  GatherItem item[kMaxGatherItems];
  const int32_t* indices;      // i32 [B, index_heads, K]; the last dimension contiguous
  int64_t index_stride_batch, index_stride_head;  // stride_head 0 where one list serves all heads
  int64_t items, batch, count;
};

// A tensor whose token in one slot a head is replaced, seen as [B, H, N, row].
struct ReplacedRows {
  void* tokens;  // [B, H, N, row_bytes], rows contiguous, strides in bytes
  int64_t stride_batch, stride_head, stride_token;
  const void* token;  // [B, H, 1, row_bytes]
  int64_t token_stride_batch, token_stride_head;
  int64_t row_bytes;
};

// keys[b][h][slot[b][h]] = new_keys[b][h][0], the same of values, and new_position in position. A
// slot outside [0, N) is skipped.
struct ReplaceTokenParams {
  ReplacedRows keys, values;
  int32_t* position;  // i32 [B, H, N] or null
  int64_t position_stride_batch, position_stride_head, position_stride_token;
  const int32_t* slot;  // i32 [B, H, 1]
  int64_t slot_stride_batch, slot_stride_head;
  int64_t batch, heads, slots;  // N
  int32_t new_position;
};

// Which of a head's N keys makes room for the next token. With logits the attention that key n
// received from a query is
//   received[b][h][n] = mean of w[b][g][n] over the query heads g of h (of all heads where shared)
//   w[b][g][n] = exp(min(cap(logits[b][g][n]) - lse[b][g] + bias[b][h(g)][n], 88))
// cap(x) = softcap tanh(x / softcap); w is 0 where bias is not above -inf, where lse is -inf, and
// where the query's own token, in slot newest[b][h(g)] or else the last, has a bias that is not
// above -inf. A key's number is total = scores + received; without logits scores; without both its
// position. It ranks by that, or by its negative where the largest goes, NaN as -inf; as inf where
// it must stay, start <= position < start + first or position > recent_after; and as -inf where its
// bias is not above -inf. slot[b][h]: the first key of the smallest rank; -1 where N = 0.
struct EvictionSlotParams {
  const int32_t* position;  // i32 [B, H, N]
  int64_t position_stride_batch, position_stride_head;
  const float* scores;  // f32 [B, H, N] or null
  int64_t scores_stride_batch, scores_stride_head;
  const float* logits;  // f32 [B, Hq, N] or null
  int64_t logits_stride_batch, logits_stride_head;
  const float* lse;  // f32 [B, Hq]; null without logits
  int64_t lse_stride_batch, lse_stride_head;
  const float* bias;  // f32 [B | 1, H | 1, N] or null
  int64_t bias_stride_batch, bias_stride_head;
  const int32_t* start;  // i32 [B] or null: 0
  int64_t start_stride;
  const int32_t* newest;  // i32 [B, H, 1] or null: the last
  int64_t newest_stride_batch, newest_stride_head;
  int64_t batch, heads, heads_q, slots;
  int64_t first;  // at most 2^32
  int32_t recent_after;  // length - 1 - recent, clamped
  float softcap;  // 0: none
  bool shared, largest;
  int32_t* slot;  // i32 [B, H, 1]
  float* total;  // f32 [B, H, N]; null without logits
};

// Adaptive token sampling (arXiv 2111.15667). The unmasked entries of a row of non-negative scores
// (NaN and negative count as 0), sorted ascending (ties by index), have cumulative sums c, min-max
// normalised to c' (all 0 where they are equal). Sample i of n lies at y0 + i (1 - y0) / (n - 1),
// y0 the smallest positive c' (n = 1: at y0; without one: at 0), and picks the first entry whose c'
// is nearest. Repeated picks count once. indices: the picks by ascending score, -1 behind them.
// Sums are of integers: floor(score / maximum unmasked score * 2^kProbabilityBits), a score being
// at most the largest finite float (all 0 where the maximum is 0). All else is in double, in the
// order written, without contraction; distances too, and those that round to the same are equal.
struct InverseTransformParams {
  RowView scores;  // dtype [d0, d1, d2, N]
  RowView mask;  // bool [d0, d1, d2, N] or null
  int64_t rows, columns, num_samples;
  DType dtype;
  int32_t* indices;  // i32 [R, num_samples]
  int32_t* counts;  // i32 [R]
  void* workspace;  // inverse_transform_sample_workspace(params) bytes
};

}  // namespace tokred
