// Front ends of the score stem over attention and similarity matrices that are never stored: checks,
// allocation, parameters. Compiled for every backend.
#pragma once

#include <cmath>

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
  set_attention_mask(p.attention, mask, q);
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
  backend.will_write(p.rows, rows.numel() * int64_t{sizeof(float)});
  if (a.batch > 0 && a.queries > 0 && a.keys > 0) backend.attention_rows(p);
  return rows;
}

// The column statistics of softmax(q k^T) with its lse [B, Hq, L]; outputs are still to be set.
inline AttentionColumnsParams column_inputs(const Tensor& q, const Tensor& k, const Tensor& lse,
                                            bool causal, std::optional<double> scale,
                                            const OptionalTensor& mask) {
  AttentionColumnsParams p{};
  p.attention = query_key_inputs(q, k, scale, causal, false);
  set_attention_mask(p.attention, mask, q);
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
Tensor attention_columns(const Tensor& q, const Tensor& k, const Tensor& lse,
                         const Text& reduce, const OptionalTensor& weight, bool causal,
                         std::optional<double> scale, const OptionalTensor& mask) {
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
  Tensor scores[2];
  for (Tensor& s : scores) s = allocate(q, {a.batch, a.heads_q, a.keys}, ScalarType::Float);
  if (a.batch == 0 || a.keys == 0) return scores[0];
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
  return scores[(iterations - 1) % 2];
}

// x [B, N, C] with its strides.
inline void check_tokens(const Tensor& x, const char* name, const Tensor& like,
                         const char* like_name) {
  check_dim(x, name, 3, "[B, N, C]");
  check_last_contiguous(x, name);
  check_same_dtype(x, name, like, like_name);
  check_same_device(x, name, like, like_name);
  check_token_count(x, name, 1);
}

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

// mean, variance, greatest f32, index, count i32, energy f32, all [B, Na]; see
// SimilarityStatsParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_stats(
    const Tensor& a, const Tensor& b, const Text& metric, double threshold,
    const Text& energy, double margin, bool exclude_self, int64_t block_size,
    const OptionalTensor& mask_a, const OptionalTensor& mask_b) {
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
  Tensor greatest = output(ScalarType::Float), index = output(ScalarType::Int);
  Tensor count = output(ScalarType::Int), energies = output(ScalarType::Float);
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.variance = static_cast<float*>(variance.mutable_data_ptr());
  p.greatest = static_cast<float*>(greatest.mutable_data_ptr());
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.count = static_cast<int32_t*>(count.mutable_data_ptr());
  p.energy = static_cast<float*>(energies.mutable_data_ptr());
  if (p.batch > 0 && p.rows > 0) {
    Scratch workspace(a, backend.similarity_stats_workspace(p), Backend::kHost);
    p.workspace = workspace.data();
    backend.similarity_stats(p);
  }
  return {mean, variance, greatest, index, count, energies};
}

// ratio and cosine f32 [B, N]; see TransitionParams.
template <class Backend>
std::tuple<Tensor, Tensor> transition_stats(const Tensor& before, const Tensor& after) {
  TransitionParams p{};
  p.dtype = float_dtype(before, "before", false);
  check_tokens(before, "before", before, "before");
  check_tokens(after, "after", before, "before");
  check_shape(after, "after", {before.size(0), before.size(1), before.size(2)}, "[B, N, C]");
  p.before = before.const_data_ptr();
  p.after = after.const_data_ptr();
  p.before_stride_batch = before.stride(0);
  p.before_stride_token = before.stride(1);
  p.after_stride_batch = after.stride(0);
  p.after_stride_token = after.stride(1);
  p.batch = before.size(0);
  p.tokens = before.size(1);
  p.channels = before.size(2);
  Backend backend(before);
  Tensor ratio = allocate(before, {p.batch, p.tokens}, ScalarType::Float);
  Tensor cosine = allocate(before, {p.batch, p.tokens}, ScalarType::Float);
  p.ratio = static_cast<float*>(ratio.mutable_data_ptr());
  p.cosine = static_cast<float*>(cosine.mutable_data_ptr());
  if (p.batch > 0 && p.tokens > 0) backend.transition_stats(p);
  return {ratio, cosine};
}

}  // namespace tokred
