// Front end of compact: checks, allocation, parameters.
#pragma once

#include <cmath>

#include "topk/rows.h"

namespace tokred {

// indices i32 [.., capacity or N], counts i32 [..]; see CompactParams.
template <class Backend>
std::tuple<Tensor, Tensor> compact(const Tensor& selected, std::optional<double> threshold,
                                   std::optional<int64_t> capacity, const OptionalTensor& lengths) {
  CompactParams p{};
  p.is_bool = selected.scalar_type() == ScalarType::Bool;
  p.is_list = selected.scalar_type() == ScalarType::Int;
  TOKRED_CHECK((p.is_bool || p.is_list) != threshold.has_value(),
               "threshold must be given where selected holds scores, and only there: selected is ",
               dtype_name(selected.scalar_type()));
  TOKRED_CHECK(!threshold || !std::isnan(*threshold), "threshold must not be NaN");
  if (threshold) p.dtype = float_dtype(selected, "selected", false);
  p.selected = row_view(selected, "selected");
  p.rows = row_count(p.selected);
  p.columns = selected.size(selected.dim() - 1);
  p.capacity = capacity.value_or(p.columns);
  TOKRED_CHECK(p.capacity >= 0 && p.capacity <= std::numeric_limits<int32_t>::max(),
               "capacity must be between 0 and 2^31 - 1, got ", p.capacity);
  p.lengths = rows_beside(lengths, "lengths", ScalarType::Int, -1, p.selected, selected);
  p.threshold = static_cast<float>(threshold.value_or(0.0));
  Backend backend(selected);
  Tensor indices = allocate_rows(selected, {p.capacity}, ScalarType::Int);
  Tensor counts = allocate_rows(selected, {}, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (p.rows > 0) backend.compact(p);
  return moved(indices, counts);
}

}  // namespace tokred
