// Front end of replace_token: checks and parameters.
#pragma once

#include <limits>

#include "common/overlap.h"
#include "topk/gather_tokens.h"

namespace tokred {

// t [B, H, N, ..], whose token in the slot becomes token [B, H, 1, ..].
inline ReplacedRows replaced_rows(const Tensor& t, const char* name, const Tensor& token,
                                  const char* token_name, const Tensor& slot, int64_t slots) {
  TOKRED_CHECK(t.dim() >= 3 && t.dim() <= 8 && t.size(0) == slot.size(0) &&
                   t.size(1) == slot.size(1) && t.size(2) == slots,
               name, " must be [B, H, N, ..] with the batch and heads of slot ", shape_string(slot),
               " and the ", slots, " tokens of keys, got shape ", shape_string(t));
  bool fits = token.dim() == t.dim();
  for (int64_t dim = 0; fits && dim < t.dim(); ++dim) {
    fits = token.size(dim) == (dim == 2 ? 1 : t.size(dim));
  }
  TOKRED_CHECK(fits, token_name, " must be ", name, " ", shape_string(t),
               " with one token, got shape ", shape_string(token));
  check_same_dtype(token, token_name, t, name);
  check_same_device(t, name, slot, "slot");
  check_same_device(token, token_name, slot, "slot");
  const int64_t bytes = element_bytes(t, name);
  ReplacedRows rows{};
  rows.row_bytes = token_row_bytes(t, name, 2);
  token_row_bytes(token, token_name, 2);
  rows.tokens = t.mutable_data_ptr();
  rows.stride_batch = t.stride(0) * bytes;
  rows.stride_head = t.stride(1) * bytes;
  rows.stride_token = t.stride(2) * bytes;
  rows.token = token.const_data_ptr();
  rows.token_stride_batch = token.stride(0) * bytes;
  rows.token_stride_head = token.stride(1) * bytes;
  return rows;
}

// Writes one token a head over another; see ReplaceTokenParams.
template <class Backend>
void replace_token(const Tensor& slot, Tensor keys, const Tensor& new_keys, Tensor values,
                   const Tensor& new_values, OptionalTensor position, int64_t new_position) {
  ReplaceTokenParams p{};
  check_shape(slot, "slot", {-1, -1, 1}, "[B, H, 1]");
  check_dtype(slot, "slot", ScalarType::Int);
  p.batch = slot.size(0);
  p.heads = slot.size(1);
  p.slots = keys.dim() > 2 ? keys.size(2) : 0;
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TOKRED_CHECK(p.slots <= kMax, "keys may have at most 2^31 - 1 tokens, got ", p.slots);
  p.keys = replaced_rows(keys, "keys", new_keys, "new_keys", slot, p.slots);
  p.values = replaced_rows(values, "values", new_values, "new_values", slot, p.slots);
  if (position) {
    check_shape(*position, "position", {p.batch, p.heads, p.slots}, "[B, H, N]");
    check_dtype(*position, "position", ScalarType::Int);
    check_same_device(*position, "position", slot, "slot");
    p.position = static_cast<int32_t*>(position->mutable_data_ptr());
    p.position_stride_batch = position->stride(0);
    p.position_stride_head = position->stride(1);
    p.position_stride_token = position->stride(2);
  }
  TOKRED_CHECK(new_position >= -1 && new_position <= kMax,
               "new_position must be -1 to 2^31 - 1, got ", new_position);
  p.new_position = static_cast<int32_t>(new_position);
  check_overlaps({{"keys", keys}, {"values", values}, {"position", position}},
                 {{"new_keys", new_keys}, {"new_values", new_values}, {"slot", slot}});
  p.slot = static_cast<const int32_t*>(slot.const_data_ptr());
  p.slot_stride_batch = slot.stride(0);
  p.slot_stride_head = slot.stride(1);
  if (p.batch > 0 && p.heads > 0) Backend(slot).replace_token(p);
}

}  // namespace tokred
