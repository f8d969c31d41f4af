// The CUDA kernels as bind.cpp sees them: torch-free, one function an op, asynchronous on a stream.
#pragma once

#include "match/params.h"
#include "merge/params.h"
#include "packed_attn/params.h"
#include "topk/params.h"

namespace tokred::cuda {

using Stream = void*;  // a cudaStream_t

int64_t match_workspace(const MatchParams&);  // bytes; enough for bipartite_soft_matching too
void match(const MatchParams&, Stream);
void bipartite_soft_matching(const BipartiteParams&, Stream);
void merge(const MergeParams&, Stream);
void merge_backward(const MergeBackwardParams&, Stream);
void unmerge(const UnmergeParams&, Stream);
void compose(const ComposeParams&, Stream);
void biased_attention(const AttentionParams&, Stream);
void biased_attention_backward(const AttentionBackwardParams&, Stream);

// Workspaces are in bytes.
int64_t topk_workspace(const TopkParams&);
void topk(const TopkParams&, Stream);
void compact(const CompactParams&, Stream);
void gather_tokens(const GatherParams&, Stream);
int64_t inverse_transform_sample_workspace(const InverseTransformParams&);
void inverse_transform_sample(const InverseTransformParams&, Stream);
int64_t qk_score_workspace(const QkScoreParams&);
void qk_score(const QkScoreParams&, Stream);
void block_pool(const BlockPoolParams&, Stream);
int64_t block_score_workspace(const BlockScoreParams&);
void block_score(const BlockScoreParams&, Stream);
void attention_rows(const AttentionRowsParams&, Stream);
void attention_columns(const AttentionColumnsParams&, Stream);
int64_t similarity_stats_workspace(const SimilarityStatsParams&);
void similarity_stats(const SimilarityStatsParams&, Stream);
void transition_stats(const TransitionParams&, Stream);
int64_t attention_workspace(const AttentionParams&);
int64_t sparse_attention_workspace(const SparseAttentionParams&);
void sparse_attention(const SparseAttentionParams&, Stream);
int64_t sparse_attention_backward_workspace(const SparseAttentionBackwardParams&);
void sparse_attention_backward(const SparseAttentionBackwardParams&, Stream);
void combine_states(const CombineParams&, Stream);
void kv_pack(const KvPackParams&, Stream);
void kv_unpack(const KvUnpackParams&, Stream);
void kv_append(const KvAppendParams&, Stream);
int64_t packed_attention_workspace(const PackedAttentionParams&);
void packed_attention(const PackedAttentionParams&, Stream);
int64_t packed_qk_score_workspace(const PackedScoreParams&);
void packed_qk_score(const PackedScoreParams&, Stream);

}  // namespace tokred::cuda
