// Front end of block_score, scores of queries and pooled blocks.
#pragma once

#include "attention/inputs.h"
#include "score/params.h"

namespace tokred {

inline BlockRule parse_rule(std::string_view name) {
  return parse_choice<BlockRule>(name, "rule",
                                 {{"dot", BlockRule::dot},
                                  {"bounds", BlockRule::bounds},
                                  {"deviation", BlockRule::deviation}});
}

// pooled [B, Hkv, M, S, D]: what block_pool gives, or the same in another float dtype.
inline void set_pooled(BlockScoreParams& p, const Tensor& pooled, const Tensor& q) {
  p.pooled_dtype = float_dtype(pooled, "pooled", false);
  const int64_t statistics = p.rule == BlockRule::dot ? 1 : 2;
  check_shape(pooled, "pooled", {p.batch, -1, -1, statistics, p.head_dim}, "[B, Hkv, M, S, D]");
  check_same_device(pooled, "pooled", q, "q");
  check_last_contiguous(pooled, "pooled");
  TOKRED_CHECK(statistics == 1 || pooled.stride(3) == p.head_dim,
               "pooled must be contiguous in its last two dimensions, got stride ",
               pooled.stride(3));
  check_groups(p.heads_q, pooled.size(1));
  check_token_count(pooled, "pooled", 2);
  p.pooled = head_tensor(pooled);
  p.heads_kv = pooled.size(1);
  p.blocks = pooled.size(2);
}

// f32 [B, Hq | Hkv | 1, L, M]; see BlockScoreParams.
template <class Backend>
Tensor block_score(const Tensor& q, const Tensor& pooled, const OptionalTensor& counts,
                   const Text& rule, const Text& reduce, std::optional<double> scale) {
  BlockScoreParams p{};
  p.rule = parse_rule(rule);
  p.reduction = parse_reduction(reduce);
  p.dtype = float_dtype(q, "q", false);
  if (p.rule == BlockRule::deviation) {
    check_shape(q, "q", {-1, -1, -1, 2, -1}, "[B, Hq, L, 2, D]");
    TOKRED_CHECK(p.dtype == DType::f32 && q.stride(3) == q.size(4),
                 "q must be float32 and contiguous in its last two dimensions with rule ",
                 "deviation: the mean_deviation of block_pool");
  } else {
    check_dim(q, "q", 4, "[B, Hq, L, D]");
  }
  check_last_contiguous(q, "q");
  check_head_dim(q, "q", q.dim() - 1);
  check_token_count(q, "q", 2);
  p.q = head_tensor(q);
  p.batch = q.size(0);
  p.heads_q = q.size(1);
  p.queries = q.size(2);
  p.head_dim = q.size(q.dim() - 1);
  p.scale = static_cast<float>(attention_scale(scale, p.head_dim));
  set_pooled(p, pooled, q);
  if (counts) {
    check_shape(*counts, "counts",
                {counts->dim() == 2 && counts->size(0) == 1 ? 1 : p.batch, p.blocks}, "[B | 1, M]");
    check_dtype(*counts, "counts", ScalarType::Int);
    check_same_device(*counts, "counts", q, "q");
    check_last_contiguous(*counts, "counts");
    p.counts = static_cast<const int32_t*>(counts->const_data_ptr());
    p.counts_stride_batch = broadcast_stride(*counts, 0);
  }

  Backend backend(q);
  const int64_t heads = reduced_heads(p.reduction, p.heads_q, p.heads_kv);
  Tensor out = allocate(q, {p.batch, heads, p.queries, p.blocks}, ScalarType::Float);
  Scratch workspace(q, backend.block_score_workspace(p), Backend::kHost);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0 && p.queries > 0 && p.blocks > 0) backend.block_score(p);
  return out;
}

}  // namespace tokred
