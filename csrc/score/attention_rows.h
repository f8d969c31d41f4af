// Front end of attention_rows, the logits or weights of a few queries.
#pragma once

#include "attention/inputs.h"
#include "score/params.h"

namespace tokred {

// f32 [B, Hq, L, N]; see AttentionRowsParams.
template <class Backend>
Tensor attention_rows(const Tensor& q, const Tensor& k, bool softmax, int64_t first,
                      std::optional<int64_t> last, bool causal, std::optional<double> scale,
                      const OptionalTensor& mask) {
  AttentionRowsParams p{};
  p.attention = query_key_inputs(q, k, scale, causal, false);
  set_bool_mask(p.attention, mask, q);
  p.softmax = softmax;
  p.first = first;
  p.last = last.value_or(p.attention.keys);
  TOKRED_CHECK(0 <= p.first && p.first <= p.last && p.last <= p.attention.keys,
               "the denominator must be a range within the ", p.attention.keys, " keys, got [",
               p.first, ", ", p.last, ")");
  Backend backend(q);
  const AttentionParams& a = p.attention;
  Tensor rows = allocate(q, {a.batch, a.heads_q, a.queries, a.keys}, ScalarType::Float);
  p.rows = static_cast<float*>(rows.mutable_data_ptr());
  if (a.batch > 0 && a.queries > 0 && a.keys > 0) backend.attention_rows(p);
  return rows;
}

}  // namespace tokred
