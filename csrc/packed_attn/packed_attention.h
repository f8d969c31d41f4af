// Front end of packed_attention: checks, allocation, parameters. Compiled for every backend.
#pragma once

#include "packed_attn/sides.h"

namespace tokred {

// indices [B, Hq | Hkv | 1, L | 1, K]; without, all tokens in order.
inline KeyLists packed_lists(const AttentionParams& p, const OptionalTensor& indices,
                             const Tensor& q) {
  const int64_t all_queries = p.queries > 0 ? p.queries : 1;
  if (!indices || p.queries == 0) return {nullptr, 0, 0, 0, 1, p.keys, all_queries};
  check_dim(*indices, "indices", 4, "[B, Hq | Hkv | 1, L | 1, K]");
  KeyLists lists = key_lists(p, *indices, indices->size(2) == 1 ? all_queries : 1, q);
  // An empty tensor has no address, but lists of no tokens are not the list of all.
  static constexpr int32_t kNoToken = -1;
  if (!lists.indices) lists.indices = &kNoToken;
  return lists;
}

// out [B, Hq, L, Dv], lse [B, Hq, L]; see PackedAttentionParams.
template <class Backend>
std::tuple<Tensor, Tensor> packed_attention(
    const Tensor& q, const Tensor& k_codes, const Tensor& k_params, int64_t k_bits,
    int64_t k_group_size, const Text& k_axis, const Text& k_scheme, bool k_rotated,
    const Tensor& v_codes, const Tensor& v_params, int64_t v_bits, int64_t v_group_size,
    const Text& v_axis, const Text& v_scheme, bool v_rotated, const OptionalTensor& residual_k,
    const OptionalTensor& residual_v, std::optional<double> scale, const OptionalTensor& indices,
    const OptionalTensor& mask, const OptionalTensor& key_bias, bool causal,
    std::optional<int64_t> length, const OptionalTensor& lengths, const OptionalTensor& slots,
    const OptionalTensor& k_levels, const OptionalTensor& v_levels, std::optional<double> softcap) {
  PackedAttentionParams p{};
  check_dim(q, "q", 4, "[B, Hq, L, D]");
  check_dim(k_codes, "k_codes", 4, "[B, Hkv, N, bytes of a row]");
  const FormatArguments k_format{"k_", k_bits, k_group_size, k_axis, k_scheme, k_rotated, k_levels};
  const FormatArguments v_format{"v_", v_bits, v_group_size, v_axis, v_scheme, v_rotated, v_levels};
  const int64_t heads_kv = k_codes.size(1);
  SlotTable value_slots;
  const SideInputs k = packed_side(k_codes, k_params, k_format, residual_k, "residual_k", length,
                                   heads_kv, q, &p.slots, slots);
  const SideInputs v = packed_side(v_codes, v_params, v_format, residual_v, "residual_v", length,
                                   heads_kv, q, &value_slots, slots);
  TOKRED_CHECK(k.tokens == v.tokens, "k and v must have as many tokens, got ", k.tokens, " and ",
               v.tokens, " (packed and residual together)");
  TOKRED_CHECK(k.tokens <= std::numeric_limits<int32_t>::max(),
               "there may be at most 2^31 - 1 tokens, got ", k.tokens);
  AttentionParams& a = p.attention;
  a = packed_query(q, heads_kv, k.side.packed.format.head_dim, scale);
  a.k = k.window;
  a.v = v.window;
  a.keys = k.tokens;
  a.value_dim = v.side.packed.format.head_dim;
  a.causal = causal;
  set_softcap(a, softcap);
  set_key_bias(a, key_bias, q);
  set_attention_mask(a, mask, q);
  p.k = k.side;
  p.v = v.side;
  TOKRED_CHECK(!lengths || length, "lengths needs length, the largest of them");
  p.lengths = batch_lengths(lengths, a.batch, q, "q", p.lengths_stride);
  p.lists = packed_lists(a, indices, q);

  Backend backend(q);
  std::tuple<Tensor, Tensor> outputs = allocate_attention_outputs(a, q);
  Scratch workspace(q, backend.packed_attention_workspace(p), Backend::kHost);
  a.workspace = workspace.data();
  backend.packed_attention(p);
  return outputs;
}

}  // namespace tokred
