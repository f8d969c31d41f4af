// The implementations of all ops for one backend: what each library registers.
#pragma once

#include "kv_pack/kv_pack.h"
#include "match/match.h"
#include "merge/merge.h"
#include "packed_attn/packed_attention.h"
#include "score/attention.h"
#include "score/score.h"
#include "sparse_attn/biased_attention.h"
#include "sparse_attn/sparse_attention.h"
#include "topk/topk.h"

namespace tokred {

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("topk", TORCH_BOX(&topk<Backend>));
  m.impl("compact", TORCH_BOX(&compact<Backend>));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens<Backend>));
  m.impl("inverse_transform_sample", TORCH_BOX(&inverse_transform_sample<Backend>));
  m.impl("qk_score", TORCH_BOX(&qk_score<Backend>));
  m.impl("block_pool", TORCH_BOX(&block_pool<Backend>));
  m.impl("block_score", TORCH_BOX(&block_score<Backend>));
  m.impl("attention_rows", TORCH_BOX(&attention_rows<Backend>));
  m.impl("attention_columns", TORCH_BOX(&attention_columns<Backend>));
  m.impl("pagerank", TORCH_BOX(&pagerank<Backend>));
  m.impl("similarity_stats", TORCH_BOX(&similarity_stats<Backend>));
  m.impl("transition_stats", TORCH_BOX(&transition_stats<Backend>));
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
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention<Backend>));
  m.impl("sparse_attention_backward", TORCH_BOX(&sparse_attention_backward<Backend>));
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention<Backend>));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward<Backend>));
  m.impl("combine_states", TORCH_BOX(&combine_states<Backend>));
  m.impl("kv_pack", TORCH_BOX(&kv_pack<Backend>));
  m.impl("kv_unpack", TORCH_BOX(&kv_unpack<Backend>));
  m.impl("kv_unpack_into", TORCH_BOX(&kv_unpack_into<Backend>));
  m.impl("kv_append", TORCH_BOX(&kv_append<Backend>));
  m.impl("packed_attention", TORCH_BOX(&packed_attention<Backend>));
  m.impl("packed_qk_score", TORCH_BOX(&packed_qk_score<Backend>));
}

}  // namespace tokred
