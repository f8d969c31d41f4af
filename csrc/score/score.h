// Front ends of the score stem over queries and keys, and over blocks of keys: checks, allocation,
// parameters. Compiled for every backend.
#pragma once

#include "attention/inputs.h"
#include "score/params.h"

namespace tokred {

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

// The head dimensions of q that count: i32 [Hq, F], contiguous.
inline void set_dims(QkScoreParams& p, const OptionalTensor& dims, const Tensor& q) {
  if (!dims) return;
  check_shape(*dims, "dims", {p.heads_q, -1}, "[Hq, F]");
  check_dtype(*dims, "dims", ScalarType::Int);
  check_same_device(*dims, "dims", q, "q");
  TOKRED_CHECK(dims->is_contiguous(), "dims must be contiguous, got strides of a view");
  TOKRED_CHECK(dims->size(1) >= 1 && dims->size(1) <= kMaxHeadDim,
               "dims must list between 1 and ", kMaxHeadDim, " dimensions a head, got ",
               dims->size(1));
  p.dims = static_cast<const int32_t*>(dims->const_data_ptr());
  p.num_dims = dims->size(1);
}

// Where keys lie in a pool k [1, Hkv, S, D]: i32 [B, N].
inline void set_slots(QkScoreParams& p, const OptionalTensor& slots, const Tensor& q,
                      const Tensor& k) {
  const int64_t batch = slots ? 1 : p.batch;
  TOKRED_CHECK(k.size(0) == batch, "k must have the batch size ", batch,
               slots ? " of a pool, as slots are given," : " of q,", " got shape ",
               shape_string(k));
  p.keys = p.stored_keys = k.size(2);
  if (!slots) return;
  check_slots(*slots, p.batch, "[B, N]", q, "q");
  p.slots = static_cast<const int32_t*>(slots->const_data_ptr());
  p.slots_stride_batch = slots->stride(0);
  p.keys = slots->size(1);
}

// f32 [B, Hq | Hkv | 1, N]; see QkScoreParams.
template <class Backend>
Tensor qk_score(const Tensor& q, const Tensor& k, const Text& reduce,
                const OptionalTensor& dims, std::optional<double> scale,
                const OptionalTensor& lengths, const OptionalTensor& mask,
                const OptionalTensor& slots) {
  QkScoreParams p{};
  p.dtype = float_dtype(q, "q", false);
  check_heads(q, "q", q);
  check_heads(k, "k", q);
  TOKRED_CHECK(k.size(3) == q.size(3), "k must have the head dimension ", q.size(3),
               " of q, got shape ", shape_string(k));
  check_groups(q.size(1), k.size(1));
  check_head_dim(q, "q", 3);
  check_token_count(k, "k", 2);
  TOKRED_CHECK(q.size(2) >= 1, "q must have at least one query, got shape ", shape_string(q));
  p.q = head_tensor(q);
  p.k = head_tensor(k);
  p.batch = q.size(0);
  p.heads_q = q.size(1);
  p.heads_kv = k.size(1);
  p.queries = q.size(2);
  p.head_dim = q.size(3);
  p.scale = static_cast<float>(attention_scale(scale, p.head_dim));
  p.reduction = parse_reduction(reduce);
  set_slots(p, slots, q, k);
  set_dims(p, dims, q);
  p.lengths = batch_lengths(lengths, p.batch, q, "q", p.lengths_stride);
  p.mask = token_mask(mask, "mask", p.batch, p.keys, true, q, "q", p.mask_stride_batch,
                      p.mask_stride_token);

  Backend backend(q);
  const int64_t heads = reduced_heads(p.reduction, p.heads_q, p.heads_kv);
  Tensor out = allocate(q, {p.batch, heads, p.keys}, ScalarType::Float);
  Scratch workspace(q, backend.qk_score_workspace(p), Backend::kHost);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.workspace = workspace.data();
  backend.will_write(p.out, p.batch * heads * p.keys * int64_t{sizeof(float)});
  if (p.batch > 0 && p.keys > 0) backend.qk_score(p);
  return out;
}

inline BlockStatistic parse_statistic(std::string_view name) {
  return parse_choice<BlockStatistic>(name, "statistic",
                                      {{"mean", BlockStatistic::mean},
                                       {"sqrt_mean", BlockStatistic::sqrt_mean},
                                       {"min_max", BlockStatistic::min_max},
                                       {"mean_deviation", BlockStatistic::mean_deviation}});
}

// Blocks of a fixed size, or between given boundaries.
inline void set_blocks(BlockPoolParams& p, int64_t block_size, const OptionalTensor& boundaries,
                       const Tensor& x) {
  TOKRED_CHECK(boundaries ? block_size == 0 : block_size >= 1,
               "block_size must be at least 1, or 0 where boundaries are given, got ", block_size);
  p.block_size = std::min(block_size, std::max<int64_t>(p.tokens, 1));
  if (!boundaries) {
    p.blocks = p.tokens / block_size + (p.tokens % block_size != 0);
    return;
  }
  check_dim(*boundaries, "boundaries", 2, "[B | 1, M + 1]");
  check_dtype(*boundaries, "boundaries", ScalarType::Int);
  check_same_device(*boundaries, "boundaries", x, "x");
  check_last_contiguous(*boundaries, "boundaries");
  TOKRED_CHECK((boundaries->size(0) == p.batch || boundaries->size(0) == 1) &&
                   boundaries->size(1) >= 1,
               "boundaries must be [B | 1, M + 1] with B = ", p.batch, ", got shape ",
               shape_string(*boundaries));
  p.boundaries = static_cast<const int32_t*>(boundaries->const_data_ptr());
  p.boundaries_stride_batch = broadcast_stride(*boundaries, 0);
  p.blocks = boundaries->size(1) - 1;
}

// pooled f32 [B, H, M, S, D], counts i32 [B, M]; see BlockPoolParams.
template <class Backend>
std::tuple<Tensor, Tensor> block_pool(const Tensor& x, int64_t block_size,
                                      const Text& statistic,
                                      const OptionalTensor& boundaries,
                                      const OptionalTensor& lengths, const OptionalTensor& mask) {
  BlockPoolParams p{};
  p.dtype = float_dtype(x, "x", false);
  check_dim(x, "x", 4, "[B, H, N, D]");
  check_last_contiguous(x, "x");
  check_head_dim(x, "x", 3);
  check_token_count(x, "x", 2);
  p.x = head_tensor(x);
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.head_dim = x.size(3);
  p.statistic = parse_statistic(statistic);
  set_blocks(p, block_size, boundaries, x);
  p.lengths = batch_lengths(lengths, p.batch, x, "x", p.lengths_stride);
  p.mask = token_mask(mask, "mask", p.batch, p.tokens, true, x, "x", p.mask_stride_batch,
                      p.mask_stride_token);

  Backend backend(x);
  Tensor pooled = allocate(
      x, {p.batch, p.heads, p.blocks, statistic_count(p.statistic), p.head_dim},
      ScalarType::Float);
  Tensor counts = allocate(x, {p.batch, p.blocks}, ScalarType::Int);
  p.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  backend.will_write(p.pooled, pooled.numel() * int64_t{sizeof(float)});
  if (p.batch > 0 && p.blocks > 0) backend.block_pool(p);
  return {pooled, counts};
}

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
    check_shape(*counts, "counts", {counts->dim() == 2 && counts->size(0) == 1 ? 1 : p.batch,
                                    p.blocks}, "[B | 1, M]");
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
