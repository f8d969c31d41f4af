// Front ends of attention over lists of keys, and of the merge of partial results.
#pragma once

#include "sparse_attn/biased_attention.h"

namespace tokred {

// indices [B, Hq | Hkv | 1, ceil(L / block_q), K]; see KeyLists.
inline KeyLists key_lists(const AttentionParams& p, const Tensor& indices, int64_t block_q,
                          const Tensor& q) {
  TOKRED_CHECK(block_q >= 1, "block_q must be at least 1, got ", block_q);
  check_dim(indices, "indices", 4, "[B, Hq | Hkv | 1, ceil(L / block_q), K]");
  check_dtype(indices, "indices", ScalarType::Int);
  check_same_device(indices, "indices", q, "q");
  check_last_contiguous(indices, "indices");
  check_token_count(indices, "indices", 3);
  const int64_t heads = indices.size(1);
  const int64_t lists = p.queries / block_q + (p.queries % block_q != 0);
  TOKRED_CHECK(indices.size(0) == p.batch && indices.size(2) == lists &&
                   (heads == p.heads_q || heads == p.heads_kv || heads == 1),
               "indices must be [B, Hq | Hkv | 1, ceil(L / block_q), K] with B = ", p.batch,
               ", Hq = ", p.heads_q, ", Hkv = ", p.heads_kv, " and ", lists,
               " lists of block_q = ", block_q, " queries, got shape ", shape_string(indices));
  return {static_cast<const int32_t*>(indices.const_data_ptr()), indices.stride(0),
          broadcast_stride(indices, 1), indices.stride(2), heads, indices.size(3),
          std::min(block_q, std::max<int64_t>(p.queries, 1))};
}

inline void check_rotation(const Tensor& t, const char* name, const AttentionParams& p,
                           int64_t length, const Tensor& q) {
  check_dim(t, name, 2, "[K.., D / 2]");
  check_dtype(t, name, ScalarType::Float);
  check_same_device(t, name, q, "q");
  check_last_contiguous(t, name);
  TOKRED_CHECK(p.head_dim % 2 == 0, name, " needs an even head dimension, got ", p.head_dim);
  TOKRED_CHECK(t.size(0) >= length && t.size(1) == p.head_dim / 2, name,
               " must be [K.., D / 2] with at least ", length, " rows of ", p.head_dim / 2,
               ", got shape ", shape_string(t));
}

inline Rotation rotation(const AttentionParams& p, const OptionalTensor& cos,
                         const OptionalTensor& sin, int64_t length, const Tensor& q) {
  TOKRED_CHECK(cos.has_value() == sin.has_value(),
               "rope_cos and rope_sin must be given together");
  if (!cos) return {};
  TOKRED_CHECK(p.dtype != DType::f64, "rope_cos needs q in float32, float16 or bfloat16");
  check_rotation(*cos, "rope_cos", p, length, q);
  check_rotation(*sin, "rope_sin", p, length, q);
  return {static_cast<const float*>(cos->const_data_ptr()),
          static_cast<const float*>(sin->const_data_ptr()), cos->stride(0), sin->stride(0)};
}

// out [B, Hq, L, Dv], lse [B, Hq, L]; see SparseAttentionParams.
template <class Backend>
std::tuple<Tensor, Tensor> sparse_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices,
    std::optional<double> scale, const OptionalTensor& key_bias, bool causal,
    const OptionalTensor& mask, int64_t block_q, const OptionalTensor& rope_cos,
    const OptionalTensor& rope_sin) {
  SparseAttentionParams p{};
  p.attention = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  p.lists = key_lists(p.attention, indices, block_q, q);
  p.rotation = rotation(p.attention, rope_cos, rope_sin, p.lists.length, q);
  Backend backend(q);
  std::tuple<Tensor, Tensor> outputs = allocate_attention_outputs(p.attention, q);
  Scratch workspace(q, backend.sparse_attention_workspace(p), Backend::kHost);
  p.attention.workspace = workspace.data();
  backend.sparse_attention(p);
  return outputs;
}

// Gradients of q, k, v and key_bias; see SparseAttentionBackwardParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& indices, const Tensor& out, const Tensor& lse,
    std::optional<double> scale, const OptionalTensor& key_bias, bool causal,
    const OptionalTensor& mask, int64_t block_q) {
  SparseAttentionBackwardParams p{};
  const AttentionParams f = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  p.backward = backward_inputs(f, grad_out, grad_lse, out, lse, q);
  p.lists = key_lists(f, indices, block_q, q);
  Backend backend(q);
  auto gradients = allocate_gradients(p.backward, q);
  Tensor delta = allocate(q, {f.batch, f.heads_q, f.queries}, accumulator_type(q));
  p.backward.delta = delta.mutable_data_ptr();
  Scratch workspace(q, backend.sparse_attention_backward_workspace(p), Backend::kHost);
  p.workspace = workspace.data();
  backend.sparse_attention_backward(p);
  return gradients;
}

// out [B, H, L, D], lse [B, H, L]; see CombineParams.
template <class Backend>
std::tuple<Tensor, Tensor> combine_states(const Tensor& out_a, const Tensor& lse_a,
                                          const Tensor& out_b, const Tensor& lse_b) {
  CombineParams p{};
  p.dtype = float_dtype(out_a, "out_a", Backend::kDouble);
  for (const auto& [out, name] : {std::pair(&out_a, "out_a"), std::pair(&out_b, "out_b")}) {
    check_dim(*out, name, 4, "[B, H, L, D]");
    check_last_contiguous(*out, name);
    check_same_dtype(*out, name, out_a, "out_a");
    check_same_device(*out, name, out_a, "out_a");
    check_shape(*out, name, {out_a.size(0), out_a.size(1), out_a.size(2), out_a.size(3)},
                "[B, H, L, D]");
  }
  for (const auto& [lse, name] : {std::pair(&lse_a, "lse_a"), std::pair(&lse_b, "lse_b")}) {
    check_shape(*lse, name, {out_a.size(0), out_a.size(1), out_a.size(2)}, "[B, H, L]");
    check_dtype(*lse, name, accumulator_type(out_a));
    check_same_device(*lse, name, out_a, "out_a");
    TOKRED_CHECK(lse->is_contiguous(), name, " must be contiguous, got strides of a view");
  }
  p.out_a = head_tensor(out_a);
  p.out_b = head_tensor(out_b);
  p.lse_a = lse_a.const_data_ptr();
  p.lse_b = lse_b.const_data_ptr();
  p.batch = out_a.size(0);
  p.heads = out_a.size(1);
  p.queries = out_a.size(2);
  p.dim = out_a.size(3);
  Backend backend(out_a);
  Tensor out = allocate(out_a, {p.batch, p.heads, p.queries, p.dim}, out_a.scalar_type());
  Tensor lse = allocate(out_a, {p.batch, p.heads, p.queries}, accumulator_type(out_a));
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  backend.combine_states(p);
  return {out, lse};
}

}  // namespace tokred
