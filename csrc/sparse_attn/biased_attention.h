// Front ends of biased_attention and its gradients: checks, allocation, parameters. Compiled for
// every backend.
#pragma once

#include "attention/inputs.h"
#include "sparse_attn/params.h"

namespace tokred {

// Refuses wide heads on CUDA, where only the forward kernels for a few rows hold them.
template <class Backend>
void refuse_wide_heads(const AttentionParams& p, const char* whose) {
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  TOKRED_CHECK(Backend::kHost || dim <= kMaxHeadDim,
               "the head dimensions of q and v must be at most ", kMaxHeadDim, " on CUDA for ",
               whose, ", got ", dim);
}

template <class Backend>
std::tuple<Tensor, Tensor> run_attention(AttentionParams& p, const Tensor& q) {
  Backend backend(q);
  std::tuple<Tensor, Tensor> outputs = allocate_attention_outputs(p, q);
  Scratch workspace(q, backend.biased_attention_workspace(p), Backend::kHost);
  p.workspace = workspace.data();
  backend.biased_attention(p);
  return outputs;
}

// out [B, Hq, L, Dv], lse [B, Hq, L]; see AttentionParams.
template <class Backend>
std::tuple<Tensor, Tensor> biased_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalTensor& key_bias, bool causal,
                                            std::optional<double> scale, const OptionalTensor& mask,
                                            const OptionalTensor& query_position,
                                            const OptionalTensor& key_position,
                                            std::optional<double> softcap) {
  AttentionParams p =
      attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask, kMaxWideDim);
  set_softcap(p, softcap);
  set_positions(p, query_position, key_position, q);
  return run_attention<Backend>(p, q);
}

// The checked inputs of a backward pass; gradients are still to be set.
inline AttentionBackwardParams backward_inputs(AttentionParams forward, const Tensor& grad_out,
                                               const Tensor& grad_lse, const Tensor& out,
                                               const Tensor& lse, const Tensor& q) {
  AttentionBackwardParams p{};
  p.forward = forward;
  AttentionParams& f = p.forward;
  for (const auto& [tensor, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_heads(*tensor, name, q);
    check_shape(*tensor, name, {f.batch, f.heads_q, f.queries, f.value_dim}, "[B, Hq, L, Dv]");
  }
  for (const auto& [tensor, name] : {std::pair(&grad_lse, "grad_lse"), std::pair(&lse, "lse")}) {
    check_shape(*tensor, name, {f.batch, f.heads_q, f.queries}, "[B, Hq, L]");
    check_dtype(*tensor, name, accumulator_type(q));
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
  return p;
}

// The gradients of q, k, v and key_bias (empty where there is none), allocated and set.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> allocate_gradients(AttentionBackwardParams& p,
                                                                     const Tensor& q) {
  const AttentionParams& f = p.forward;
  Tensor grad_q = allocate(q, {f.batch, f.heads_q, f.queries, f.head_dim}, q.scalar_type());
  Tensor grad_k = allocate(q, {f.batch, f.heads_kv, f.keys, f.head_dim}, q.scalar_type());
  Tensor grad_v = allocate(q, {f.batch, f.heads_kv, f.keys, f.value_dim}, q.scalar_type());
  Tensor grad_bias = f.key_bias ? allocate(q, {f.batch, f.heads_kv, f.keys}, accumulator_type(q))
                                : allocate(q, {0}, accumulator_type(q));
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_bias = f.key_bias ? grad_bias.mutable_data_ptr() : nullptr;
  return moved(grad_q, grad_k, grad_v, grad_bias);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_attention_backward(AttentionBackwardParams& p,
                                                                  const Tensor& q) {
  Backend backend(q);
  auto gradients = allocate_gradients(p, q);
  const AttentionParams& f = p.forward;
  Tensor delta = allocate(q, {f.batch, f.heads_q, f.queries}, accumulator_type(q));
  p.delta = delta.mutable_data_ptr();
  backend.biased_attention_backward(p);
  return gradients;
}

// The gradient of a float mask, float32 or float64 in its shape; see AttentionMaskBackwardParams.
template <class Backend>
Tensor biased_attention_mask_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                      const Tensor& q, const Tensor& k, const Tensor& v,
                                      const OptionalTensor& key_bias, const Tensor& out,
                                      const Tensor& lse, bool causal, std::optional<double> scale,
                                      const OptionalTensor& mask,
                                      const OptionalTensor& query_position,
                                      const OptionalTensor& key_position,
                                      std::optional<double> softcap) {
  TOKRED_CHECK(mask && mask->scalar_type() != ScalarType::Bool,
               "mask must hold numbers to have a gradient, got ", mask ? "bool" : "none");
  AttentionParams f =
      attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask, kMaxWideDim);
  set_softcap(f, softcap);
  set_positions(f, query_position, key_position, q);
  refuse_wide_heads<Backend>(f, "gradients");
  AttentionMaskBackwardParams p{};
  p.backward = backward_inputs(f, grad_out, grad_lse, out, lse, q);
  p.batch = mask->size(0);
  p.heads = mask->size(1);
  p.queries = mask->size(2);
  Backend backend(q);
  Tensor grad = allocate(q, {p.batch, p.heads, p.queries, f.keys}, accumulator_type(q));
  p.grad_mask = grad.mutable_data_ptr();
  OptionalTensor delta;
  if (!Backend::kHost) delta = allocate(q, {f.batch, f.heads_q, f.queries}, accumulator_type(q));
  p.backward.delta = delta ? delta->mutable_data_ptr() : nullptr;
  backend.biased_attention_mask_backward(p);
  return grad;
}

// Gradients of q, k, v and key_bias; see AttentionBackwardParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> biased_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const OptionalTensor& key_bias, const Tensor& out, const Tensor& lse,
    bool causal, std::optional<double> scale, const OptionalTensor& mask,
    const OptionalTensor& query_position, const OptionalTensor& key_position,
    std::optional<double> softcap) {
  AttentionParams f =
      attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask, kMaxWideDim);
  set_softcap(f, softcap);
  set_positions(f, query_position, key_position, q);
  refuse_wide_heads<Backend>(f, "gradients");
  AttentionBackwardParams p = backward_inputs(f, grad_out, grad_lse, out, lse, q);
  return run_attention_backward<Backend>(p, q);
}

}  // namespace tokred
