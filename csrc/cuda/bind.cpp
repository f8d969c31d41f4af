// The CUDA implementations of torch.ops.tokred.*.
#include <torch/csrc/stable/accelerator.h>

#include "../ops/match.h"
#include "../ops/merge.h"
#include "../ops/sparse_attn.h"
#include "kernels.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tokred {
namespace {

// A front end calls these on whatever it has checked; see ops/.
struct Cuda {
  static constexpr bool kDouble = false;
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream = nullptr;

  explicit Cuda(const Tensor& like) : guard(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  }

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

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) {
  using namespace tokred;
  m.impl("match", TORCH_BOX(&match<Cuda>));
  m.impl("bipartite_soft_matching", TORCH_BOX(&bipartite_soft_matching<Cuda>));
  m.impl("threshold_matching", TORCH_BOX(&threshold_matching<Cuda>));
  m.impl("merge", TORCH_BOX(&merge<Cuda>));
  m.impl("merge_out", TORCH_BOX(&merge_out<Cuda>));
  m.impl("merge_backward", TORCH_BOX(&merge_backward<Cuda>));
  m.impl("unmerge", TORCH_BOX(&unmerge<Cuda>));
  m.impl("compose", TORCH_BOX(&compose<Cuda>));
  m.impl("biased_attention", TORCH_BOX(&biased_attention<Cuda>));
  m.impl("biased_attention_backward", TORCH_BOX(&biased_attention_backward<Cuda>));
}
