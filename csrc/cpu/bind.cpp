// The CPU implementations of torch.ops.tokred.*.
#include <torch/csrc/stable/ops.h>

#include "../ops/match.h"
#include "../ops/merge.h"
#include "../ops/sparse_attn.h"
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
  static constexpr bool kDouble = true;
  Parallel parallel = torch_pool();

  explicit Cpu(const Tensor&) {}

  // Fresh pages cost more than the writes to them; large outputs ask for huge ones.
  void will_write(void* data, int64_t bytes) const { advise_huge_pages(data, bytes); }

  int64_t match_workspace(const MatchParams& p) const {
    return select(generic::match_workspace, avx2::match_workspace, avx512::match_workspace)(p, parallel);
  }
  void match(const MatchParams& p) const {
    select(generic::match, avx2::match, avx512::match)(p, parallel);
  }
  void bipartite_soft_matching(const BipartiteParams& p) const {
    select(generic::bipartite_soft_matching, avx2::bipartite_soft_matching,
           avx512::bipartite_soft_matching)(p, parallel);
  }
  void merge(const MergeParams& p) const {
    select(generic::merge, avx2::merge, avx512::merge)(p, parallel);
  }
  void merge_backward(const MergeBackwardParams& p) const {
    select(generic::merge_backward, avx2::merge_backward, avx512::merge_backward)(p, parallel);
  }
  void unmerge(const UnmergeParams& p) const {
    select(generic::unmerge, avx2::unmerge, avx512::unmerge)(p, parallel);
  }
  void compose(const ComposeParams& p) const {
    select(generic::compose, avx2::compose, avx512::compose)(p, parallel);
  }
  void biased_attention(const AttentionParams& p) const {
    select(generic::biased_attention, avx2::biased_attention, avx512::biased_attention)(p, parallel);
  }
  void biased_attention_backward(const AttentionBackwardParams& p) const {
    select(generic::biased_attention_backward, avx2::biased_attention_backward,
           avx512::biased_attention_backward)(p, parallel);
  }
};

}  // namespace
}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) {
  using namespace tokred;
  m.impl("match", TORCH_BOX(&match<Cpu>));
  m.impl("bipartite_soft_matching", TORCH_BOX(&bipartite_soft_matching<Cpu>));
  m.impl("threshold_matching", TORCH_BOX(&threshold_matching<Cpu>));
  m.impl("merge", TORCH_BOX(&merge<Cpu>));
  m.impl("merge_out", TORCH_BOX(&merge_out<Cpu>));
  m.impl("merge_backward", TORCH_BOX(&merge_backward<Cpu>));
  m.impl("unmerge", TORCH_BOX(&unmerge<Cpu>));
  m.impl("compose", TORCH_BOX(&compose<Cpu>));
  m.impl("biased_attention", TORCH_BOX(&biased_attention<Cpu>));
  m.impl("biased_attention_backward", TORCH_BOX(&biased_attention_backward<Cpu>));
}
