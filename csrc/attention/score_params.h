// Params of kernels that score keys: qk_score, and packed_qk_score but for where its keys lie.
// Every pointer carries its shape; scores are f32.
#pragma once

#include "attention/params.h"

namespace tokred {

// How heads are reduced: kept [B, Hq]; mean or maximum of a kv head's group [B, Hkv]; mean
// over all heads [B, 1]; softmax over the keys of each head, summed over the heads [B, 1].
enum class HeadReduction : int32_t { none, group_mean, group_max, head_mean, softmax_vote };

// s(h, t) = scale * mean_i q[h][i] . k[kv(h)][t] over the L queries and, where dims is given, over
// those dimensions of q and k only (entries outside [0, D) are skipped, repeated ones count every
// time). out = reduced s.
// A key t with t >= lengths[b], mask false, or slots[b][t] outside [0, S) has score -inf (0 as a
// vote) in every head. Where slots are given key t is k[..][slots[b][t]] and N is their number.
// Without dims a mean over heads may be computed as the score of the mean query.
struct QkScoreParams {
  HeadTensor q;                // [B, Hq, L, D]
  HeadTensor k;                // [B, Hkv, N, D], or [1, Hkv, S, D] where slots are given
  const int32_t* dims;         // i32 [Hq, F] contiguous or null
  const int32_t* lengths;      // i32 [B] or null
  const bool* mask;            // bool [B | 1, N] or null
  const int32_t* slots;        // i32 [B, N], the last dimension contiguous, or null
  int64_t lengths_stride, mask_stride_batch, mask_stride_token, slots_stride_batch;
  int64_t batch, heads_q, heads_kv, queries, keys, stored_keys, head_dim, num_dims;
  DType dtype;                 // of q and k
  HeadReduction reduction;
  float scale;
  float* out;                  // f32 [B, H', N]
  void* workspace;             // qk_score_workspace(params) bytes
};

}  // namespace tokred
