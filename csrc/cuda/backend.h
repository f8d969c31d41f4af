// What the front ends of ops/ call on a device, real or emulated.
#pragma once

#include "kernels.h"

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
};

}  // namespace tokred::cuda
