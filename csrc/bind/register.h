// The implementations of all ops for one backend: what each library registers.
#pragma once

#include "kv_pack/kv_append.h"
#include "kv_pack/kv_pack.h"
#include "kv_pack/kv_unpack.h"
#include "match/bipartite_soft_matching.h"
#include "match/match.h"
#include "merge/merge.h"
#include "merge/unmerge.h"
#include "packed_attn/packed_attention.h"
#include "packed_attn/packed_qk_score.h"
#include "score/attention_rows.h"
#include "score/block_pool.h"
#include "score/block_score.h"
#include "score/pagerank.h"
#include "score/qk_score.h"
#include "score/similarity_stats.h"
#include "sparse_attn/block_sparse_attention.h"
#include "sparse_attn/combine_states.h"
#include "sparse_attn/sparse_attention.h"
#include "topk/compact.h"
#include "topk/gather_tokens.h"
#include "topk/inverse_transform_sample.h"
#include "topk/topk.h"

namespace tokred {

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
#define TOKRED_FRONT(op) m.impl(#op, TORCH_BOX(&op<Backend>));
#define TOKRED_OP(op, Params) TOKRED_FRONT(op)
#include "ops.def"
}

}  // namespace tokred
