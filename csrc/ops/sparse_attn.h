// Front ends of the sparse_attn stem: checks, allocation, parameters. Compiled for every backend.
#pragma once

#include <cmath>
#include <limits>

#include "../tensor.h"
#include "sparse_attn_params.h"

namespace tokred {

inline HeadTensor head_tensor(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_heads(const Tensor& t, const char* name, const Tensor& like) {
  check_dim(t, name, 4, "[B, H, N, D]");
  check_last_contiguous(t, name);
  check_same_dtype(t, name, like, "q");
  check_same_device(t, name, like, "q");
}

inline void check_attention_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  TOKRED_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3),
               "k must have the batch and head sizes of q ", shape_string(q), ", got shape ",
               shape_string(k));
  TOKRED_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
               "v must have the batch, heads and keys of k ", shape_string(k), ", got shape ",
               shape_string(v));
  TOKRED_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
               "the heads of q must be a multiple of the heads of k, got ", q.size(1), " and ",
               k.size(1));
  TOKRED_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim && v.size(3) >= 1 &&
                   v.size(3) <= kMaxHeadDim,
               "the head dimensions of q and v must be between 1 and ", kMaxHeadDim, ", got ",
               q.size(3), " and ", v.size(3));
  TOKRED_CHECK(k.size(2) <= std::numeric_limits<int32_t>::max() &&
                   q.size(2) <= std::numeric_limits<int32_t>::max(),
               "q and k may have at most 2^31 - 1 tokens, got ", q.size(2), " and ", k.size(2));
}

inline void set_key_bias(AttentionParams& p, const OptionalTensor& bias, const Tensor& q) {
  if (!bias) return;
  check_dim(*bias, "key_bias", 3, "[B | 1, Hkv | 1, N]");
  check_dtype(*bias, "key_bias", accumulator_type(q));
  check_same_device(*bias, "key_bias", q, "q");
  TOKRED_CHECK((bias->size(0) == p.batch || bias->size(0) == 1) &&
                   (bias->size(1) == p.heads_kv || bias->size(1) == 1) && bias->size(2) == p.keys,
               "key_bias must be [B | 1, Hkv | 1, N] with B = ", p.batch, ", Hkv = ", p.heads_kv,
               ", N = ", p.keys, ", got shape ", shape_string(*bias));
  p.key_bias = bias->const_data_ptr();
  p.bias_stride_batch = broadcast_stride(*bias, 0);
  p.bias_stride_head = broadcast_stride(*bias, 1);
  p.bias_stride_key = bias->stride(2);
}

inline void set_attention_mask(AttentionParams& p, const OptionalTensor& mask, const Tensor& q) {
  if (!mask) return;
  check_dim(*mask, "mask", 4, "[B | 1, Hq | 1, L | 1, N]");
  check_dtype(*mask, "mask", ScalarType::Bool);
  check_same_device(*mask, "mask", q, "q");
  const int64_t want[4] = {p.batch, p.heads_q, p.queries, p.keys};
  for (int64_t dim = 0; dim < 4; ++dim) {
    TOKRED_CHECK(mask->size(dim) == want[dim] || (dim < 3 && mask->size(dim) == 1),
                 "mask must be [B | 1, Hq | 1, L | 1, N] with size ", want[dim], " in dimension ",
                 dim, ", got shape ", shape_string(*mask));
    p.mask.stride[dim] = broadcast_stride(*mask, dim);
  }
  p.mask.data = static_cast<const bool*>(mask->const_data_ptr());
}

// The inputs of an attention call, checked; outputs are still to be set.
template <class Backend>
AttentionParams attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& key_bias, bool causal,
                                 std::optional<double> scale, const OptionalTensor& mask) {
  AttentionParams p{};
  p.dtype = float_dtype(q, "q", Backend::kDouble);
  check_heads(q, "q", q);
  check_heads(k, "k", q);
  check_heads(v, "v", q);
  check_attention_shapes(q, k, v);
  TOKRED_CHECK(!scale || std::isfinite(*scale), "scale must be finite, got ", *scale);
  p.q = head_tensor(q);
  p.k = head_tensor(k);
  p.v = head_tensor(v);
  p.batch = q.size(0);
  p.heads_q = q.size(1);
  p.heads_kv = k.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.head_dim = q.size(3);
  p.value_dim = v.size(3);
  p.causal = causal;
  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  set_key_bias(p, key_bias, q);
  set_attention_mask(p, mask, q);
  return p;
}

// out [B, Hq, L, Dv], lse [B, Hq, L]; see AttentionParams.
template <class Backend>
std::tuple<Tensor, Tensor> biased_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalTensor& key_bias, bool causal,
                                            std::optional<double> scale,
                                            const OptionalTensor& mask) {
  AttentionParams p = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  Backend backend(q);
  Tensor out = allocate(q, {p.batch, p.heads_q, p.queries, p.value_dim}, q.scalar_type());
  Tensor lse = allocate(q, {p.batch, p.heads_q, p.queries}, accumulator_type(q));
  p.out = out.mutable_data_ptr();
  p.out_stride_batch = out.stride(0);
  p.out_stride_head = out.stride(1);
  p.out_stride_token = out.stride(2);
  p.lse = lse.mutable_data_ptr();
  backend.biased_attention(p);
  return {out, lse};
}

// Gradients of q, k, v and key_bias; see AttentionBackwardParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> biased_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const OptionalTensor& key_bias, const Tensor& out, const Tensor& lse,
    bool causal, std::optional<double> scale, const OptionalTensor& mask) {
  AttentionBackwardParams p{};
  AttentionParams& f = p.forward;
  f = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  const ScalarType accumulator = accumulator_type(q);
  for (const auto& [tensor, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_heads(*tensor, name, q);
    check_shape(*tensor, name, {f.batch, f.heads_q, f.queries, f.value_dim}, "[B, Hq, L, Dv]");
  }
  for (const auto& [tensor, name] : {std::pair(&grad_lse, "grad_lse"), std::pair(&lse, "lse")}) {
    check_shape(*tensor, name, {f.batch, f.heads_q, f.queries}, "[B, Hq, L]");
    check_dtype(*tensor, name, accumulator);
    check_same_device(*tensor, name, q, "q");
    TOKRED_CHECK(tensor->is_contiguous(), name, " must be contiguous, got strides of a view");
  }
  f.out = const_cast<void*>(out.const_data_ptr());
  f.out_stride_batch = out.stride(0);
  f.out_stride_head = out.stride(1);
  f.out_stride_token = out.stride(2);
  f.lse = const_cast<void*>(lse.const_data_ptr());
  p.grad_out = head_tensor(grad_out);
  p.grad_lse = grad_lse.const_data_ptr();

  Backend backend(q);
  Tensor grad_q = allocate(q, {f.batch, f.heads_q, f.queries, f.head_dim}, q.scalar_type());
  Tensor grad_k = allocate(q, {f.batch, f.heads_kv, f.keys, f.head_dim}, q.scalar_type());
  Tensor grad_v = allocate(q, {f.batch, f.heads_kv, f.keys, f.value_dim}, q.scalar_type());
  Tensor grad_bias = key_bias ? allocate(q, {f.batch, f.heads_kv, f.keys}, accumulator)
                              : allocate(q, {0}, accumulator);
  Tensor delta = allocate(q, {f.batch, f.heads_q, f.queries}, accumulator);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_bias = key_bias ? grad_bias.mutable_data_ptr() : nullptr;
  p.delta = delta.mutable_data_ptr();
  backend.biased_attention_backward(p);
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace tokred
