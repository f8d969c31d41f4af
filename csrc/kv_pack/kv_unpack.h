// Front ends of kv_unpack and kv_unpack_into: checks, allocation, parameters.
#pragma once

#include "common/overlap.h"
#include "kv_pack/packed_rows.h"

namespace tokred {

// [B, H, N, D] in `dtype`; see KvUnpackParams.
template <class Backend>
Tensor kv_unpack(const Tensor& codes, const Tensor& params, int64_t bits, int64_t group_size,
                 const Text& axis, const Text& scheme, bool rotated, const Text& dtype,
                 const OptionalTensor& levels) {
  KvUnpackParams p{};
  p.packed = packed_rows(codes, params, {"", bits, group_size, axis, scheme, rotated, levels},
                         codes, "codes");
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
  backend.kv_unpack(p);
  return out;
}

// The same into a given tensor.
template <class Backend>
void kv_unpack_into(const Tensor& codes, const Tensor& params, int64_t bits, int64_t group_size,
                    const Text& axis, const Text& scheme, bool rotated, const Tensor& out,
                    const OptionalTensor& levels) {
  KvUnpackParams p{};
  p.packed = packed_rows(codes, params, {"", bits, group_size, axis, scheme, rotated, levels},
                         codes, "codes");
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
  check_overlaps({{"out", out}}, {{"codes", codes}, {"params", params}, {"levels", levels}});
  p.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  if (p.batch == 0 || p.heads == 0 || tokens == 0) return;
  Backend(codes).kv_unpack(p);
}

}  // namespace tokred
