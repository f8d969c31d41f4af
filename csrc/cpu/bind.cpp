// The CPU implementations of torch.ops.tokred.*.
#include <torch/csrc/stable/ops.h>

#include "../ops/register.h"
#include "dispatch.h"
#include "kernels.h"
#include "pages.h"

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
