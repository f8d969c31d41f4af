// Inputs that attention and scores on packed keys share: a side of a cache, and the queries.
#pragma once

#include "attention/inputs.h"
#include "kv_pack/packed_rows.h"
#include "packed_attn/params.h"

namespace tokred {

// One side of a cache, its window, and how many tokens an item may have on it at most.
struct SideInputs {
  PackedSide side;
  HeadTensor window;
  int64_t tokens;
};

// `length` is that of a cache; without it all rows are tokens, and those of the window follow.
inline SideInputs packed_side(const Tensor& codes, const Tensor& params, const FormatArguments& a,
                              const OptionalTensor& window, const char* window_name,
                              std::optional<int64_t> length, int64_t heads_kv, const Tensor& q,
                              SlotTable* slots, const OptionalTensor& slot_ids) {
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

// The params of queries of packed keys; p.keys, the tokens, are still to be set.
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

}  // namespace tokred
