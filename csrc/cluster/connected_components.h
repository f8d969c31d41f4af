// Front end of connected_components: checks, allocation, parameters.
#pragma once

#include <cmath>

#include "cluster/params.h"
#include "tensor.h"

namespace tokred {

// labels i32 [B, H * W], counts i32 [B]; see ConnectedComponentsParams.
template <class Backend>
std::tuple<Tensor, Tensor> connected_components(const Tensor& x, double threshold,
                                                const Text& metric, const OptionalTensor& mask) {
  ConnectedComponentsParams p{};
  check_dim(x, "x", 4, "[B, H, W, C]");
  p.dtype = float_dtype(x, "x", false);
  check_last_contiguous(x, "x");
  TOKRED_CHECK(!std::isnan(threshold), "threshold must not be NaN");
  p.metric =
      parse_choice<Metric>(metric, "metric", {{"l2", Metric::l2}, {"cosine", Metric::cosine}});
  p.threshold = static_cast<float>(threshold);
  p.x = x.const_data_ptr();
  p.batch = x.size(0);
  p.height = x.size(1);
  p.width = x.size(2);
  p.channels = x.size(3);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TOKRED_CHECK(p.width == 0 || p.height <= kMax / p.width,
               "x may have at most 2^31 - 1 tokens in a grid, got shape ", shape_string(x));
  p.stride_batch = x.stride(0);
  p.stride_row = x.stride(1);
  p.stride_column = x.stride(2);
  const int64_t tokens = p.height * p.width;
  p.mask = token_mask(mask, "mask", p.batch, tokens, false, x, "x", p.mask_stride_batch,
                      p.mask_stride_token);
  Backend backend(x);
  Tensor labels = allocate(x, {p.batch, tokens}, ScalarType::Int);
  Tensor counts = allocate(x, {p.batch}, ScalarType::Int);
  Scratch workspace(x, backend.connected_components_workspace(p), Backend::kHost);
  p.labels = static_cast<int32_t*>(labels.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0) backend.connected_components(p);
  return moved(labels, counts);
}

}  // namespace tokred
