// The implementations of all ops for one backend: what each library registers.
#pragma once

#include "match.h"
#include "merge.h"
#include "sparse_attn.h"

namespace tokred {

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("match", TORCH_BOX(&match<Backend>));
  m.impl("bipartite_soft_matching", TORCH_BOX(&bipartite_soft_matching<Backend>));
  m.impl("threshold_matching", TORCH_BOX(&threshold_matching<Backend>));
  m.impl("merge", TORCH_BOX(&merge<Backend>));
  m.impl("merge_out", TORCH_BOX(&merge_out<Backend>));
  m.impl("merge_backward", TORCH_BOX(&merge_backward<Backend>));
  m.impl("unmerge", TORCH_BOX(&unmerge<Backend>));
  m.impl("compose", TORCH_BOX(&compose<Backend>));
  m.impl("biased_attention", TORCH_BOX(&biased_attention<Backend>));
  m.impl("biased_attention_backward", TORCH_BOX(&biased_attention_backward<Backend>));
}

}  // namespace tokred
