// Front ends of the match stem: checks, allocation, parameters. Compiled for every backend.
#pragma once

#include <algorithm>
#include <limits>

#include "match/params.h"
#include "tensor.h"

namespace tokred {

inline Order parse_order(std::string_view name) {
  return parse_choice<Order>(name, "order", {{"tome", Order::tome}, {"position", Order::position}});
}

// All tokens of x [B, N, C] as a set; callers narrow it to their rows.
inline TokenSet token_set(const Tensor& x, const char* name, const OptionalTensor& mask,
                          const char* mask_name, const OptionalTensor& weight,
                          const char* weight_name) {
  check_dim(x, name, 3, "[B, N, C]");
  check_last_contiguous(x, name);
  TOKRED_CHECK(x.size(1) <= std::numeric_limits<int32_t>::max(), name,
               " may have at most 2^31 - 1 tokens, got ", x.size(1));
  TokenSet set{};
  set.data = x.const_data_ptr();
  set.stride_batch = x.stride(0);
  set.stride_token = x.stride(1);
  set.tokens = set.count = x.size(1);
  set.step = 1;
  set.mask = token_mask(mask, mask_name, x.size(0), x.size(1), false, x, name,
                        set.mask_stride_batch, set.mask_stride_token);
  if (weight) {
    check_shape(*weight, weight_name, {x.size(0), x.size(1)}, "[B, N]");
    check_dtype(*weight, weight_name, ScalarType::Float);
    check_same_device(*weight, weight_name, x, name);
    set.weight = static_cast<const float*>(weight->const_data_ptr());
    set.weight_stride_batch = weight->stride(0);
    set.weight_stride_token = weight->stride(1);
  }
  return set;
}

// Narrows a set to the rows listed in i32 [n] or [B | 1, n].
inline void use_rows(TokenSet& set, const Tensor& rows, const char* name, const Tensor& like,
                     int64_t batch) {
  TOKRED_CHECK(rows.dim() == 1 || rows.dim() == 2, name,
               " must be [n] or [B | 1, n], got shape ", shape_string(rows));
  check_dtype(rows, name, ScalarType::Int);
  check_same_device(rows, name, like, "metric");
  check_last_contiguous(rows, name);
  TOKRED_CHECK(rows.dim() == 1 || rows.size(0) == 1 || rows.size(0) == batch, name,
               " must have the batch size ", batch, " or 1 in dimension 0, got shape ",
               shape_string(rows));
  set.rows = static_cast<const int32_t*>(rows.const_data_ptr());
  set.rows_stride_batch = rows.dim() == 2 ? broadcast_stride(rows, 0) : 0;
  set.count = rows.size(rows.dim() - 1);
}

// score f32 [B, Na], index i32 [B, Na]; see MatchParams.
template <class Backend>
std::tuple<Tensor, Tensor> match(const Tensor& a, const Tensor& b, const OptionalTensor& mask_a,
                                 const OptionalTensor& mask_b, const OptionalTensor& weight_a,
                                 const OptionalTensor& weight_b, const Text& metric,
                                 int64_t band) {
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
  p.batch = a.size(0);
  p.channels = a.size(2);
  p.band = std::min(band, std::max(p.a.count, p.b.count));

  Backend backend(a);
  Tensor score = allocate(a, {p.batch, p.a.count}, ScalarType::Float);
  Tensor index = allocate(a, {p.batch, p.a.count}, ScalarType::Int);
  Scratch workspace(a, backend.match_workspace(p), Backend::kHost);
  p.score = static_cast<float*>(score.mutable_data_ptr());
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0 && p.a.count > 0) backend.match(p);
  return {score, index};
}

// The two sides of a bipartite matching over metric [B, N, C]: the listed rows, or ToMe's sets,
// even positions against odd ones after the prefix.
inline void bipartite_sets(BipartiteParams& p, const Tensor& metric, const OptionalTensor& mask,
                           const OptionalTensor& sources, const OptionalTensor& destinations) {
  const TokenSet all = token_set(metric, "metric", mask, "mask", std::nullopt, "weight");
  MatchParams& m = p.match;
  m.a = m.b = all;
  if (sources) {
    use_rows(m.a, *sources, "sources", metric, m.batch);
    use_rows(m.b, *destinations, "destinations", metric, m.batch);
    p.r = std::min(p.r, m.a.count);
    return;
  }
  const int64_t prefix = std::min(p.num_prefix, p.tokens);
  m.a.first = prefix + prefix % 2;
  m.b.first = prefix + (prefix + 1) % 2;
  m.a.step = m.b.step = 2;
  m.a.count = std::max<int64_t>(0, (p.tokens - m.a.first + 1) / 2);
  m.b.count = std::max<int64_t>(0, (p.tokens - m.b.first + 1) / 2);
  p.r = std::min(p.r, (p.tokens - prefix) / 2);
}

// token_map i32 [B, N]; num_out i32 [B] where by_threshold.
template <class Backend>
std::pair<Tensor, Tensor> run_bipartite(BipartiteParams& p, const Tensor& metric,
                                        const Text& order, const OptionalTensor& mask,
                                        const OptionalTensor& sources,
                                        const OptionalTensor& destinations) {
  MatchParams& m = p.match;
  p.order = parse_order(order);
  m.metric = Metric::cosine;
  m.band = -1;
  m.dtype = float_dtype(metric, "metric", false);
  check_dim(metric, "metric", 3, "[B, N, C]");
  TOKRED_CHECK(p.num_prefix >= 0, "num_prefix must be at least 0, got ", p.num_prefix);
  TOKRED_CHECK(sources.has_value() == destinations.has_value(),
               "sources and destinations must be given together");
  m.batch = metric.size(0);
  m.channels = metric.size(2);
  p.tokens = metric.size(1);
  bipartite_sets(p, metric, mask, sources, destinations);

  Backend backend(metric);
  Tensor token_map = allocate(metric, {m.batch, p.tokens}, ScalarType::Int);
  Tensor num_out = allocate(metric, {p.by_threshold ? m.batch : 0}, ScalarType::Int);
  Tensor score = allocate(metric, {m.batch, m.a.count}, ScalarType::Float);
  Tensor index = allocate(metric, {m.batch, m.a.count}, ScalarType::Int);
  Scratch workspace(metric, backend.match_workspace(m), Backend::kHost);
  m.score = static_cast<float*>(score.mutable_data_ptr());
  m.index = static_cast<int32_t*>(index.mutable_data_ptr());
  m.workspace = workspace.data();
  p.token_map = static_cast<int32_t*>(token_map.mutable_data_ptr());
  p.num_out = p.by_threshold ? static_cast<int32_t*>(num_out.mutable_data_ptr()) : nullptr;
  if (m.batch > 0) backend.bipartite_soft_matching(p);
  return {token_map, num_out};
}

template <class Backend>
Tensor bipartite_soft_matching(const Tensor& metric, int64_t r, int64_t num_prefix,
                               const OptionalTensor& mask, const Text& order,
                               const OptionalTensor& sources, const OptionalTensor& destinations) {
  TOKRED_CHECK(r >= 0, "r must be at least 0, got ", r);
  BipartiteParams p{};
  p.r = r;
  p.num_prefix = num_prefix;
  return run_bipartite<Backend>(p, metric, order, mask, sources, destinations).first;
}

template <class Backend>
std::tuple<Tensor, Tensor> threshold_matching(const Tensor& metric, double threshold,
                                              int64_t num_prefix, const OptionalTensor& mask,
                                              const Text& order,
                                              const OptionalTensor& sources,
                                              const OptionalTensor& destinations) {
  TOKRED_CHECK(threshold == threshold, "threshold must be a number, got NaN");
  BipartiteParams p{};
  p.r = std::numeric_limits<int64_t>::max();
  p.num_prefix = num_prefix;
  p.by_threshold = true;
  p.threshold = static_cast<float>(threshold);
  return run_bipartite<Backend>(p, metric, order, mask, sources, destinations);
}

}  // namespace tokred
