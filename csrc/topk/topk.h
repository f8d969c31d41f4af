// Front end of topk: checks, allocation, parameters.
#pragma once

#include <algorithm>
#include <cmath>

#include "topk/rows.h"

namespace tokred {

inline RowOrder parse_row_order(std::string_view name) {
  return parse_choice<RowOrder>(name, "order",
                                {{"score", RowOrder::score}, {"position", RowOrder::position}});
}

// values f32 [.., k], indices i32 [.., k], counts i32 [..], with block_size > 0 a dimension of
// segments before the last; see TopkParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& scores, int64_t k,
                                        const OptionalTensor& lengths, const Text& order,
                                        const OptionalTensor& row_k, int64_t num_sinks,
                                        int64_t num_locals, const OptionalTensor& must_keep,
                                        std::optional<double> top_p, int64_t min_k,
                                        std::optional<double> threshold, int64_t block_size) {
  TopkParams p{};
  p.dtype = float_dtype(scores, "scores", false);
  p.scores = row_view(scores, "scores");
  p.order = parse_row_order(order);
  TOKRED_CHECK(k >= 0 && k <= std::numeric_limits<int32_t>::max(),
               "k must be between 0 and 2^31 - 1, got ", k);
  TOKRED_CHECK(num_sinks >= 0, "num_sinks must be at least 0, got ", num_sinks);
  TOKRED_CHECK(num_locals >= 0, "num_locals must be at least 0, got ", num_locals);
  TOKRED_CHECK(min_k >= 0, "min_k must be at least 0, got ", min_k);
  TOKRED_CHECK(block_size >= 0, "block_size must be at least 0 (0: no blocks), got ", block_size);
  TOKRED_CHECK(!top_p || std::isfinite(*top_p), "top_p must be finite, got ", *top_p);
  TOKRED_CHECK(!threshold || !std::isnan(*threshold), "threshold must not be NaN");
  p.rows = row_count(p.scores);
  p.columns = scores.size(scores.dim() - 1);
  p.k = k;
  p.lengths = rows_beside(lengths, "lengths", ScalarType::Int, -1, p.scores, scores);
  p.row_k = rows_beside(row_k, "row_k", ScalarType::Int, -1, p.scores, scores);
  p.must_keep = rows_beside(must_keep, "must_keep", ScalarType::Bool, p.columns, p.scores, scores);
  p.block_size = std::min(block_size, std::max<int64_t>(p.columns, 1));
  p.segments =
      block_size > 0 ? std::max<int64_t>(1, (p.columns + p.block_size - 1) / p.block_size) : 1;
  p.num_sinks = std::min(num_sinks, p.columns);
  p.num_locals = std::min(num_locals, p.columns);
  p.has_top_p = top_p.has_value();
  p.top_p = top_p.value_or(0.0);
  p.min_k = std::min(min_k, p.columns);
  p.has_threshold = threshold.has_value();
  p.threshold = static_cast<float>(threshold.value_or(0.0));

  Backend backend(scores);
  const auto output = [&](ScalarType type) {
    return block_size > 0 ? allocate_rows(scores, {p.segments, k}, type)
                          : allocate_rows(scores, {k}, type);
  };
  Tensor values = output(ScalarType::Float), indices = output(ScalarType::Int);
  Tensor counts = block_size > 0 ? allocate_rows(scores, {p.segments}, ScalarType::Int)
                                 : allocate_rows(scores, {}, ScalarType::Int);
  p.values = static_cast<float*>(values.mutable_data_ptr());
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (p.rows > 0) {
    Scratch workspace(scores, backend.topk_workspace(p), Backend::kHost);
    p.workspace = workspace.data();
    backend.topk(p);
  }
  return moved(values, indices, counts);
}

}  // namespace tokred
