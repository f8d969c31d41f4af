// Front end of adjacent_runs: checks, allocation, parameters.
#pragma once

#include <cmath>
#include <limits>

#include "merge/params.h"
#include "tensor.h"

namespace tokred {

// ids, start, length i32 [B, N], count i32 [B], cosine f32 [B, N]; see AdjacentRunsParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adjacent_runs(
    const Tensor& x, double threshold, const OptionalTensor& y, const OptionalTensor& mask,
    int64_t max_length, int64_t num_sinks, int64_t num_locals) {
  AdjacentRunsParams p{};
  p.dtype = float_dtype(x, "x", false);
  check_dim(x, "x", 3, "[B, N, C]");
  check_last_contiguous(x, "x");
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  TOKRED_CHECK(p.tokens < std::numeric_limits<int32_t>::max(),
               "x may have at most 2^31 - 2 tokens, got ", p.tokens);
  const Tensor& later = y ? *y : x;
  check_shape(later, "y", {p.batch, p.tokens, p.channels}, "[B, N, C]");
  check_last_contiguous(later, "y");
  check_same_dtype(later, "y", x, "x");
  check_same_device(later, "y", x, "x");
  TOKRED_CHECK(!std::isnan(threshold), "threshold must be a number, got NaN");
  TOKRED_CHECK(max_length >= 0, "max_length must be at least 0, got ", max_length);
  TOKRED_CHECK(num_sinks >= 0, "num_sinks must be at least 0, got ", num_sinks);
  TOKRED_CHECK(num_locals >= 0, "num_locals must be at least 0, got ", num_locals);
  p.x = x.const_data_ptr();
  p.x_stride_batch = x.stride(0);
  p.x_stride_token = x.stride(1);
  p.y = later.const_data_ptr();
  p.y_stride_batch = later.stride(0);
  p.y_stride_token = later.stride(1);
  p.mask = token_mask(mask, "mask", p.batch, p.tokens, false, x, "x", p.mask_stride_batch,
                      p.mask_stride_token);
  p.threshold = static_cast<float>(threshold);
  // No run and no part of one is longer than the tokens.
  const auto within = [&](int64_t n) { return n < p.tokens ? n : p.tokens; };
  p.max_length = max_length == 0 ? p.tokens : within(max_length);
  p.num_sinks = within(num_sinks);
  p.num_locals = within(num_locals);

  Backend backend(x);
  const auto table = [&](ScalarType type) { return allocate(x, {p.batch, p.tokens}, type); };
  Tensor ids = table(ScalarType::Int), start = table(ScalarType::Int);
  Tensor length = table(ScalarType::Int), count = allocate(x, {p.batch}, ScalarType::Int);
  Tensor cosine = table(ScalarType::Float);
  p.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  p.start = static_cast<int32_t*>(start.mutable_data_ptr());
  p.length = static_cast<int32_t*>(length.mutable_data_ptr());
  p.count = static_cast<int32_t*>(count.mutable_data_ptr());
  p.cosine = static_cast<float*>(cosine.mutable_data_ptr());
  backend.adjacent_runs(p);
  return moved(ids, start, length, count, cosine);
}

}  // namespace tokred
