// Checks and views of the tensors of attention ops (queries, keys, masks, biases, results), and the
// head reductions of ops that score keys.
#pragma once

#include <cmath>
#include <limits>

#include "attention/score_params.h"
#include "tensor.h"

namespace tokred {

inline HeadTensor head_tensor(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_heads(const Tensor& t, const char* name, const Tensor& like) {
  check_dim(t, name, 4, "[B, H, N, D]");
  check_last_contiguous(t, name);
  check_same_dtype(t, name, like, "q");
  check_same_device(t, name, like, "q");
}

inline void check_token_count(const Tensor& t, const char* name, int64_t dim) {
  TOKRED_CHECK(t.size(dim) <= std::numeric_limits<int32_t>::max(), name,
               " may have at most 2^31 - 1 tokens, got ", t.size(dim));
}

// Slot ids i32 [B, rows].
inline void check_slots(const Tensor& slots, int64_t batch, const char* shape, const Tensor& like,
                        const char* like_name) {
  check_shape(slots, "slots", {batch, -1}, shape);
  check_dtype(slots, "slots", ScalarType::Int);
  check_same_device(slots, "slots", like, like_name);
  check_last_contiguous(slots, "slots");
  check_token_count(slots, "slots", 1);
}

inline void check_head_dim(const Tensor& t, const char* name, int64_t dim,
                           int64_t most = kMaxHeadDim) {
  TOKRED_CHECK(t.size(dim) >= 1 && t.size(dim) <= most, "the head dimension of ", name,
               " must be between 1 and ", most, ", got ", t.size(dim));
}

inline void check_groups(int64_t heads_q, int64_t heads_kv) {
  TOKRED_CHECK(heads_q > 0 && heads_kv > 0 && heads_q % heads_kv == 0,
               "the heads of q must be a multiple of the heads of k, and at least one, got ",
               heads_q, " and ", heads_kv);
}

inline double attention_scale(std::optional<double> scale, int64_t head_dim) {
  TOKRED_CHECK(!scale || std::isfinite(*scale), "scale must be finite, got ", *scale);
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

// See AttentionParams: after this p.scale is that of the tanh.
inline void set_softcap(AttentionParams& p, std::optional<double> softcap) {
  if (!softcap) return;
  p.scale /= *softcap;
  // The kernels hold both as float32.
  TOKRED_CHECK(static_cast<float>(*softcap) > 0 && std::isfinite(static_cast<float>(*softcap)) &&
                   std::isfinite(static_cast<float>(p.scale)),
               "softcap must be positive and finite, and so must scale / softcap, got ", *softcap);
  p.softcap = *softcap;
}

inline void set_key_bias(AttentionParams& p, const OptionalTensor& bias, const Tensor& q) {
  if (!bias) return;
  check_dim(*bias, "key_bias", 3, "[B | 1, Hkv | 1, N]");
  check_dtype(*bias, "key_bias", accumulator_type(q));
  check_same_device(*bias, "key_bias", q, "q");
  TOKRED_CHECK((bias->size(0) == p.batch || bias->size(0) == 1) &&
                   (bias->size(1) == p.heads_kv || bias->size(1) == 1) && bias->size(2) == p.keys,
               "key_bias must be [B | 1, Hkv | 1, N] with B = ", p.batch, ", Hkv = ", p.heads_kv,
               ", N = ", p.keys, ", got shape ", shape_string(*bias));
  p.key_bias = bias->const_data_ptr();
  p.bias_stride_batch = broadcast_stride(*bias, 0);
  p.bias_stride_head = broadcast_stride(*bias, 1);
  p.bias_stride_key = bias->stride(2);
}

// The strides of a tensor of four dimensions, of which the first `broadcast_dims` may have size 1
// and are then broadcast.
inline void set_mask_strides(int64_t (&stride)[4], const Tensor& mask, const char* name,
                             const char* layout, const int64_t (&want)[4], int64_t broadcast_dims,
                             const Tensor& q) {
  check_dim(mask, name, 4, layout);
  check_same_device(mask, name, q, "q");
  for (int64_t dim = 0; dim < 4; ++dim) {
    const bool broadcasts = dim < broadcast_dims && mask.size(dim) == 1;
    TOKRED_CHECK(mask.size(dim) == want[dim] || broadcasts, name, " must be ", layout,
                 " with size ", want[dim], " in dimension ", dim, ", got shape ",
                 shape_string(mask));
    stride[dim] = broadcasts ? 0 : mask.stride(dim);
  }
}

inline void set_pair_strides(int64_t (&stride)[4], const AttentionParams& p, const Tensor& mask,
                             const Tensor& q) {
  set_mask_strides(stride, mask, "mask", "[B | 1, Hq | 1, L | 1, N]",
                   {p.batch, p.heads_q, p.queries, p.keys}, 3, q);
}

inline void set_bool_mask(AttentionParams& p, const OptionalTensor& mask, const Tensor& q) {
  if (!mask) return;
  check_dtype(*mask, "mask", ScalarType::Bool);
  set_pair_strides(p.mask.stride, p, *mask, q);
  p.mask.data = static_cast<const bool*>(mask->const_data_ptr());
}

// A bool mask hides pairs, a float mask is added to their logits.
inline void set_attention_mask(AttentionParams& p, const OptionalTensor& mask, const Tensor& q) {
  if (!mask || mask->scalar_type() == ScalarType::Bool) return set_bool_mask(p, mask, q);
  set_pair_strides(p.pair_bias.stride, p, *mask, q);
  TOKRED_CHECK(mask->scalar_type() == q.scalar_type() || mask->scalar_type() == accumulator_type(q),
               "mask must be bool, ", dtype_name(accumulator_type(q)), " or of the dtype of q, ",
               dtype_name(q.scalar_type()), ", got ", dtype_name(mask->scalar_type()));
  p.pair_bias.dtype = float_dtype(*mask, "mask", true);
  p.pair_bias.data = mask->const_data_ptr();
}

inline void check_position(const Tensor& t, const char* name, int64_t batch, int64_t tokens,
                           const Tensor& q) {
  check_dim(t, name, 3, "[B | 1, tokens, 1 | 2]");
  check_dtype(t, name, ScalarType::Int);
  check_same_device(t, name, q, "q");
  check_last_contiguous(t, name);
  TOKRED_CHECK((t.size(0) == batch || t.size(0) == 1) && t.size(1) == tokens &&
                   (t.size(2) == 1 || t.size(2) == 2),
               name, " must be [B | 1, tokens, 1 | 2] with B = ", batch, " and ", tokens,
               " tokens, got shape ", shape_string(t));
}

inline void set_positions(AttentionParams& p, const OptionalTensor& query,
                          const OptionalTensor& key, const Tensor& q) {
  TOKRED_CHECK(query.has_value() == key.has_value(),
               "query_position and key_position must be given together");
  if (!query) return;
  check_position(*query, "query_position", p.batch, p.queries, q);
  check_position(*key, "key_position", p.batch, p.keys, q);
  TOKRED_CHECK(query->size(2) == key->size(2), "key_position must have the ", query->size(2),
               " columns of query_position, got ", key->size(2));
  p.positions = {static_cast<const int32_t*>(query->const_data_ptr()),
                 static_cast<const int32_t*>(key->const_data_ptr()),
                 broadcast_stride(*query, 0),
                 query->stride(1),
                 broadcast_stride(*key, 0),
                 key->stride(1),
                 query->size(2)};
}

// q and k of an attention, checked; v, outputs and what hides keys are still to be set.
inline AttentionParams query_key_inputs(const Tensor& q, const Tensor& k,
                                        std::optional<double> scale, bool causal, bool allow_double,
                                        int64_t max_head_dim = kMaxHeadDim) {
  AttentionParams p{};
  p.dtype = float_dtype(q, "q", allow_double);
  check_heads(q, "q", q);
  check_heads(k, "k", q);
  TOKRED_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3),
               "k must have the batch and head sizes of q ", shape_string(q), ", got shape ",
               shape_string(k));
  check_groups(q.size(1), k.size(1));
  check_head_dim(q, "q", 3, max_head_dim);
  check_token_count(q, "q", 2);
  check_token_count(k, "k", 2);
  p.q = head_tensor(q);
  p.k = head_tensor(k);
  p.batch = q.size(0);
  p.heads_q = q.size(1);
  p.heads_kv = k.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.head_dim = q.size(3);
  p.causal = causal;
  p.scale = attention_scale(scale, p.head_dim);
  return p;
}

// The inputs of a whole attention, checked; outputs are still to be set.
template <class Backend>
AttentionParams attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& key_bias, bool causal,
                                 std::optional<double> scale, const OptionalTensor& mask,
                                 int64_t max_head_dim = kMaxHeadDim) {
  AttentionParams p = query_key_inputs(q, k, scale, causal, Backend::kDouble, max_head_dim);
  check_heads(v, "v", q);
  TOKRED_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
               "v must have the batch, heads and keys of k ", shape_string(k), ", got shape ",
               shape_string(v));
  check_head_dim(v, "v", 3, max_head_dim);
  p.v = head_tensor(v);
  p.value_dim = v.size(3);
  set_key_bias(p, key_bias, q);
  set_attention_mask(p, mask, q);
  return p;
}

// out [B, Hq, L, Dv] and lse [B, Hq, L], allocated and set.
inline std::tuple<Tensor, Tensor> allocate_attention_outputs(AttentionParams& p, const Tensor& q) {
  Tensor out = allocate(q, {p.batch, p.heads_q, p.queries, p.value_dim}, q.scalar_type());
  Tensor lse = allocate(q, {p.batch, p.heads_q, p.queries}, accumulator_type(q));
  p.out = out.mutable_data_ptr();
  p.out_stride_batch = out.stride(0);
  p.out_stride_head = out.stride(1);
  p.out_stride_token = out.stride(2);
  p.lse = lse.mutable_data_ptr();
  return moved(out, lse);
}

// indices [B, Hq | Hkv | 1, ceil(L / block_q), K]; see KeyLists.
inline KeyLists key_lists(const AttentionParams& p, const Tensor& indices, int64_t block_q,
                          const Tensor& q) {
  TOKRED_CHECK(block_q >= 1, "block_q must be at least 1, got ", block_q);
  check_dim(indices, "indices", 4, "[B, Hq | Hkv | 1, ceil(L / block_q), K]");
  check_dtype(indices, "indices", ScalarType::Int);
  check_same_device(indices, "indices", q, "q");
  check_last_contiguous(indices, "indices");
  check_token_count(indices, "indices", 3);
  const int64_t heads = indices.size(1);
  const int64_t lists = p.queries / block_q + (p.queries % block_q != 0);
  TOKRED_CHECK(indices.size(0) == p.batch && indices.size(2) == lists &&
                   (heads == p.heads_q || heads == p.heads_kv || heads == 1),
               "indices must be [B, Hq | Hkv | 1, ceil(L / block_q), K] with B = ", p.batch,
               ", Hq = ", p.heads_q, ", Hkv = ", p.heads_kv, " and ", lists,
               " lists of block_q = ", block_q, " queries, got shape ", shape_string(indices));
  return {static_cast<const int32_t*>(indices.const_data_ptr()),
          indices.stride(0),
          broadcast_stride(indices, 1),
          indices.stride(2),
          heads,
          indices.size(3),
          std::min(block_q, std::max<int64_t>(p.queries, 1))};
}

inline HeadReduction parse_reduction(std::string_view name) {
  return parse_choice<HeadReduction>(name, "reduce",
                                     {{"none", HeadReduction::none},
                                      {"group_mean", HeadReduction::group_mean},
                                      {"group_max", HeadReduction::group_max},
                                      {"head_mean", HeadReduction::head_mean},
                                      {"softmax_vote", HeadReduction::softmax_vote}});
}

inline int64_t reduced_heads(HeadReduction reduction, int64_t heads_q, int64_t heads_kv) {
  switch (reduction) {
    case HeadReduction::none: return heads_q;
    case HeadReduction::group_mean:
    case HeadReduction::group_max: return heads_kv;
    default: return 1;
  }
}

}  // namespace tokred
