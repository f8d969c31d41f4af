// Front ends of the packing ops: checks, allocation, parameters. Compiled for every backend.
#pragma once

#include <algorithm>

#include "attention/inputs.h"
#include "common/overlap.h"
#include "kv_pack/params.h"

namespace tokred {

// How a tensor is or becomes packed, as callers say it: `name` says whose these arguments are.
struct FormatArguments {
  const char* name;
  int64_t bits, group_size;
  std::string_view axis, scheme;
  bool rotated;
};

inline PackFormat pack_format(const FormatArguments& a, int64_t head_dim) {
  const std::string of = a.name;
  PackFormat f{head_dim, a.group_size, static_cast<int32_t>(a.bits), GroupAxis::channel,
               PackScheme::asymmetric, a.rotated};
  TOKRED_CHECK(a.bits == 1 || a.bits == 2 || a.bits == 3 || a.bits == 4 || a.bits == 8, of,
               "bits must be 1, 2, 3, 4 or 8, got ", a.bits);
  f.axis = parse_choice<GroupAxis>(
      a.axis, (of + "axis").c_str(),
      {{"channel", GroupAxis::channel}, {"token", GroupAxis::token}});
  f.scheme = parse_choice<PackScheme>(a.scheme, (of + "scheme").c_str(),
                                      {{"asymmetric", PackScheme::asymmetric},
                                       {"zero_point", PackScheme::zero_point},
                                       {"symmetric", PackScheme::symmetric},
                                       {"fp8", PackScheme::fp8}});
  TOKRED_CHECK(f.scheme != PackScheme::symmetric || a.bits >= 2, of,
               "scheme 'symmetric' needs at least 2 bits, got bits = ", a.bits);
  TOKRED_CHECK(f.scheme != PackScheme::fp8 || a.bits == 8, of,
               "scheme 'fp8' needs bits = 8, got ", a.bits);
  TOKRED_CHECK(head_dim >= kPackMultiple && head_dim <= kMaxHeadDim &&
                   head_dim % kPackMultiple == 0,
               "the head dimension of a packed tensor must be a multiple of ", kPackMultiple,
               " up to ", kMaxHeadDim, ", got ", head_dim);
  TOKRED_CHECK(a.group_size >= 1, of, "group_size must be at least 1, got ", a.group_size);
  TOKRED_CHECK(f.axis == GroupAxis::token ||
                   (a.group_size % kPackMultiple == 0 && head_dim % a.group_size == 0),
               of, "group_size along channels must be a multiple of ", kPackMultiple,
               " that divides the head dimension ", head_dim, ", got ", a.group_size);
  return f;
}

// The head dimension that rows of so many bytes hold.
inline int64_t packed_head_dim(const Tensor& codes, const FormatArguments& a) {
  return a.bits > 0 ? codes.size(3) * 8 / a.bits : 0;
}

inline void check_params_row(const PackFormat& f, const std::string& of, int64_t tokens) {
  TOKRED_CHECK(f.axis == GroupAxis::channel || tokens % f.group_size == 0, of,
               "group_size along tokens must divide the ", tokens, " tokens, got ",
               f.group_size);
}

// codes [B, H, S, bytes] and params [B, H, S | S / group_size, P], checked.
inline PackedRows packed_rows(const Tensor& codes, const Tensor& params,
                              const FormatArguments& a, const Tensor& like,
                              const char* like_name) {
  const std::string of = a.name, codes_name = of + "codes", params_name = of + "params";
  check_dim(codes, codes_name.c_str(), 4, "[B, H, N, bytes of a row]");
  check_dtype(codes, codes_name.c_str(), ScalarType::Byte);
  check_last_contiguous(codes, codes_name.c_str());
  check_same_device(codes, codes_name.c_str(), like, like_name);
  check_token_count(codes, codes_name.c_str(), 2);
  const PackFormat f = pack_format(a, packed_head_dim(codes, a));
  TOKRED_CHECK(codes.size(3) == code_bytes(f.head_dim, f.bits), codes_name,
               " has rows of ", codes.size(3), " bytes, which no head dimension has in ", f.bits,
               " bits");
  check_params_row(f, of, codes.size(2));
  const int64_t rows = f.axis == GroupAxis::token ? codes.size(2) / f.group_size : codes.size(2);
  check_shape(params, params_name.c_str(),
              {codes.size(0), codes.size(1), rows, params_per_row(f)},
              f.axis == GroupAxis::token ? "[B, H, N / group_size, scales and offsets]"
                                         : "[B, H, N, scales and offsets]");
  check_dtype(params, params_name.c_str(), ScalarType::Half);
  check_last_contiguous(params, params_name.c_str());
  check_same_device(params, params_name.c_str(), like, like_name);
  return {static_cast<uint8_t*>(const_cast<void*>(codes.const_data_ptr())),
          static_cast<uint16_t*>(const_cast<void*>(params.const_data_ptr())),
          codes.stride(0), codes.stride(1), codes.stride(2),
          params.stride(0), params.stride(1), params.stride(2), codes.size(2), f};
}

// slots i32 [B, capacity] into a pool, or the rows themselves; see SlotTable.
inline SlotTable slot_table(const OptionalTensor& slots, int64_t batch, const PackedRows& packed,
                            const Tensor& codes, const char* name) {
  TOKRED_CHECK(codes.size(0) == (slots ? 1 : batch), name, " must have the batch size ",
               slots ? 1 : batch, slots ? " of a pool, as slots are given," : "",
               " got shape ", shape_string(codes));
  if (!slots) return {nullptr, 0, packed.rows};
  check_slots(*slots, batch, "[B, capacity]", codes, name);
  return {static_cast<const int32_t*>(slots->const_data_ptr()), slots->stride(0),
          slots->size(1)};
}

// Rows in full precision beside packed ones: [B, H, W, D]; null data where there are none.
inline HeadTensor window_rows(const OptionalTensor& window, const char* name, int64_t batch,
                              int64_t heads, const PackFormat& f, const Tensor& like,
                              const char* like_name, int64_t& rows) {
  rows = 0;
  if (!window) return {};
  check_shape(*window, name, {batch, heads, -1, f.head_dim}, "[B, H, W, D]");
  check_same_dtype(*window, name, like, like_name);
  check_same_device(*window, name, like, like_name);
  check_last_contiguous(*window, name);
  check_token_count(*window, name, 2);
  rows = window->size(2);
  return head_tensor(*window);
}

// Only of windows that fill up as packed_tokens() says.
inline void check_ring(const PackFormat& f, const char* name, int64_t rows) {
  TOKRED_CHECK(f.axis == GroupAxis::channel || (rows > 0 && rows % f.group_size == 0), name,
               " must hold a multiple of the ", f.group_size,
               " tokens of a group along tokens, got ", rows);
}

// codes u8 [B, H, N, bytes], params f16; see KvPackParams.
template <class Backend>
std::tuple<Tensor, Tensor> kv_pack(const Tensor& x, int64_t bits, int64_t group_size,
                                   const Text& axis, const Text& scheme, bool rotate) {
  check_dim(x, "x", 4, "[B, H, N, D]");
  KvPackParams p{};
  p.dtype = float_dtype(x, "x", false);
  check_last_contiguous(x, "x");
  check_token_count(x, "x", 2);
  const PackFormat f = pack_format({"", bits, group_size, axis, scheme, rotate}, x.size(3));
  check_params_row(f, "", x.size(2));
  p.x = head_tensor(x);
  p.batch = x.size(0);
  p.heads = x.size(1);
  const int64_t tokens = x.size(2);
  const int64_t rows = f.axis == GroupAxis::token ? tokens / f.group_size : tokens;
  Backend backend(x);
  Tensor codes =
      allocate(x, {p.batch, p.heads, tokens, code_bytes(f.head_dim, bits)}, ScalarType::Byte);
  Tensor params = allocate(x, {p.batch, p.heads, rows, params_per_row(f)}, ScalarType::Half);
  p.packed = {static_cast<uint8_t*>(codes.mutable_data_ptr()),
              static_cast<uint16_t*>(params.mutable_data_ptr()),
              codes.stride(0), codes.stride(1), codes.stride(2),
              params.stride(0), params.stride(1), params.stride(2), tokens, f};
  backend.will_write(p.packed.codes, p.batch * codes.stride(0));
  backend.kv_pack(p);
  return {codes, params};
}

// [B, H, N, D] in `dtype`; see KvUnpackParams.
template <class Backend>
Tensor kv_unpack(const Tensor& codes, const Tensor& params, int64_t bits, int64_t group_size,
                 const Text& axis, const Text& scheme, bool rotated,
                 const Text& dtype) {
  KvUnpackParams p{};
  p.packed = packed_rows(codes, params, {"", bits, group_size, axis, scheme, rotated}, codes,
                         "codes");
  p.dtype = parse_choice<DType>(
      dtype, "dtype",
      {{"float32", DType::f32}, {"float16", DType::f16}, {"bfloat16", DType::bf16}});
  p.batch = codes.size(0);
  p.heads = codes.size(1);
  Backend backend(codes);
  const ScalarType type = p.dtype == DType::f32   ? ScalarType::Float
                          : p.dtype == DType::f16 ? ScalarType::Half
                                                  : ScalarType::BFloat16;
  Tensor out = allocate(codes, {p.batch, p.heads, p.packed.rows, p.packed.format.head_dim}, type);
  p.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  backend.will_write(out.mutable_data_ptr(),
                     (p.dtype == DType::f32 ? 4 : 2) * p.batch * out.stride(0));
  backend.kv_unpack(p);
  return out;
}

// The same into a tensor that is there.
template <class Backend>
void kv_unpack_into(const Tensor& codes, const Tensor& params, int64_t bits, int64_t group_size,
                    const Text& axis, const Text& scheme, bool rotated, Tensor out) {
  KvUnpackParams p{};
  p.packed = packed_rows(codes, params, {"", bits, group_size, axis, scheme, rotated}, codes,
                         "codes");
  p.batch = codes.size(0);
  p.heads = codes.size(1);
  const int64_t tokens = p.packed.rows, head_dim = p.packed.format.head_dim;
  check_shape(out, "out", {p.batch, p.heads, tokens, head_dim}, "[B, H, N, D]");
  p.dtype = float_dtype(out, "out", false);
  check_same_device(out, "out", codes, "codes");
  check_last_contiguous(out, "out");
  TOKRED_CHECK(tokens <= 1 || out.stride(2) == head_dim,
               "out must have the tokens of a head without gaps, ", head_dim,
               " numbers apart, got stride ", out.stride(2));
  check_overlaps({{"out", out}}, {{"codes", codes}, {"params", params}});
  p.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  if (p.batch == 0 || p.heads == 0 || tokens == 0) return;
  Backend(codes).kv_unpack(p);
}

// Grows a cache in place; see KvAppendParams.
template <class Backend>
void kv_append(const Tensor& x, Tensor codes, Tensor params, OptionalTensor window,
               int64_t length, int64_t bits, int64_t group_size, const Text& axis,
               const Text& scheme, bool rotated, const OptionalTensor& lengths,
               const OptionalTensor& slots) {
  KvAppendParams p{};
  check_dim(x, "x", 4, "[B, H, L, D]");
  p.dtype = float_dtype(x, "x", false);
  check_last_contiguous(x, "x");
  check_token_count(x, "x", 2);
  p.packed = packed_rows(codes, params, {"", bits, group_size, axis, scheme, rotated}, x, "x");
  const PackFormat& f = p.packed.format;
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  check_shape(x, "x", {-1, codes.size(1), -1, f.head_dim}, "[B, H, L, D]");
  p.slots = slot_table(slots, p.batch, p.packed, codes, "codes");
  p.window =
      window_rows(window, "window", p.batch, p.heads, f, x, "x", p.window_rows);
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
                 {{"x", x}, {"lengths", lengths}, {"slots", slots}});
  p.x = head_tensor(x);
  if (p.batch == 0 || p.heads == 0 || p.tokens == 0) return;
  Backend(x).kv_append(p);
}

}  // namespace tokred
