// Front ends of linear_attention and its gradients: checks, allocation, parameters.
#pragma once

#include "attention/inputs.h"
#include "linear_attn/params.h"

namespace tokred {

// The checked inputs of a linear attention; outputs are still to be set.
template <class Backend>
LinearAttentionParams linear_attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& decay, const OptionalTensor& state,
                                              double scale, const OptionalTensor& mask) {
  const AttentionParams a =
      attention_inputs<Backend>(q, k, v, std::nullopt, true, scale, std::nullopt);
  TOKRED_CHECK(q.size(2) == k.size(2), "q and k must have the same tokens, got ", q.size(2),
               " and ", k.size(2));
  LinearAttentionParams p{};
  p.q = a.q;
  p.k = a.k;
  p.v = a.v;
  p.batch = a.batch;
  p.heads = a.heads_kv;
  p.query_group = a.heads_q / a.heads_kv;
  p.key_group = 1;
  p.tokens = a.keys;
  p.head_dim = a.head_dim;
  p.value_dim = a.value_dim;
  p.dtype = a.dtype;
  p.scale_q = scale;
  p.scale_k = 1.0;
  check_shape(decay, "decay", {p.heads}, "[Hkv]");
  check_dtype(decay, "decay", accumulator_type(q));
  check_same_device(decay, "decay", q, "q");
  p.decay = decay.const_data_ptr();
  p.decay_stride = decay.stride(0);
  if (state) {
    check_shape(*state, "state", {p.batch, p.heads, p.head_dim, p.value_dim}, "[B, Hkv, D, Dv]");
    check_dtype(*state, "state", accumulator_type(q));
    check_same_device(*state, "state", q, "q");
    check_last_contiguous(*state, "state");
    p.state = state->const_data_ptr();
    p.state_stride_batch = state->stride(0);
    p.state_stride_head = state->stride(1);
    p.state_stride_row = state->stride(2);
    p.state_stride_column = 1;
  }
  p.mask = token_mask(mask, "mask", p.batch, p.tokens, true, q, "q", p.mask_stride_batch,
                      p.mask_stride_token);
  return p;
}

template <class Backend>
void run_linear_attention(const Backend& backend, LinearAttentionParams& p, const Tensor& q,
                          const Tensor& out, void* state_out) {
  p.out = out.mutable_data_ptr();
  p.out_stride_batch = out.stride(0);
  p.out_stride_head = out.stride(1);
  p.out_stride_token = out.stride(2);
  p.state_out = state_out;
  if (p.reverse && p.tokens > 0) {
    const auto turn = [&](auto*& data, int64_t& stride, int64_t bytes) {
      using Data = std::remove_reference_t<decltype(data)>;
      data = reinterpret_cast<Data>(reinterpret_cast<intptr_t>(data) +
                                    (p.tokens - 1) * stride * bytes);
      stride = -stride;
    };
    const auto bytes = static_cast<int64_t>(q.element_size());
    turn(p.q.data, p.q.stride_token, bytes);
    turn(p.k.data, p.k.stride_token, bytes);
    turn(p.v.data, p.v.stride_token, bytes);
    turn(p.out, p.out_stride_token, bytes);
    if (p.mask) turn(p.mask, p.mask_stride_token, 1);
  }
  Scratch workspace(q, backend.linear_attention_workspace(p), Backend::kHost);
  p.workspace = workspace.data();
  backend.linear_attention(p);
}

// out [B, Hq, N, Dv], state [B, Hkv, D, Dv]; see LinearAttentionParams.
template <class Backend>
std::tuple<Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& decay, const OptionalTensor& state,
                                            double scale, const OptionalTensor& mask) {
  LinearAttentionParams p = linear_attention_inputs<Backend>(q, k, v, decay, state, scale, mask);
  Backend backend(q);
  Tensor out = allocate(q, {p.batch, q.size(1), p.tokens, p.value_dim}, q.scalar_type());
  Tensor state_out = allocate(q, {p.batch, p.heads, p.head_dim, p.value_dim}, accumulator_type(q));
  run_linear_attention(backend, p, q, out, state_out.mutable_data_ptr());
  return moved(out, state_out);
}

// Gradients of q, k, v and state. With G = grad_state and M(i, j) = w(t_i - t_j), each is a linear
// attention itself:
//   grad_q_i = scale sum_{j <= i} M(i, j) (grad_out_i . v_j) k_j + .. state^T, forwards in time
//   grad_k_j = sum_{i >= j} M(i, j) (v_j . scale grad_out_i) q_i + .. G^T, in reverse
//   grad_v_j = sum_{i >= j} M(i, j) (k_j . scale q_i) grad_out_i + .. G, in reverse, whose state
//              becomes the gradient of the initial one
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    const Tensor& grad_out, const Tensor& grad_state, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& decay, const OptionalTensor& state, double scale,
    const OptionalTensor& mask) {
  const LinearAttentionParams f =
      linear_attention_inputs<Backend>(q, k, v, decay, state, scale, mask);
  check_heads(grad_out, "grad_out", q);
  check_shape(grad_out, "grad_out", {f.batch, q.size(1), f.tokens, f.value_dim}, "[B, Hq, N, Dv]");
  check_shape(grad_state, "grad_state", {f.batch, f.heads, f.head_dim, f.value_dim},
              "[B, Hkv, D, Dv]");
  check_dtype(grad_state, "grad_state", accumulator_type(q));
  check_same_device(grad_state, "grad_state", q, "q");

  Backend backend(q);
  Tensor grad_q = allocate(q, {f.batch, q.size(1), f.tokens, f.head_dim}, q.scalar_type());
  Tensor grad_k = allocate(q, {f.batch, f.heads, f.tokens, f.head_dim}, q.scalar_type());
  Tensor grad_v = allocate(q, {f.batch, f.heads, f.tokens, f.value_dim}, q.scalar_type());
  Tensor grad_initial =
      allocate(q, {f.batch, f.heads, f.head_dim, f.value_dim}, accumulator_type(q));
  const HeadTensor incoming = head_tensor(grad_out);

  LinearAttentionParams to_q = f;
  to_q.q = incoming;
  to_q.k = f.v;
  to_q.v = f.k;
  std::swap(to_q.head_dim, to_q.value_dim);
  std::swap(to_q.state_stride_row, to_q.state_stride_column);
  run_linear_attention(backend, to_q, q, grad_q, nullptr);

  LinearAttentionParams to_v = f;
  to_v.reverse = true;
  to_v.query_group = 1;
  to_v.key_group = f.query_group;
  std::swap(to_v.scale_q, to_v.scale_k);
  to_v.q = f.k;
  to_v.k = f.q;
  to_v.v = incoming;
  to_v.state = grad_state.const_data_ptr();
  to_v.state_stride_batch = grad_state.stride(0);
  to_v.state_stride_head = grad_state.stride(1);
  to_v.state_stride_row = grad_state.stride(2);
  to_v.state_stride_column = grad_state.stride(3);

  LinearAttentionParams to_k = to_v;
  to_k.q = f.v;
  to_k.k = incoming;
  to_k.v = f.q;
  std::swap(to_k.head_dim, to_k.value_dim);
  std::swap(to_k.state_stride_row, to_k.state_stride_column);
  run_linear_attention(backend, to_v, q, grad_v, grad_initial.mutable_data_ptr());
  run_linear_attention(backend, to_k, q, grad_k, nullptr);
  return moved(grad_q, grad_k, grad_v, grad_initial);
}

}  // namespace tokred
