// Front end of kv_pack: checks, allocation, parameters.
#pragma once

#include "kv_pack/packed_rows.h"

namespace tokred {

// codes u8 [B, H, N, bytes], params f16; see KvPackParams.
template <class Backend>
std::tuple<Tensor, Tensor> kv_pack(const Tensor& x, int64_t bits, int64_t group_size,
                                   const Text& axis, const Text& scheme, bool rotate,
                                   const OptionalTensor& levels) {
  check_dim(x, "x", 4, "[B, H, N, D]");
  KvPackParams p{};
  p.dtype = float_dtype(x, "x", false);
  check_last_contiguous(x, "x");
  check_token_count(x, "x", 2);
  const FormatArguments format{"", bits, group_size, axis, scheme, rotate, levels};
  const PackFormat f = pack_format(format, x.size(3));
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
  p.packed = rows_of(codes, params, f, format, x, "x");
  backend.kv_pack(p);
  return moved(codes, params);
}

}  // namespace tokred
