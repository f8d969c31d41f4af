// Params of attention kernels: queries, keys and values, which pairs are visible, and their logits.
// Acc is float, or double where the dtype is f64.
#pragma once

#include "common/types.h"

namespace tokred {

inline constexpr int64_t kMaxHeadDim = 256;
// The largest head of biased, sparse, block-sparse and packed attention: a latent of 512 dimensions
// with its 64 rotary ones.
inline constexpr int64_t kMaxWideDim = 576;

// Up to two integers a query and a key: query i sees key j only where
// key[b][j][c] <= query[b][i][c] for every column c. One column is a position, two are (position,
// iteration), or for a tree (entry, -exit) of a depth-first walk: ancestors and self are visible.
// No columns: everything is visible.
struct PositionTables {
  const int32_t* query = nullptr;  // i32 [B | 1, L, columns], the last dimension contiguous
  const int32_t* key = nullptr;  // i32 [B | 1, N, columns], the last dimension contiguous
  int64_t query_stride_batch = 0, query_stride_token = 0;
  int64_t key_stride_batch = 0, key_stride_token = 0;
  int64_t columns = 0;  // 0, 1 or 2
};

// Which rectangles of block_q queries by block_k keys are visible at all. Null data: all.
struct BlockMask {
  MaskView mask;  // bool [B | 1, Hq | 1, ceil(L / block_q), ceil(N / block_k)]
  int64_t block_q = 0, block_k = 0;
};

// Numbers that are added to the logits of pairs; -inf hides a pair. Null data: none.
struct PairBias {
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};  // batch, head, query, key; in elements
  DType dtype = DType::f32;  // Acc, or that of q
};

// logits(i, j) = scale * q_i . k_j + key_bias[j] + pair_bias(i, j), for the visible j: mask(i, j)
// true, with causal j <= i + N - L (the last query sees every key), and visible by positions and
// blocks. With a softcap softcap * tanh(scale * q_i . k_j) takes the place of scale * q_i . k_j,
// and scale is the front end's divided by the softcap.
// out_i = softmax . v, lse_i = log sum exp.
// A query that sees no key, or only keys of logit -inf, has out 0 and lse -inf.
// Query head h reads key head h / (heads_q / heads_kv).
struct AttentionParams {
  HeadTensor q;  // [B, Hq, L, D]
  HeadTensor k;  // [B, Hkv, N, D]
  HeadTensor v;  // [B, Hkv, N, Dv]
  const void* key_bias;  // Acc [B | 1, Hkv | 1, N] or null
  int64_t bias_stride_batch, bias_stride_head, bias_stride_key;
  MaskView mask;  // bool [B | 1, Hq | 1, L | 1, N] or null
  PairBias pair_bias;  // [B | 1, Hq | 1, L | 1, N] or null; not beside a mask
  PositionTables positions;
  BlockMask blocks;
  void* out;  // [B, Hq, L, Dv]
  int64_t out_stride_batch, out_stride_head, out_stride_token;
  void* lse;  // Acc [B, Hq, L] contiguous
  int64_t batch, heads_q, heads_kv, queries, keys, head_dim, value_dim;
  DType dtype;
  bool causal;
  double scale;
  double softcap;  // 0: none
  void* workspace;  // biased_attention_workspace(params) bytes

  constexpr HeadTensor out_view() const {
    return {out, out_stride_batch, out_stride_head, out_stride_token};
  }
};

// Lists of keys. Queries i / block_q = r of a head attend to the keys indices[b][h'][r][0 .. K - 1]
// alone, in that order; h' = h * heads / Hq. Entries outside [0, N) are skipped, a key
// listed twice counts twice. What AttentionParams hides stays hidden.
struct KeyLists {
  const int32_t* indices;  // i32 [B, Hq | Hkv | 1, ceil(L / block_q), K]
  int64_t stride_batch, stride_head, stride_list;  // the last dimension contiguous
  int64_t heads, length, block_q;  // Hq | Hkv | 1, K
};

// A listed key is rotated to the position s of its entry in the list before it meets the query:
// with cos, sin [s][d], d < D / 2, k'[d] = k[d] cos - k[d + D/2] sin,
// k'[d + D/2] = k[d + D/2] cos + k[d] sin, in f32. Null: keys are not rotated.
struct Rotation {
  const float* cos = nullptr;  // f32 [K.., D / 2], the last dimension contiguous
  const float* sin = nullptr;  // f32 [K.., D / 2]
  int64_t cos_stride = 0, sin_stride = 0;
};

struct SparseAttentionParams {
  AttentionParams attention;  // workspace: sparse_attention_workspace(params) bytes
  KeyLists lists;
  Rotation rotation;
};

}  // namespace tokred
