// Front ends of bipartite_soft_matching and threshold_matching, one kernel: checks, allocation,
// parameters.
#pragma once

#include "match/match.h"

namespace tokred {

inline Order parse_order(std::string_view name) {
  return parse_choice<Order>(name, "order", {{"tome", Order::tome}, {"position", Order::position}});
}

// Narrows a set to the rows listed in i32 [n] or [B | 1, n].
inline void use_rows(TokenSet& set, const Tensor& rows, const char* name, const Tensor& like,
                     int64_t batch) {
  TOKRED_CHECK(rows.dim() == 1 || rows.dim() == 2, name, " must be [n] or [B | 1, n], got shape ",
               shape_string(rows));
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
std::pair<Tensor, OptionalTensor> run_bipartite(BipartiteParams& p, const Tensor& metric,
                                                const Text& order, const OptionalTensor& mask,
                                                const OptionalTensor& sources,
                                                const OptionalTensor& destinations) {
  MatchParams& m = p.match;
  p.order = parse_order(order);
  m.metric = Metric::cosine;
  m.band = -1;
  m.k = 1;
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
  OptionalTensor num_out;
  if (p.by_threshold) num_out = allocate(metric, {m.batch}, ScalarType::Int);
  const int64_t links = m.batch * m.a.count;
  Scratch matches(metric, links * int64_t{sizeof(float) + sizeof(int32_t)}, Backend::kHost);
  Scratch workspace(metric, backend.bipartite_soft_matching_workspace(p), Backend::kHost);
  m.score = static_cast<float*>(matches.data());
  m.index = reinterpret_cast<int32_t*>(m.score + links);
  m.workspace = workspace.data();
  p.token_map = static_cast<int32_t*>(token_map.mutable_data_ptr());
  p.num_out = num_out ? static_cast<int32_t*>(num_out->mutable_data_ptr()) : nullptr;
  if (m.batch > 0) backend.bipartite_soft_matching(p);
  return {std::move(token_map), std::move(num_out)};
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
                                              const Text& order, const OptionalTensor& sources,
                                              const OptionalTensor& destinations) {
  TOKRED_CHECK(threshold == threshold, "threshold must be a number, got NaN");
  BipartiteParams p{};
  p.r = std::numeric_limits<int64_t>::max();
  p.num_prefix = num_prefix;
  p.by_threshold = true;
  p.threshold = static_cast<float>(threshold);
  auto [token_map, num_out] = run_bipartite<Backend>(p, metric, order, mask, sources, destinations);
  return moved(token_map, *num_out);
}

}  // namespace tokred
