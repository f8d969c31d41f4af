// torch.ops.tokred_simt.*: the CUDA kernels on the emulated device, for CPU tensors.
#include "../../csrc/ops/match.h"
#include "../../csrc/ops/merge.h"
#include "../../csrc/ops/sparse_attn.h"
#include "../../csrc/cuda/kernels.h"

namespace tokred {
namespace {

// A front end calls these on whatever it has checked; see ops/.
struct Simt {
  static constexpr bool kDouble = false;
  static constexpr cuda::Stream stream = nullptr;

  explicit Simt(const Tensor&) {}

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
};

}  // namespace
}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred_simt, CPU, m) {
  using namespace tokred;
  m.impl("match", TORCH_BOX(&match<Simt>));
  m.impl("bipartite_soft_matching", TORCH_BOX(&bipartite_soft_matching<Simt>));
  m.impl("threshold_matching", TORCH_BOX(&threshold_matching<Simt>));
  m.impl("merge", TORCH_BOX(&merge<Simt>));
  m.impl("merge_out", TORCH_BOX(&merge_out<Simt>));
  m.impl("merge_backward", TORCH_BOX(&merge_backward<Simt>));
  m.impl("unmerge", TORCH_BOX(&unmerge<Simt>));
  m.impl("compose", TORCH_BOX(&compose<Simt>));
  m.impl("biased_attention", TORCH_BOX(&biased_attention<Simt>));
  m.impl("biased_attention_backward", TORCH_BOX(&biased_attention_backward<Simt>));
}
