// What the front ends of ops/ call on a device, real or emulated.
#pragma once

#include "bind/cuda_kernels.h"

namespace tokred::cuda {

struct Kernels {
  static constexpr bool kDouble = false;
  static constexpr bool kHost = false;
  Stream stream = nullptr;

  void will_write(void*, int64_t) const {}
  int64_t match_workspace(const MatchParams& p) const { return cuda::match_workspace(p); }
  void match(const MatchParams& p) const { cuda::match(p, stream); }
  void bipartite_soft_matching(const BipartiteParams& p) const {
    cuda::bipartite_soft_matching(p, stream);
  }
  void merge(const MergeParams& p) const { cuda::merge(p, stream); }
  void merge_backward(const MergeBackwardParams& p) const { cuda::merge_backward(p, stream); }
  void unmerge(const UnmergeParams& p) const { cuda::unmerge(p, stream); }
  void compose(const ComposeParams& p) const { cuda::compose(p, stream); }
  void biased_attention(const AttentionParams& p) const { cuda::biased_attention(p, stream); }
  void biased_attention_backward(const AttentionBackwardParams& p) const {
    cuda::biased_attention_backward(p, stream);
  }
  int64_t topk_workspace(const TopkParams& p) const { return cuda::topk_workspace(p); }
  void topk(const TopkParams& p) const { cuda::topk(p, stream); }
  void compact(const CompactParams& p) const { cuda::compact(p, stream); }
  void gather_tokens(const GatherParams& p) const { cuda::gather_tokens(p, stream); }
  int64_t inverse_transform_sample_workspace(const InverseTransformParams& p) const {
    return cuda::inverse_transform_sample_workspace(p);
  }
  void inverse_transform_sample(const InverseTransformParams& p) const {
    cuda::inverse_transform_sample(p, stream);
  }
  int64_t qk_score_workspace(const QkScoreParams& p) const { return cuda::qk_score_workspace(p); }
  void qk_score(const QkScoreParams& p) const { cuda::qk_score(p, stream); }
  void block_pool(const BlockPoolParams& p) const { cuda::block_pool(p, stream); }
  int64_t block_score_workspace(const BlockScoreParams& p) const {
    return cuda::block_score_workspace(p);
  }
  void block_score(const BlockScoreParams& p) const { cuda::block_score(p, stream); }
  void attention_rows(const AttentionRowsParams& p) const { cuda::attention_rows(p, stream); }
  void attention_columns(const AttentionColumnsParams& p) const {
    cuda::attention_columns(p, stream);
  }
  int64_t similarity_stats_workspace(const SimilarityStatsParams& p) const {
    return cuda::similarity_stats_workspace(p);
  }
  void similarity_stats(const SimilarityStatsParams& p) const { cuda::similarity_stats(p, stream); }
  void transition_stats(const TransitionParams& p) const { cuda::transition_stats(p, stream); }
  int64_t attention_workspace(const AttentionParams& p) const {
    return cuda::attention_workspace(p);
  }
  int64_t sparse_attention_workspace(const SparseAttentionParams& p) const {
    return cuda::sparse_attention_workspace(p);
  }
  void sparse_attention(const SparseAttentionParams& p) const { cuda::sparse_attention(p, stream); }
  int64_t sparse_attention_backward_workspace(const SparseAttentionBackwardParams& p) const {
    return cuda::sparse_attention_backward_workspace(p);
  }
  void sparse_attention_backward(const SparseAttentionBackwardParams& p) const {
    cuda::sparse_attention_backward(p, stream);
  }
  void combine_states(const CombineParams& p) const { cuda::combine_states(p, stream); }
  void kv_pack(const KvPackParams& p) const { cuda::kv_pack(p, stream); }
  void kv_unpack(const KvUnpackParams& p) const { cuda::kv_unpack(p, stream); }
  void kv_append(const KvAppendParams& p) const { cuda::kv_append(p, stream); }
  int64_t packed_attention_workspace(const PackedAttentionParams& p) const {
    return cuda::packed_attention_workspace(p);
  }
  void packed_attention(const PackedAttentionParams& p) const { cuda::packed_attention(p, stream); }
  int64_t packed_qk_score_workspace(const PackedScoreParams& p) const {
    return cuda::packed_qk_score_workspace(p);
  }
  void packed_qk_score(const PackedScoreParams& p) const { cuda::packed_qk_score(p, stream); }
};

}  // namespace tokred::cuda
