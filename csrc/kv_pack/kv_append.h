// Front end of kv_append: checks, allocation, parameters.
#pragma once

#include <algorithm>
#include <limits>

#include "common/overlap.h"
#include "kv_pack/packed_rows.h"

namespace tokred {

// Along tokens the window has to hold whole groups; see packed_tokens().
inline void check_ring(const PackFormat& f, const char* name, int64_t rows) {
  TOKRED_CHECK(f.axis == GroupAxis::channel || (rows > 0 && rows % f.group_size == 0), name,
               " must hold a multiple of the ", f.group_size,
               " tokens of a group along tokens, got ", rows);
}

// Grows a cache in place; see KvAppendParams.
template <class Backend>
void kv_append(const Tensor& x, Tensor codes, Tensor params, OptionalTensor window, int64_t length,
               int64_t bits, int64_t group_size, const Text& axis, const Text& scheme, bool rotated,
               const OptionalTensor& lengths, const OptionalTensor& slots,
               const OptionalTensor& levels) {
  KvAppendParams p{};
  check_dim(x, "x", 4, "[B, H, L, D]");
  p.dtype = float_dtype(x, "x", false);
  check_last_contiguous(x, "x");
  check_token_count(x, "x", 2);
  p.packed =
      packed_rows(codes, params, {"", bits, group_size, axis, scheme, rotated, levels}, x, "x");
  const PackFormat& f = p.packed.format;
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  check_shape(x, "x", {-1, codes.size(1), -1, f.head_dim}, "[B, H, L, D]");
  p.slots = slot_table(slots, p.batch, p.packed, codes, "codes");
  p.window = window_rows(window, "window", p.batch, p.heads, f, x, "x", p.window_rows);
  check_ring(f, "window", p.window_rows);
  TOKRED_CHECK(length >= 0, "length must be at least 0, got ", length);
  constexpr int64_t kLongest = std::numeric_limits<int64_t>::max() - (int64_t{1} << 31);
  const int64_t after = std::min(length, kLongest) + p.tokens;
  const int64_t packed_after = packed_tokens(f.axis, p.window_rows, after);
  TOKRED_CHECK(packed_after <= p.slots.capacity, "the cache has room for ", p.slots.capacity,
               " packed tokens, but length + ", p.tokens, " = ", after, " tokens need ",
               packed_after, "; nothing was appended");
  p.length = length;
  p.lengths = batch_lengths(lengths, p.batch, x, "x", p.lengths_stride);
  check_overlaps({{"codes", codes}, {"params", params}, {"window", window}},
                 {{"x", x}, {"lengths", lengths}, {"slots", slots}, {"levels", levels}});
  p.x = head_tensor(x);
  if (p.batch == 0 || p.heads == 0 || p.tokens == 0) return;
  Backend(x).kv_append(p);
}

}  // namespace tokred
