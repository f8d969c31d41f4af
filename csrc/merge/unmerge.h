// Front ends of unmerge and compose: checks, allocation, parameters.
#pragma once

#include "merge/token_map.h"

namespace tokred {

// [B, N, C]; see UnmergeParams.
template <class Backend>
Tensor unmerge(const Tensor& y, const Tensor& token_map) {
  UnmergeParams p{};
  p.dtype = float_dtype(y, "y", Backend::kDouble);
  check_dim(y, "y", 3, "[B, M, C]");
  check_last_contiguous(y, "y");
  check_dim(token_map, "token_map", 2, "[B, N]");
  p.batch = y.size(0);
  p.num_out = y.size(1);
  p.channels = y.size(2);
  p.tokens = token_map.size(1);
  check_map(token_map, "token_map", p.batch, p.tokens, y, "y");
  p.y = y.const_data_ptr();
  p.y_stride_batch = y.stride(0);
  p.y_stride_token = y.stride(1);
  p.token_map = static_cast<const int32_t*>(token_map.const_data_ptr());
  p.map_stride_batch = token_map.stride(0);
  p.map_stride_token = token_map.stride(1);
  Backend backend(y);
  Tensor x = allocate(y, {p.batch, p.tokens, p.channels}, y.scalar_type());
  p.x = x.mutable_data_ptr();
  backend.unmerge(p);
  return x;
}

// i32 [B, N]; see ComposeParams.
template <class Backend>
Tensor compose(const Tensor& second, const Tensor& first) {
  ComposeParams p{};
  check_dim(second, "second", 2, "[B, M]");
  check_dim(first, "first", 2, "[B, N]");
  p.batch = second.size(0);
  p.num_out = second.size(1);
  p.tokens = first.size(1);
  check_map(second, "second", p.batch, p.num_out, first, "first");
  check_map(first, "first", p.batch, p.tokens, second, "second");
  p.second = static_cast<const int32_t*>(second.const_data_ptr());
  p.second_stride_batch = second.stride(0);
  p.second_stride_token = second.stride(1);
  p.first = static_cast<const int32_t*>(first.const_data_ptr());
  p.first_stride_batch = first.stride(0);
  p.first_stride_token = first.stride(1);
  Backend backend(first);
  Tensor out = allocate(first, {p.batch, p.tokens}, ScalarType::Int);
  p.out = static_cast<int32_t*>(out.mutable_data_ptr());
  backend.compose(p);
  return out;
}

}  // namespace tokred
