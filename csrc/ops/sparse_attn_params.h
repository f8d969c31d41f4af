// What the attention kernels are given. Acc is float, or double where the dtype is f64.
#pragma once

#include "types.h"

namespace tokred {

inline constexpr int64_t kMaxHeadDim = 256;

// A [B, H, L, D] tensor whose last dimension is contiguous; strides in elements.
struct HeadTensor {
  const void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_token = 0;
};

// logits(i, j) = scale * q_i . k_j + key_bias[j], for the visible j: mask(i, j) true, and with
// causal j <= i + N - L (the last query sees every key). out_i = softmax . v, lse_i = log sum exp.
// A query that sees no key, or only keys of logit -inf, has out 0 and lse -inf.
// Query head h reads key head h / (heads_q / heads_kv).
struct AttentionParams {
  HeadTensor q;                        // [B, Hq, L, D]
  HeadTensor k;                        // [B, Hkv, N, D]
  HeadTensor v;                        // [B, Hkv, N, Dv]
  const void* key_bias;                // Acc [B | 1, Hkv | 1, N] or null
  int64_t bias_stride_batch, bias_stride_head, bias_stride_key;
  MaskView mask;                       // bool [B | 1, Hq | 1, L | 1, N] or null
  void* out;                           // [B, Hq, L, Dv]
  int64_t out_stride_batch, out_stride_head, out_stride_token;
  void* lse;                           // Acc [B, Hq, L] contiguous
  int64_t batch, heads_q, heads_kv, queries, keys, head_dim, value_dim;
  DType dtype;
  bool causal;
  double scale;
};

// With p = exp(logit - lse), dp = grad_out . v, delta = out . grad_out - grad_lse:
// ds = p (dp - delta); grad_q = scale ds k, grad_k = scale ds^T q, grad_v = p^T grad_out,
// grad_bias = column sums of ds over the queries and the heads of the group.
struct AttentionBackwardParams {
  AttentionParams forward;             // out and lse hold the forward result
  HeadTensor grad_out;                 // [B, Hq, L, Dv]
  const void* grad_lse;                // Acc [B, Hq, L] contiguous
  void* grad_q;                        // [B, Hq, L, D] contiguous
  void* grad_k;                        // [B, Hkv, N, D] contiguous
  void* grad_v;                        // [B, Hkv, N, Dv] contiguous
  void* grad_bias;                     // Acc [B, Hkv, N] contiguous or null
  void* delta;                         // scratch Acc [B, Hq, L]
};

}  // namespace tokred
