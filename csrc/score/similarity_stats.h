// Front end of similarity_stats, statistics of the rows of a similarity matrix that is never
// stored.
#pragma once

#include <cmath>

#include "score/transition_stats.h"

namespace tokred {

inline SimilarityStatsParams similarity_inputs(const Tensor& a, const Tensor& b,
                                               const OptionalTensor& mask_a,
                                               const OptionalTensor& mask_b) {
  SimilarityStatsParams p{};
  p.dtype = float_dtype(a, "a", false);
  check_tokens(a, "a", a, "a");
  check_tokens(b, "b", a, "a");
  TOKRED_CHECK(a.size(0) == b.size(0) && a.size(2) == b.size(2),
               "b must have the batch and channel sizes of a ", shape_string(a), ", got shape ",
               shape_string(b));
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.a_stride_batch = a.stride(0);
  p.a_stride_token = a.stride(1);
  p.b_stride_batch = b.stride(0);
  p.b_stride_token = b.stride(1);
  p.mask_a = token_mask(mask_a, "mask_a", a.size(0), a.size(1), false, a, "a",
                        p.mask_a_stride_batch, p.mask_a_stride_token);
  p.mask_b = token_mask(mask_b, "mask_b", b.size(0), b.size(1), false, a, "a",
                        p.mask_b_stride_batch, p.mask_b_stride_token);
  p.batch = a.size(0);
  p.rows = a.size(1);
  p.columns = b.size(1);
  p.channels = a.size(2);
  return p;
}

// mean, variance, largest f32, index, count i32, energy f32, all [B, Na]; see
// SimilarityStatsParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_stats(
    const Tensor& a, const Tensor& b, const Text& metric, double threshold, const Text& energy,
    double margin, bool exclude_self, int64_t block_size, const OptionalTensor& mask_a,
    const OptionalTensor& mask_b) {
  SimilarityStatsParams p = similarity_inputs(a, b, mask_a, mask_b);
  p.metric = parse_metric(metric);
  p.energy_kind = parse_choice<Energy>(
      energy, "energy",
      {{"none", Energy::none}, {"elu", Energy::elu}, {"gaussian", Energy::gaussian}});
  TOKRED_CHECK(!std::isnan(threshold), "threshold must not be NaN");
  TOKRED_CHECK(std::isfinite(margin), "margin must be finite, got ", margin);
  TOKRED_CHECK(p.energy_kind != Energy::gaussian || margin < 1,
               "margin must be below 1 for the gaussian energy, got ", margin);
  TOKRED_CHECK(block_size >= 0, "block_size must be at least 0 (0: no blocks), got ", block_size);
  p.threshold = static_cast<float>(threshold);
  p.margin = static_cast<float>(margin);
  p.exclude_self = exclude_self;
  p.block_size = std::min(block_size, std::max(p.rows, p.columns));
  Backend backend(a);
  const auto output = [&](ScalarType type) { return allocate(a, {p.batch, p.rows}, type); };
  Tensor mean = output(ScalarType::Float), variance = output(ScalarType::Float);
  Tensor largest = output(ScalarType::Float), index = output(ScalarType::Int);
  Tensor count = output(ScalarType::Int), energies = output(ScalarType::Float);
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.variance = static_cast<float*>(variance.mutable_data_ptr());
  p.largest = static_cast<float*>(largest.mutable_data_ptr());
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.count = static_cast<int32_t*>(count.mutable_data_ptr());
  p.energy = static_cast<float*>(energies.mutable_data_ptr());
  if (p.batch > 0 && p.rows > 0) {
    Scratch workspace(a, backend.similarity_stats_workspace(p), Backend::kHost);
    p.workspace = workspace.data();
    backend.similarity_stats(p);
  }
  return moved(mean, variance, largest, index, count, energies);
}

}  // namespace tokred
