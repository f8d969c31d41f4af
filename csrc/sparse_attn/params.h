// Params of the attention ops beyond those of attention/params.h: gradients, merged results, shared
// tokens. Acc is float, or double where the dtype is f64.
#pragma once

#include "attention/params.h"

namespace tokred {

// With p = exp(logit - lse), dp = grad_out . v, delta = out . grad_out - grad_lse:
// ds = p (dp - delta); grad_q = scale ds k, grad_k = scale ds^T q, grad_v = p^T grad_out,
// grad_bias = column sums of ds over the queries and the heads of the group. With a softcap ds
// times softcap (1 - tanh^2) takes the place of ds in grad_q and grad_k.
struct AttentionBackwardParams {
  AttentionParams forward;  // out and lse hold the forward result
  HeadTensor grad_out;  // [B, Hq, L, Dv]
  const void* grad_lse;  // Acc [B, Hq, L] contiguous
  void* grad_q;  // [B, Hq, L, D] contiguous
  void* grad_k;  // [B, Hkv, N, D] contiguous
  void* grad_v;  // [B, Hkv, N, Dv] contiguous
  void* grad_bias;  // Acc [B, Hkv, N] contiguous or null
  void* delta;  // scratch Acc [B, Hq, L]; null where it need not be stored
};

// The ds of AttentionBackwardParams for forward.pair_bias: grad_mask[b][h][i][j] = ds(b, h, i, j),
// summed over the dimensions in which the mask is broadcast. Of backward's gradients none is set.
struct AttentionMaskBackwardParams {
  AttentionBackwardParams backward;
  int64_t batch, heads, queries;  // of the mask: 1, or as many as attend
  void* grad_mask;  // Acc [batch, heads, queries, N] contiguous
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

// Attention over positions of which many share a token. Position i of the N has the token
// token_map[b][i] of k and v; a query l of the L last positions, i = N - L + l, has the token
// query_map[b][l] of q. Entries outside the tokens are skipped. With rows rotated to their
// positions by cos and sin (x'[d] = x[d] cos - x[d + R] sin, x'[d + R] = x[d + R] cos + x[d] sin, d
// < R, in f32) and the softmax over the positions j, with causal j <= i,
//   attended_l = sum_j softmax_j(scale q'_l . k'_j) v[token_map[j]]
//   out[u] = mean of attended_l over the queries l of token u, 0 where there are none
struct UnmergedParams {
  HeadTensor q;  // [B, Hq, Mq, D]
  HeadTensor k;  // [B, Hkv, M, D]
  HeadTensor v;  // [B, Hkv, M, Dv]
  const int32_t* token_map;  // i32 [B, N]
  int64_t token_map_stride_batch, token_map_stride_token;
  const int32_t* query_map;  // i32 [B, L]
  int64_t query_map_stride_batch, query_map_stride_token;
  const float* cos;  // f32 [B | 1, N, R], the last dimension contiguous, or null
  const float* sin;
  int64_t cos_stride_batch, cos_stride_token, sin_stride_batch, sin_stride_token;
  void* out;  // [B, Hq, Mq, Dv] contiguous
  int64_t batch, heads_q, heads_kv, query_tokens, tokens, positions, queries;  // Mq, M, N, L
  int64_t head_dim, value_dim, rotated;  // R, 0 where nothing is rotated
  DType dtype;
  bool causal;
  double scale;
  void* workspace;  // unmerged_attention_workspace(params) bytes
};

}  // namespace tokred
