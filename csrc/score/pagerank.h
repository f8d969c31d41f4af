// Front end of pagerank: attention_columns with its own result for weights, again and again.
#pragma once

#include "score/attention_columns.h"

namespace tokred {

// s <- (1 - damping) s A + damping / N, `iterations` times, A = softmax(q k^T): f32 [B, Hq, N].
template <class Backend>
Tensor pagerank(const Tensor& q, const Tensor& k, const Tensor& lse, int64_t iterations,
                double damping, const OptionalTensor& start, bool causal,
                std::optional<double> scale, const OptionalTensor& mask) {
  AttentionColumnsParams p = column_inputs(q, k, lse, causal, scale, mask);
  const AttentionParams& a = p.attention;
  TOKRED_CHECK(a.queries == a.keys, "k must have the ", a.queries, " tokens of q, got ", a.keys);
  TOKRED_CHECK(iterations >= 1 && iterations <= std::numeric_limits<int32_t>::max(),
               "iterations must be between 1 and 2^31 - 1, got ", iterations);
  TOKRED_CHECK(damping >= 0 && damping <= 1, "damping must be between 0 and 1, got ", damping);
  if (start) set_query_weight(p, *start, "start", q);
  Backend backend(q);
  const auto fresh = [&] { return allocate(q, {a.batch, a.heads_q, a.keys}, ScalarType::Float); };
  Tensor scores[] = {fresh(), fresh()};
  if (a.batch == 0 || a.keys == 0) return std::move(scores[0]);
  const double uniform = 1.0 / static_cast<double>(a.keys);
  // Without a start the first weights are all 1, and 1 / N goes into the factor.
  p.factor = static_cast<float>((1 - damping) * (start ? 1.0 : uniform));
  p.offset = static_cast<float>(damping * uniform);
  for (int64_t i = 0; i < iterations; ++i) {
    Tensor& next = scores[i % 2];
    p.columns = static_cast<float*>(next.mutable_data_ptr());
    backend.attention_columns(p);
    p.factor = static_cast<float>(1 - damping);
    set_query_weight(p, next, "start", q);
  }
  return std::move(scores[(iterations - 1) % 2]);
}

}  // namespace tokred
