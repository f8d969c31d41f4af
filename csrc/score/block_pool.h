// Front end of block_pool, statistics of blocks of tokens.
#pragma once

#include "attention/inputs.h"
#include "score/params.h"

namespace tokred {

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
  TOKRED_CHECK(
      (boundaries->size(0) == p.batch || boundaries->size(0) == 1) && boundaries->size(1) >= 1,
      "boundaries must be [B | 1, M + 1] with B = ", p.batch, ", got shape ",
      shape_string(*boundaries));
  p.boundaries = static_cast<const int32_t*>(boundaries->const_data_ptr());
  p.boundaries_stride_batch = broadcast_stride(*boundaries, 0);
  p.blocks = boundaries->size(1) - 1;
}

// pooled f32 [B, H, M, S, D], counts i32 [B, M]; see BlockPoolParams.
template <class Backend>
std::tuple<Tensor, Tensor> block_pool(const Tensor& x, int64_t block_size, const Text& statistic,
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
      x, {p.batch, p.heads, p.blocks, statistic_count(p.statistic), p.head_dim}, ScalarType::Float);
  Tensor counts = allocate(x, {p.batch, p.blocks}, ScalarType::Int);
  p.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (p.batch > 0 && p.blocks > 0) backend.block_pool(p);
  return moved(pooled, counts);
}

}  // namespace tokred
