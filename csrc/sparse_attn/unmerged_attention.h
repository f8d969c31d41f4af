// Front end of unmerged_attention: checks, allocation, parameters.
#pragma once

#include "attention/inputs.h"
#include "sparse_attn/params.h"

namespace tokred {

inline const int32_t* position_map(const Tensor& map, const char* name, const char* layout,
                                   int64_t batch, const Tensor& q, int64_t& stride_batch,
                                   int64_t& stride_token) {
  check_shape(map, name, {batch, -1}, layout);
  check_dtype(map, name, ScalarType::Int);
  check_same_device(map, name, q, "q");
  check_token_count(map, name, 1);
  stride_batch = map.stride(0);
  stride_token = map.stride(1);
  return static_cast<const int32_t*>(map.const_data_ptr());
}

inline const float* rotation_table(const Tensor& table, const char* name, const UnmergedParams& p,
                                   const Tensor& q, int64_t& stride_batch, int64_t& stride_token) {
  check_dim(table, name, 3, "[B | 1, N, R]");
  check_dtype(table, name, ScalarType::Float);
  check_same_device(table, name, q, "q");
  check_last_contiguous(table, name);
  TOKRED_CHECK((table.size(0) == p.batch || table.size(0) == 1) && table.size(1) == p.positions &&
                   2 * table.size(2) <= p.head_dim,
               name, " must be [B | 1, N, R] with B = ", p.batch, ", N = ", p.positions,
               " and R at most D / 2 = ", p.head_dim / 2, ", got shape ", shape_string(table));
  stride_batch = broadcast_stride(table, 0);
  stride_token = table.stride(1);
  return static_cast<const float*>(table.const_data_ptr());
}

// out [B, Hq, Mq, Dv]; see UnmergedParams.
template <class Backend>
Tensor unmerged_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& token_map, const OptionalTensor& rope_cos,
                          const OptionalTensor& rope_sin, bool causal, std::optional<double> scale,
                          const OptionalTensor& query_map) {
  const AttentionParams a =
      attention_inputs<Backend>(q, k, v, std::nullopt, causal, scale, std::nullopt);
  UnmergedParams p{};
  p.dtype = float_dtype(q, "q", false);
  p.q = a.q;
  p.k = a.k;
  p.v = a.v;
  p.batch = a.batch;
  p.heads_q = a.heads_q;
  p.heads_kv = a.heads_kv;
  p.query_tokens = a.queries;
  p.tokens = a.keys;
  p.head_dim = a.head_dim;
  p.value_dim = a.value_dim;
  p.causal = causal;
  p.scale = a.scale;
  p.token_map = position_map(token_map, "token_map", "[B, N]", p.batch, q, p.token_map_stride_batch,
                             p.token_map_stride_token);
  p.positions = token_map.size(1);
  const Tensor& queries = query_map ? *query_map : token_map;
  p.query_map = position_map(queries, "query_map", "[B, L]", p.batch, q, p.query_map_stride_batch,
                             p.query_map_stride_token);
  p.queries = queries.size(1);
  TOKRED_CHECK(p.queries <= p.positions,
               "query_map must be of the last positions, at most N = ", p.positions, ", got shape ",
               shape_string(queries));
  TOKRED_CHECK(rope_cos.has_value() == rope_sin.has_value(),
               "rope_cos and rope_sin must be given together");
  if (rope_cos) {
    p.cos = rotation_table(*rope_cos, "rope_cos", p, q, p.cos_stride_batch, p.cos_stride_token);
    p.sin = rotation_table(*rope_sin, "rope_sin", p, q, p.sin_stride_batch, p.sin_stride_token);
    p.rotated = rope_cos->size(2);
    TOKRED_CHECK(rope_sin->size(2) == p.rotated, "rope_sin must have the shape of rope_cos ",
                 shape_string(*rope_cos), ", got ", shape_string(*rope_sin));
  }
  Backend backend(q);
  Tensor out = allocate(q, {p.batch, p.heads_q, p.query_tokens, p.value_dim}, q.scalar_type());
  p.out = out.mutable_data_ptr();
  Scratch workspace(q, backend.unmerged_attention_workspace(p), Backend::kHost);
  p.workspace = workspace.data();
  backend.unmerged_attention(p);
  return out;
}

}  // namespace tokred
