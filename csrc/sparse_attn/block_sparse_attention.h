// Front ends of block_sparse_attention and its gradients: biased_attention with a block mask.
#pragma once

#include "sparse_attn/biased_attention.h"

namespace tokred {

// Which blocks of pairs are visible; see BlockMask.
inline void set_block_mask(AttentionParams& p, const Tensor& block_mask, int64_t block_q,
                           int64_t block_k, const Tensor& q) {
  TOKRED_CHECK(block_q >= 1, "block_q must be at least 1, got ", block_q);
  TOKRED_CHECK(block_k >= 1, "block_k must be at least 1, got ", block_k);
  const auto blocks = [](int64_t n, int64_t size) { return n / size + (n % size != 0); };
  set_mask_strides(p.blocks.mask.stride, block_mask, "block_mask",
                   "[B | 1, Hq | 1, ceil(L / block_q), ceil(N / block_k)]",
                   {p.batch, p.heads_q, blocks(p.queries, block_q), blocks(p.keys, block_k)}, 2, q);
  check_dtype(block_mask, "block_mask", ScalarType::Bool);
  p.blocks.mask.data = static_cast<const bool*>(block_mask.const_data_ptr());
  p.blocks.block_q = std::min(block_q, std::max<int64_t>(p.queries, 1));
  p.blocks.block_k = std::min(block_k, std::max<int64_t>(p.keys, 1));
}

// biased_attention where block_mask hides whole blocks of queries and keys.
template <class Backend>
std::tuple<Tensor, Tensor> block_sparse_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_mask, int64_t block_q,
    int64_t block_k, bool causal, std::optional<double> scale, const OptionalTensor& key_bias,
    const OptionalTensor& mask, std::optional<double> softcap) {
  AttentionParams p =
      attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask, kMaxWideDim);
  refuse_wide_heads<Backend>(p, "block_sparse_attention");
  set_softcap(p, softcap);
  set_block_mask(p, block_mask, block_q, block_k, q);
  return run_attention<Backend>(p, q);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& block_mask, int64_t block_q, int64_t block_k, const Tensor& out,
    const Tensor& lse, bool causal, std::optional<double> scale, const OptionalTensor& key_bias,
    const OptionalTensor& mask, std::optional<double> softcap) {
  AttentionParams f =
      attention_inputs<Backend>(q, k, v, key_bias, causal, scale, mask, kMaxWideDim);
  refuse_wide_heads<Backend>(f, "gradients");
  set_softcap(f, softcap);
  set_block_mask(f, block_mask, block_q, block_k, q);
  AttentionBackwardParams p = backward_inputs(f, grad_out, grad_lse, out, lse, q);
  return run_attention_backward<Backend>(p, q);
}

}  // namespace tokred
