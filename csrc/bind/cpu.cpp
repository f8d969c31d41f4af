// The CPU implementations of torch.ops.tokred.*.
#include <torch/csrc/stable/ops.h>

#include "bind/cpu_kernels.h"
#include "bind/register.h"
#include "common/cpu/dispatch.h"
#include "common/cpu/pages.h"

namespace tokred {
namespace {

Parallel torch_pool() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
            });
          }};
}

// A front end calls these on whatever it has checked; see ops/.
struct Cpu {
  static constexpr bool kDouble = true;  // float64 too
  static constexpr bool kHost = true;    // kernels run on the host, before the call returns
  Parallel parallel = torch_pool();

  explicit Cpu(const Tensor&) {}

  // Fresh pages cost more than the writes to them; large outputs ask for huge ones.
  void will_write(void* data, int64_t bytes) const { advise_huge_pages(data, bytes); }

  int64_t match_workspace(const MatchParams& p) const {
    return run(generic::match_workspace, avx2::match_workspace, avx512::match_workspace, p);
  }
  void match(const MatchParams& p) const { run(generic::match, avx2::match, avx512::match, p); }
  void bipartite_soft_matching(const BipartiteParams& p) const {
    run(generic::bipartite_soft_matching, avx2::bipartite_soft_matching,
        avx512::bipartite_soft_matching, p);
  }
  void merge(const MergeParams& p) const { run(generic::merge, avx2::merge, avx512::merge, p); }
  void merge_backward(const MergeBackwardParams& p) const {
    run(generic::merge_backward, avx2::merge_backward, avx512::merge_backward, p);
  }
  void unmerge(const UnmergeParams& p) const {
    run(generic::unmerge, avx2::unmerge, avx512::unmerge, p);
  }
  void compose(const ComposeParams& p) const {
    run(generic::compose, avx2::compose, avx512::compose, p);
  }
  void biased_attention(const AttentionParams& p) const {
    run(generic::biased_attention, avx2::biased_attention, avx512::biased_attention, p);
  }
  void biased_attention_backward(const AttentionBackwardParams& p) const {
    run(generic::biased_attention_backward, avx2::biased_attention_backward,
        avx512::biased_attention_backward, p);
  }
  int64_t topk_workspace(const TopkParams& p) const {
    return run(generic::topk_workspace, avx2::topk_workspace, avx512::topk_workspace, p);
  }
  void topk(const TopkParams& p) const {
    run(generic::topk, avx2::topk, avx512::topk, p);
  }
  void compact(const CompactParams& p) const {
    run(generic::compact, avx2::compact, avx512::compact, p);
  }
  void gather_tokens(const GatherParams& p) const {
    run(generic::gather_tokens, avx2::gather_tokens, avx512::gather_tokens, p);
  }
  int64_t inverse_transform_sample_workspace(const InverseTransformParams& p) const {
    return run(generic::inverse_transform_sample_workspace,
        avx2::inverse_transform_sample_workspace, avx512::inverse_transform_sample_workspace, p);
  }
  void inverse_transform_sample(const InverseTransformParams& p) const {
    run(generic::inverse_transform_sample, avx2::inverse_transform_sample,
        avx512::inverse_transform_sample, p);
  }
  int64_t qk_score_workspace(const QkScoreParams& p) const {
    return run(generic::qk_score_workspace, avx2::qk_score_workspace,
        avx512::qk_score_workspace, p);
  }
  void qk_score(const QkScoreParams& p) const {
    run(generic::qk_score, avx2::qk_score, avx512::qk_score, p);
  }
  void block_pool(const BlockPoolParams& p) const {
    run(generic::block_pool, avx2::block_pool, avx512::block_pool, p);
  }
  int64_t block_score_workspace(const BlockScoreParams& p) const {
    return run(generic::block_score_workspace, avx2::block_score_workspace,
        avx512::block_score_workspace, p);
  }
  void block_score(const BlockScoreParams& p) const {
    run(generic::block_score, avx2::block_score, avx512::block_score, p);
  }
  void attention_rows(const AttentionRowsParams& p) const {
    run(generic::attention_rows, avx2::attention_rows, avx512::attention_rows, p);
  }
  void attention_columns(const AttentionColumnsParams& p) const {
    run(generic::attention_columns, avx2::attention_columns, avx512::attention_columns, p);
  }
  int64_t similarity_stats_workspace(const SimilarityStatsParams& p) const {
    return run(generic::similarity_stats_workspace, avx2::similarity_stats_workspace,
        avx512::similarity_stats_workspace, p);
  }
  void similarity_stats(const SimilarityStatsParams& p) const {
    run(generic::similarity_stats, avx2::similarity_stats, avx512::similarity_stats, p);
  }
  void transition_stats(const TransitionParams& p) const {
    run(generic::transition_stats, avx2::transition_stats, avx512::transition_stats, p);
  }
  int64_t attention_workspace(const AttentionParams& p) const {
    return run(generic::attention_workspace, avx2::attention_workspace,
        avx512::attention_workspace, p);
  }
  int64_t sparse_attention_workspace(const SparseAttentionParams& p) const {
    return run(generic::sparse_attention_workspace, avx2::sparse_attention_workspace,
        avx512::sparse_attention_workspace, p);
  }
  void sparse_attention(const SparseAttentionParams& p) const {
    run(generic::sparse_attention, avx2::sparse_attention, avx512::sparse_attention, p);
  }
  int64_t sparse_attention_backward_workspace(const SparseAttentionBackwardParams& p) const {
    return run(generic::sparse_attention_backward_workspace,
        avx2::sparse_attention_backward_workspace, avx512::sparse_attention_backward_workspace, p);
  }
  void sparse_attention_backward(const SparseAttentionBackwardParams& p) const {
    run(generic::sparse_attention_backward, avx2::sparse_attention_backward,
        avx512::sparse_attention_backward, p);
  }
  void combine_states(const CombineParams& p) const {
    run(generic::combine_states, avx2::combine_states, avx512::combine_states, p);
  }
  void kv_pack(const KvPackParams& p) const {
    run(generic::kv_pack, avx2::kv_pack, avx512::kv_pack, p);
  }
  void kv_unpack(const KvUnpackParams& p) const {
    run(generic::kv_unpack, avx2::kv_unpack, avx512::kv_unpack, p);
  }
  void kv_append(const KvAppendParams& p) const {
    run(generic::kv_append, avx2::kv_append, avx512::kv_append, p);
  }
  int64_t packed_attention_workspace(const PackedAttentionParams& p) const {
    return run(generic::packed_attention_workspace, avx2::packed_attention_workspace,
        avx512::packed_attention_workspace, p);
  }
  void packed_attention(const PackedAttentionParams& p) const {
    run(generic::packed_attention, avx2::packed_attention, avx512::packed_attention, p);
  }
  int64_t packed_qk_score_workspace(const PackedScoreParams& p) const {
    return run(generic::packed_qk_score_workspace, avx2::packed_qk_score_workspace,
        avx512::packed_qk_score_workspace, p);
  }
  void packed_qk_score(const PackedScoreParams& p) const {
    run(generic::packed_qk_score, avx2::packed_qk_score, avx512::packed_qk_score, p);
  }

 private:
  template <class R, class P>
  R run(R (*generic)(const P&, const Parallel&), R (*avx2)(const P&, const Parallel&),
        R (*avx512)(const P&, const Parallel&), const P& params) const {
    return select(generic, avx2, avx512)(params, parallel);
  }
};

}  // namespace
}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { tokred::register_ops<tokred::Cpu>(m); }
