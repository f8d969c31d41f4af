// The CUDA kernels as bind.cpp sees them: torch-free, one function an op, asynchronous on a stream.
#pragma once

#include "../ops/match_params.h"
#include "../ops/merge_params.h"
#include "../ops/sparse_attn_params.h"

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

}  // namespace tokred::cuda
