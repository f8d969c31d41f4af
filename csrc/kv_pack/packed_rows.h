// Packed tensors among the arguments of front ends: format, rows of codes and params, slots,
// windows.
#pragma once

#include "attention/inputs.h"
#include "kv_pack/params.h"

namespace tokred {

// The arguments that say how a tensor is packed; `name` is the tensor's, for errors.
struct FormatArguments {
  const char* name;
  int64_t bits, group_size;
  std::string_view axis, scheme;
  bool rotated;
  const OptionalTensor& levels;
};

inline PackFormat pack_format(const FormatArguments& a, int64_t head_dim) {
  const std::string of = a.name;
  PackFormat f{head_dim,           a.group_size,           static_cast<int32_t>(a.bits),
               GroupAxis::channel, PackScheme::asymmetric, a.rotated};
  TOKRED_CHECK(a.bits == 1 || a.bits == 2 || a.bits == 3 || a.bits == 4 || a.bits == 8, of,
               "bits must be 1, 2, 3, 4 or 8, got ", a.bits);
  f.axis = parse_choice<GroupAxis>(a.axis, (of + "axis").c_str(),
                                   {{"channel", GroupAxis::channel}, {"token", GroupAxis::token}});
  f.scheme = parse_choice<PackScheme>(a.scheme, (of + "scheme").c_str(),
                                      {{"asymmetric", PackScheme::asymmetric},
                                       {"zero_point", PackScheme::zero_point},
                                       {"symmetric", PackScheme::symmetric},
                                       {"fp8", PackScheme::fp8},
                                       {"codebook", PackScheme::codebook}});
  TOKRED_CHECK(f.scheme != PackScheme::symmetric || a.bits >= 2, of,
               "scheme 'symmetric' needs at least 2 bits, got bits = ", a.bits);
  TOKRED_CHECK(f.scheme != PackScheme::fp8 || a.bits == 8, of, "scheme 'fp8' needs bits = 8, got ",
               a.bits);
  TOKRED_CHECK(f.scheme != PackScheme::codebook || a.bits <= 4, of,
               "scheme 'codebook' has at most 16 levels, which is 4 bits, got bits = ", a.bits);
  TOKRED_CHECK(f.scheme != PackScheme::codebook || f.axis == GroupAxis::channel, of,
               "scheme 'codebook' needs groups along channels, whose norm is the scale, got axis '",
               a.axis, "'");
  TOKRED_CHECK(
      head_dim >= kPackMultiple && head_dim <= kMaxWideDim && head_dim % kPackMultiple == 0,
      "the head dimension of a packed tensor must be a multiple of ", kPackMultiple, " up to ",
      kMaxWideDim, ", got ", head_dim);
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
               "group_size along tokens must divide the ", tokens, " tokens, got ", f.group_size);
}

// levels i8 [H | 1, 2^bits] of a codebook with so many heads, checked; `p` has its format.
inline void set_levels(PackedRows& p, const FormatArguments& a, int64_t heads, const Tensor& like,
                       const char* like_name) {
  if (!a.levels) return;
  const Tensor& levels = *a.levels;
  const std::string name = std::string(a.name) + "levels";
  TOKRED_CHECK(p.format.scheme == PackScheme::codebook, name,
               " are those of scheme 'codebook', got scheme '", a.scheme, "'");
  check_dtype(levels, name.c_str(), ScalarType::Char);
  check_shape(levels, name.c_str(), {-1, int64_t{1} << p.format.bits}, "[H | 1, 2^bits]");
  TOKRED_CHECK(levels.size(0) == heads || levels.size(0) == 1, name, " must be those of the ",
               heads, " heads or of 1, got shape ", shape_string(levels));
  check_last_contiguous(levels, name.c_str());
  check_same_device(levels, name.c_str(), like, like_name);
  p.levels = static_cast<const int8_t*>(levels.const_data_ptr());
  p.levels_stride_head = levels.size(0) == 1 ? 0 : levels.stride(0);
}

// codes and params that are known to fit the format, and levels, which are checked.
inline PackedRows rows_of(const Tensor& codes, const Tensor& params, const PackFormat& f,
                          const FormatArguments& a, const Tensor& like, const char* like_name) {
  PackedRows p{static_cast<uint8_t*>(const_cast<void*>(codes.const_data_ptr())),
               static_cast<uint16_t*>(const_cast<void*>(params.const_data_ptr())),
               codes.stride(0),
               codes.stride(1),
               codes.stride(2),
               params.stride(0),
               params.stride(1),
               params.stride(2),
               codes.size(2),
               f};
  set_levels(p, a, codes.size(1), like, like_name);
  return p;
}

// codes [B, H, S, bytes] and params [B, H, S | S / group_size, P], checked.
inline PackedRows packed_rows(const Tensor& codes, const Tensor& params, const FormatArguments& a,
                              const Tensor& like, const char* like_name) {
  const std::string of = a.name, codes_name = of + "codes", params_name = of + "params";
  check_dim(codes, codes_name.c_str(), 4, "[B, H, N, bytes of a row]");
  check_dtype(codes, codes_name.c_str(), ScalarType::Byte);
  check_last_contiguous(codes, codes_name.c_str());
  check_same_device(codes, codes_name.c_str(), like, like_name);
  check_token_count(codes, codes_name.c_str(), 2);
  const PackFormat f = pack_format(a, packed_head_dim(codes, a));
  TOKRED_CHECK(codes.size(3) == code_bytes(f.head_dim, f.bits), codes_name, " has rows of ",
               codes.size(3), " bytes, which no head dimension has in ", f.bits, " bits");
  check_params_row(f, of, codes.size(2));
  const int64_t rows = f.axis == GroupAxis::token ? codes.size(2) / f.group_size : codes.size(2);
  check_shape(params, params_name.c_str(), {codes.size(0), codes.size(1), rows, params_per_row(f)},
              f.axis == GroupAxis::token ? "[B, H, N / group_size, scales and offsets]"
                                         : "[B, H, N, scales and offsets]");
  check_dtype(params, params_name.c_str(), ScalarType::Half);
  check_last_contiguous(params, params_name.c_str());
  check_same_device(params, params_name.c_str(), like, like_name);
  return rows_of(codes, params, f, a, like, like_name);
}

// slots i32 [B, capacity] into a pool, or the rows themselves; see SlotTable.
inline SlotTable slot_table(const OptionalTensor& slots, int64_t batch, const PackedRows& packed,
                            const Tensor& codes, const char* name) {
  TOKRED_CHECK(codes.size(0) == (slots ? 1 : batch), name, " must have the batch size ",
               slots ? 1 : batch, slots ? " of a pool, as slots are given," : "", " got shape ",
               shape_string(codes));
  if (!slots) return {nullptr, 0, packed.rows};
  check_slots(*slots, batch, "[B, capacity]", codes, name);
  return {static_cast<const int32_t*>(slots->const_data_ptr()), slots->stride(0), slots->size(1)};
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

}  // namespace tokred
