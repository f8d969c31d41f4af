// Front ends of sparse_attention, attention over lists of keys, and its gradients.
#pragma once

#include "sparse_attn/biased_attention.h"

namespace tokred {

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
  TOKRED_CHECK(cos.has_value() == sin.has_value(), "rope_cos and rope_sin must be given together");
  if (!cos) return {};
  TOKRED_CHECK(p.dtype != DType::f64, "rope_cos needs q in float32, float16 or bfloat16");
  check_rotation(*cos, "rope_cos", p, length, q);
  check_rotation(*sin, "rope_sin", p, length, q);
  return {static_cast<const float*>(cos->const_data_ptr()),
          static_cast<const float*>(sin->const_data_ptr()), cos->stride(0), sin->stride(0)};
}

// out [B, Hq, L, Dv], lse [B, Hq, L]; see SparseAttentionParams.
template <class Backend>
std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& indices, std::optional<double> scale,
                                            const OptionalTensor& key_bias, bool causal,
                                            const OptionalTensor& mask, int64_t block_q,
                                            const OptionalTensor& rope_cos,
                                            const OptionalTensor& rope_sin,
                                            std::optional<double> softcap) {
  SparseAttentionParams p{};
  p.attention = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask, kMaxWideDim);
  if (rope_cos) refuse_wide_heads<Backend>(p.attention, "rope_cos");
  set_softcap(p.attention, softcap);
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
    const OptionalTensor& mask, int64_t block_q, std::optional<double> softcap) {
  SparseAttentionBackwardParams p{};
  AttentionParams f =
      attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask, kMaxWideDim);
  refuse_wide_heads<Backend>(f, "gradients");
  set_softcap(f, softcap);
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

}  // namespace tokred
