// Front end of attention_columns, statistics of the columns of an attention that is never stored.
#pragma once

#include "attention/inputs.h"
#include "score/params.h"

namespace tokred {

// The column statistics of softmax(q k^T) with its lse [B, Hq, L]; outputs are still to be set.
inline AttentionColumnsParams column_inputs(const Tensor& q, const Tensor& k, const Tensor& lse,
                                            bool causal, std::optional<double> scale,
                                            const OptionalTensor& mask) {
  AttentionColumnsParams p{};
  p.attention = query_key_inputs(q, k, scale, causal, false);
  set_bool_mask(p.attention, mask, q);
  const AttentionParams& a = p.attention;
  check_shape(lse, "lse", {a.batch, a.heads_q, a.queries}, "[B, Hq, L]");
  check_dtype(lse, "lse", ScalarType::Float);
  check_same_device(lse, "lse", q, "q");
  TOKRED_CHECK(lse.is_contiguous(), "lse must be contiguous, got strides of a view");
  p.attention.lse = const_cast<void*>(lse.const_data_ptr());
  p.factor = 1.0f;
  return p;
}

// A weight f32 [B | 1, Hq | 1, L] for every query.
inline void set_query_weight(AttentionColumnsParams& p, const Tensor& weight, const char* name,
                             const Tensor& q) {
  const AttentionParams& a = p.attention;
  check_dim(weight, name, 3, "[B | 1, Hq | 1, L]");
  check_dtype(weight, name, ScalarType::Float);
  check_same_device(weight, name, q, "q");
  TOKRED_CHECK((weight.size(0) == a.batch || weight.size(0) == 1) &&
                   (weight.size(1) == a.heads_q || weight.size(1) == 1) &&
                   weight.size(2) == a.queries,
               name, " must be [B | 1, Hq | 1, L] with B = ", a.batch, ", Hq = ", a.heads_q,
               ", L = ", a.queries, ", got shape ", shape_string(weight));
  p.weight = static_cast<const float*>(weight.const_data_ptr());
  p.weight_stride_batch = broadcast_stride(weight, 0);
  p.weight_stride_head = broadcast_stride(weight, 1);
  p.weight_stride_query = weight.stride(2);
}

// f32 [B, Hq, N]; see AttentionColumnsParams.
template <class Backend>
Tensor attention_columns(const Tensor& q, const Tensor& k, const Tensor& lse, const Text& reduce,
                         const OptionalTensor& weight, bool causal, std::optional<double> scale,
                         const OptionalTensor& mask) {
  AttentionColumnsParams p = column_inputs(q, k, lse, causal, scale, mask);
  p.reduction = parse_choice<ColumnReduction>(reduce, "reduce",
                                              {{"sum", ColumnReduction::sum},
                                               {"mean", ColumnReduction::mean},
                                               {"max", ColumnReduction::max},
                                               {"variance", ColumnReduction::variance}});
  if (weight) set_query_weight(p, *weight, "weight", q);
  Backend backend(q);
  const AttentionParams& a = p.attention;
  Tensor columns = allocate(q, {a.batch, a.heads_q, a.keys}, ScalarType::Float);
  p.columns = static_cast<float*>(columns.mutable_data_ptr());
  if (a.batch > 0 && a.keys > 0) backend.attention_columns(p);
  return columns;
}

}  // namespace tokred
