// Params of the attention ops beyond those of attention/params.h: gradients, merged results. Acc is
// float, or double where the dtype is f64.
#pragma once

#include "attention/params.h"

namespace tokred {

// With p = exp(logit - lse), dp = grad_out . v, delta = out . grad_out - grad_lse:
// ds = p (dp - delta); grad_q = scale ds k, grad_k = scale ds^T q, grad_v = p^T grad_out,
// grad_bias = column sums of ds over the queries and the heads of the group.
struct AttentionBackwardParams {
  AttentionParams forward;  // out and lse hold the forward result
  HeadTensor grad_out;  // [B, Hq, L, Dv]
  const void* grad_lse;  // Acc [B, Hq, L] contiguous
  void* grad_q;  // [B, Hq, L, D] contiguous
  void* grad_k;  // [B, Hkv, N, D] contiguous
  void* grad_v;  // [B, Hkv, N, Dv] contiguous
  void* grad_bias;  // Acc [B, Hkv, N] contiguous or null
  void* delta;  // scratch Acc [B, Hq, L]
};

// As AttentionBackwardParams, for the pairs that the lists name. No rotation.
struct SparseAttentionBackwardParams {
  AttentionBackwardParams backward;  // grad_bias Acc [B, Hkv, N]
  KeyLists lists;
  void* workspace;  // sparse_attention_backward_workspace(params) bytes
};

// The softmax over the union of two disjoint sets of keys: with m = max(lse_a, lse_b),
// w = exp(lse - m): out = (w_a out_a + w_b out_b) / (w_a + w_b), lse = m + log(w_a + w_b); out 0
// and lse -inf where both are -inf. Weight 0 means the out is not looked at.
struct CombineParams {
  HeadTensor out_a, out_b;  // [B, H, L, D]
  const void* lse_a;  // Acc [B, H, L] contiguous
  const void* lse_b;  // Acc [B, H, L] contiguous
  void* out;  // [B, H, L, D] contiguous
  void* lse;  // Acc [B, H, L]
  int64_t batch, heads, queries, dim;
  DType dtype;
};

}  // namespace tokred
