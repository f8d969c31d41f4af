// Front end of greedy_select: checks, allocation, parameters.
#pragma once

#include "cluster/params.h"
#include "tensor.h"

namespace tokred {

// indices i32 [B, k]; see GreedySelectParams.
template <class Backend>
Tensor greedy_select(const Tensor& x, int64_t k, const Text& rule, const OptionalTensor& weight,
                     const OptionalTensor& start, const OptionalTensor& mask, const Text& metric,
                     const Text& first, double trade_off) {
  GreedySelectParams p{};
  p.dtype = float_dtype(x, "x", false);
  p.x = token_set(x, "x", mask, "mask", weight, "weight");
  TOKRED_CHECK(k >= 0 && k <= std::numeric_limits<int32_t>::max(),
               "k must be between 0 and 2^31 - 1, got ", k);
  p.rule = parse_choice<GreedyRule>(rule, "rule",
                                    {{"kcenter", GreedyRule::kcenter},
                                     {"maxsum", GreedyRule::maxsum},
                                     {"mmr", GreedyRule::mmr},
                                     {"facility", GreedyRule::facility}});
  p.metric = parse_choice<Metric>(
      metric, "metric", {{"cosine", Metric::cosine}, {"l2", Metric::l2}, {"dot", Metric::dot}});
  TOKRED_CHECK(p.rule != GreedyRule::facility || p.metric != Metric::l2,
               "metric must be cosine or dot for the rule facility, whose similarities of less "
               "than 0 count as 0, got 'l2'");
  p.first = parse_choice<FirstPick>(
      first, "first",
      {{"rule", FirstPick::rule}, {"norm", FirstPick::norm}, {"isolated", FirstPick::isolated}});
  TOKRED_CHECK(trade_off >= 0 && trade_off <= 1, "trade_off must be between 0 and 1, got ",
               trade_off);
  p.trade_off = static_cast<float>(trade_off);
  p.batch = x.size(0);
  p.channels = x.size(2);
  p.k = k;
  if (start) {
    check_shape(*start, "start", {p.batch}, "[B]");
    check_dtype(*start, "start", ScalarType::Int);
    check_same_device(*start, "start", x, "x");
    p.start = static_cast<const int32_t*>(start->const_data_ptr());
    p.start_stride = start->stride(0);
  }
  Backend backend(x);
  Tensor indices = allocate(x, {p.batch, k}, ScalarType::Int);
  Scratch workspace(x, backend.greedy_select_workspace(p), Backend::kHost);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0 && k > 0) backend.greedy_select(p);
  return indices;
}

}  // namespace tokred
