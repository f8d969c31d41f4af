// Front end of match: checks, allocation, parameters.
#pragma once

#include <algorithm>

#include "match/params.h"
#include "tensor.h"

namespace tokred {

// score f32 [B, Na], index i32 [B, Na], with k > 1 [B, Na, k]; see MatchParams.
template <class Backend>
std::tuple<Tensor, Tensor> match(const Tensor& a, const Tensor& b, const OptionalTensor& mask_a,
                                 const OptionalTensor& mask_b, const OptionalTensor& weight_a,
                                 const OptionalTensor& weight_b, const Text& metric, int64_t band,
                                 int64_t k) {
  MatchParams p{};
  p.metric = parse_metric(metric);
  p.dtype = float_dtype(a, "a", false);
  p.a = token_set(a, "a", mask_a, "mask_a", weight_a, "weight_a");
  p.b = token_set(b, "b", mask_b, "mask_b", weight_b, "weight_b");
  check_same_dtype(b, "b", a, "a");
  check_same_device(b, "b", a, "a");
  TOKRED_CHECK(a.size(0) == b.size(0) && a.size(2) == b.size(2),
               "b must have the batch and channel sizes of a ", shape_string(a), ", got shape ",
               shape_string(b));
  TOKRED_CHECK(band >= -1, "band must be -1 (no limit) or at least 0, got ", band);
  TOKRED_CHECK(k >= 1 && k <= std::numeric_limits<int32_t>::max(),
               "k must be between 1 and 2^31 - 1, got ", k);
  p.batch = a.size(0);
  p.channels = a.size(2);
  p.k = k;
  p.band = std::min(band, std::max(p.a.count, p.b.count));

  Backend backend(a);
  const int64_t shape[] = {p.batch, p.a.count, k};
  const int64_t dims = k > 1 ? 3 : 2;
  Tensor score = allocate(a, shape, dims, ScalarType::Float);
  Tensor index = allocate(a, shape, dims, ScalarType::Int);
  Scratch workspace(a, backend.match_workspace(p), Backend::kHost);
  p.score = static_cast<float*>(score.mutable_data_ptr());
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0 && p.a.count > 0) backend.match(p);
  return moved(score, index);
}

}  // namespace tokred
