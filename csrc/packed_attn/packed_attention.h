// Front ends of attention and scores on packed keys and values: checks, allocation, parameters.
// Compiled for every backend.
#pragma once

#include "kv_pack/kv_pack.h"
#include "packed_attn/params.h"
#include "score/score.h"
#include "sparse_attn/sparse_attention.h"

namespace tokred {

// One side of a cache, its window, and how many tokens an item may have on it at most.
struct SideInputs {
  PackedSide side;
  HeadTensor window;
  int64_t tokens;
};

// `length` is that of a cache; without it all rows are tokens, and those of the window follow.
inline SideInputs packed_side(const Tensor& codes, const Tensor& params,
                              const FormatArguments& a, const OptionalTensor& window,
                              const char* window_name, std::optional<int64_t> length,
                              int64_t heads_kv, const Tensor& q, SlotTable* slots,
                              const OptionalTensor& slot_ids) {
  SideInputs in{};
  const std::string codes_name = std::string(a.name) + "codes";
  PackedSide& side = in.side;
  side.packed = packed_rows(codes, params, a, q, "q");
  TOKRED_CHECK(codes.size(1) == heads_kv, codes_name, " must have the ", heads_kv,
               " heads of k_codes, got shape ", shape_string(codes));
  *slots = slot_table(slot_ids, q.size(0), side.packed, codes, codes_name.c_str());
  in.window = window_rows(window, window_name, q.size(0), heads_kv, side.packed.format, q, "q",
                          side.window_rows);
  side.ring = length.has_value();
  if (!length) {
    in.tokens = slots->capacity + side.window_rows;
    return in;
  }
  if (side.window_rows > 0) check_ring(side.packed.format, window_name, side.window_rows);
  TOKRED_CHECK(*length >= 0, "length must be at least 0, got ", *length);
  const int64_t packed = packed_tokens(side.packed.format.axis, side.window_rows, *length);
  TOKRED_CHECK(packed <= slots->capacity, "length = ", *length, " means ", packed,
               " packed tokens, but ", codes_name, " has room for ", slots->capacity);
  in.tokens = *length;
  return in;
}

// What a query of packed keys needs beside them; p.keys are the tokens.
inline AttentionParams packed_query(const Tensor& q, int64_t heads_kv, int64_t head_dim,
                                    std::optional<double> scale) {
  AttentionParams p{};
  check_heads(q, "q", q);
  p.dtype = float_dtype(q, "q", false);
  TOKRED_CHECK(q.size(3) == head_dim, "q must have the head dimension ", head_dim,
               " of the packed keys, got shape ", shape_string(q));
  check_groups(q.size(1), heads_kv);
  check_token_count(q, "q", 2);
  p.q = head_tensor(q);
  p.batch = q.size(0);
  p.heads_q = q.size(1);
  p.heads_kv = heads_kv;
  p.queries = q.size(2);
  p.head_dim = head_dim;
  p.scale = attention_scale(scale, head_dim);
  return p;
}

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
    const Text& v_axis, const Text& v_scheme, bool v_rotated,
    const OptionalTensor& residual_k, const OptionalTensor& residual_v,
    std::optional<double> scale, const OptionalTensor& indices, const OptionalTensor& mask,
    const OptionalTensor& key_bias, bool causal, std::optional<int64_t> length,
    const OptionalTensor& lengths, const OptionalTensor& slots) {
  PackedAttentionParams p{};
  check_dim(q, "q", 4, "[B, Hq, L, D]");
  check_dim(k_codes, "k_codes", 4, "[B, Hkv, N, bytes of a row]");
  const FormatArguments k_format{"k_", k_bits, k_group_size, k_axis, k_scheme, k_rotated};
  const FormatArguments v_format{"v_", v_bits, v_group_size, v_axis, v_scheme, v_rotated};
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
  set_key_bias(a, key_bias, q);
  set_attention_mask(a, mask, q);
  p.k = k.side;
  p.v = v.side;
  TOKRED_CHECK(!lengths || length, "lengths needs length, the greatest of them");
  p.lengths = batch_lengths(lengths, a.batch, q, "q", p.lengths_stride);
  p.lists = packed_lists(a, indices, q);

  Backend backend(q);
  std::tuple<Tensor, Tensor> outputs = allocate_attention_outputs(a, q);
  Scratch workspace(q, backend.packed_attention_workspace(p), Backend::kHost);
  a.workspace = workspace.data();
  backend.packed_attention(p);
  return outputs;
}

// f32 [B, Hq | Hkv | 1, T]; see PackedScoreParams.
template <class Backend>
Tensor packed_qk_score(const Tensor& q, const Tensor& codes, const Tensor& params, int64_t bits,
                       int64_t group_size, const Text& axis, const Text& scheme,
                       bool rotated, const OptionalTensor& residual, const Text& reduce,
                       std::optional<double> scale, std::optional<int64_t> length,
                       const OptionalTensor& lengths, const OptionalTensor& mask,
                       const OptionalTensor& slots) {
  PackedScoreParams p{};
  check_dim(q, "q", 4, "[B, Hq, L, D]");
  check_dim(codes, "codes", 4, "[B, Hkv, N, bytes of a row]");
  const SideInputs k =
      packed_side(codes, params, {"", bits, group_size, axis, scheme, rotated}, residual,
                  "residual", length, codes.size(1), q, &p.slots, slots);
  TOKRED_CHECK(k.tokens <= std::numeric_limits<int32_t>::max(),
               "there may be at most 2^31 - 1 tokens, got ", k.tokens);
  const AttentionParams a =
      packed_query(q, codes.size(1), k.side.packed.format.head_dim, scale);
  TOKRED_CHECK(a.queries >= 1, "q must have at least one query, got shape ", shape_string(q));
  QkScoreParams& s = p.score;
  s.q = a.q;
  s.k = k.window;
  s.batch = a.batch;
  s.heads_q = a.heads_q;
  s.heads_kv = a.heads_kv;
  s.queries = a.queries;
  s.keys = s.stored_keys = k.tokens;
  s.head_dim = a.head_dim;
  s.dtype = a.dtype;
  s.scale = static_cast<float>(a.scale);
  s.reduction = parse_reduction(reduce);
  s.lengths = batch_lengths(lengths, s.batch, q, "q", s.lengths_stride);
  s.mask = token_mask(mask, "mask", s.batch, s.keys, true, q, "q", s.mask_stride_batch,
                      s.mask_stride_token);
  p.k = k.side;
  TOKRED_CHECK(!lengths || length, "lengths needs length, the greatest of them");

  Backend backend(q);
  Tensor out = allocate(
      q, {s.batch, reduced_heads(s.reduction, s.heads_q, s.heads_kv), s.keys}, ScalarType::Float);
  s.out = static_cast<float*>(out.mutable_data_ptr());
  Scratch workspace(q, backend.packed_qk_score_workspace(p), Backend::kHost);
  s.workspace = workspace.data();
  backend.packed_qk_score(p);
  return out;
}

}  // namespace tokred
