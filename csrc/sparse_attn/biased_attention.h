// Front ends of dense and block-sparse attention: checks, allocation, parameters. Compiled for every
// backend.
#pragma once

#include "attention/inputs.h"
#include "sparse_attn/params.h"

namespace tokred {

// Which blocks of pairs are visible; see BlockMask.
inline void set_block_mask(AttentionParams& p, const Tensor& block_mask, int64_t block_q,
                           int64_t block_k, const Tensor& q) {
  TOKRED_CHECK(block_q >= 1, "block_q must be at least 1, got ", block_q);
  TOKRED_CHECK(block_k >= 1, "block_k must be at least 1, got ", block_k);
  const auto blocks = [](int64_t n, int64_t size) { return n / size + (n % size != 0); };
  p.blocks.mask = broadcast_mask(
      block_mask, "block_mask", "[B | 1, Hq | 1, ceil(L / block_q), ceil(N / block_k)]",
      {p.batch, p.heads_q, blocks(p.queries, block_q), blocks(p.keys, block_k)}, 2, q);
  p.blocks.block_q = std::min(block_q, std::max<int64_t>(p.queries, 1));
  p.blocks.block_k = std::min(block_k, std::max<int64_t>(p.keys, 1));
}

// out [B, Hq, L, Dv] and lse [B, Hq, L], allocated and set.
inline std::tuple<Tensor, Tensor> allocate_attention_outputs(AttentionParams& p, const Tensor& q) {
  Tensor out = allocate(q, {p.batch, p.heads_q, p.queries, p.value_dim}, q.scalar_type());
  Tensor lse = allocate(q, {p.batch, p.heads_q, p.queries}, accumulator_type(q));
  p.out = out.mutable_data_ptr();
  p.out_stride_batch = out.stride(0);
  p.out_stride_head = out.stride(1);
  p.out_stride_token = out.stride(2);
  p.lse = lse.mutable_data_ptr();
  return {out, lse};
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
std::tuple<Tensor, Tensor> biased_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_bias, bool causal,
    std::optional<double> scale, const OptionalTensor& mask, const OptionalTensor& query_position,
    const OptionalTensor& key_position) {
  AttentionParams p = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  set_positions(p, query_position, key_position, q);
  return run_attention<Backend>(p, q);
}

// The same where block_mask hides whole blocks of queries and keys.
template <class Backend>
std::tuple<Tensor, Tensor> block_sparse_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_mask, int64_t block_q,
    int64_t block_k, bool causal, std::optional<double> scale, const OptionalTensor& key_bias,
    const OptionalTensor& mask) {
  AttentionParams p = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  set_block_mask(p, block_mask, block_q, block_k, q);
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
  Tensor grad_bias = f.key_bias
                         ? allocate(q, {f.batch, f.heads_kv, f.keys}, accumulator_type(q))
                         : allocate(q, {0}, accumulator_type(q));
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_bias = f.key_bias ? grad_bias.mutable_data_ptr() : nullptr;
  return {grad_q, grad_k, grad_v, grad_bias};
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

// Gradients of q, k, v and key_bias; see AttentionBackwardParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> biased_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const OptionalTensor& key_bias, const Tensor& out, const Tensor& lse,
    bool causal, std::optional<double> scale, const OptionalTensor& mask,
    const OptionalTensor& query_position, const OptionalTensor& key_position) {
  AttentionParams f = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  set_positions(f, query_position, key_position, q);
  AttentionBackwardParams p = backward_inputs(f, grad_out, grad_lse, out, lse, q);
  return run_attention_backward<Backend>(p, q);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& block_mask, int64_t block_q, int64_t block_k, const Tensor& out,
    const Tensor& lse, bool causal, std::optional<double> scale, const OptionalTensor& key_bias,
    const OptionalTensor& mask) {
  AttentionParams f = attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask);
  set_block_mask(f, block_mask, block_q, block_k, q);
  AttentionBackwardParams p = backward_inputs(f, grad_out, grad_lse, out, lse, q);
  return run_attention_backward<Backend>(p, q);
}

}  // namespace tokred
