// Front end of inverse_transform_sample: checks, allocation, parameters.
#pragma once

#include "topk/rows.h"

namespace tokred {

// indices i32 [.., num_samples], counts i32 [..]; see InverseTransformParams.
template <class Backend>
std::tuple<Tensor, Tensor> inverse_transform_sample(const Tensor& scores, int64_t num_samples,
                                                    const OptionalTensor& mask) {
  InverseTransformParams p{};
  p.dtype = float_dtype(scores, "scores", false);
  p.scores = row_view(scores, "scores");
  p.rows = row_count(p.scores);
  p.columns = scores.size(scores.dim() - 1);
  p.mask = rows_beside(mask, "mask", ScalarType::Bool, p.columns, p.scores, scores);
  TOKRED_CHECK(num_samples >= 0 && num_samples <= std::numeric_limits<int32_t>::max(),
               "num_samples must be between 0 and 2^31 - 1, got ", num_samples);
  p.num_samples = num_samples;
  Backend backend(scores);
  Tensor indices = allocate_rows(scores, {num_samples}, ScalarType::Int);
  Tensor counts = allocate_rows(scores, {}, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (p.rows > 0) {
    Scratch workspace(scores, backend.inverse_transform_sample_workspace(p), Backend::kHost);
    p.workspace = workspace.data();
    backend.inverse_transform_sample(p);
  }
  return moved(indices, counts);
}

}  // namespace tokred
