// Params of the linear attention kernels. Acc is float, or double where the dtype is f64.
#pragma once

#include "common/types.h"

namespace tokred {

// Tokens are rows r = 0 .. N - 1 in time: forwards as they lie, in reverse with negative strides.
// A row is visible where the mask is true. The clock t counts the visible rows up to and with r
// (reverse: before r), T all of them, and w(n) = exp(-decay n), w(0) = 1. For every head h, with
// the sum over its key heads g, and with the visible rows c <= r alone (reverse: of visible rows r)
//   out_r = scale_q q_r . (w(t_r) state + sum_c w(t_r - t_c) scale_k k_c v_c^T)
//   state_out = w(T) state + sum_c w(T - t_c) scale_k k_c v_c^T
// A hidden row adds nothing, whatever it holds; in reverse its out is 0. With key_group = 1 this is
// decayed linear attention; gradients have several key heads: they sum over the query heads.
struct LinearAttentionParams {
  HeadTensor q;                        // [B, H * query_group, N, D]
  HeadTensor k;                        // [B, H * key_group, N, D]
  HeadTensor v;                        // [B, H * key_group, N, Dv]
  const void* decay;                   // Acc [H]
  int64_t decay_stride;
  const void* state;                   // Acc [B, H, D, Dv] or null (zeros)
  int64_t state_stride_batch, state_stride_head, state_stride_row, state_stride_column;
  const bool* mask;                    // bool [B | 1, N] or null
  int64_t mask_stride_batch, mask_stride_token;
  void* out;                           // [B, H * query_group, N, Dv]
  int64_t out_stride_batch, out_stride_head, out_stride_token;
  void* state_out;                     // Acc [B, H, D, Dv] contiguous, or null
  int64_t batch, heads, query_group, key_group, tokens, head_dim, value_dim;
  DType dtype;
  double scale_q, scale_k;
  bool reverse;
  void* workspace;                     // linear_attention_workspace(params) bytes
};

}  // namespace tokred
