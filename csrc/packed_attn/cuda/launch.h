// The launches of packed_attention that stand in files of their own.
#pragma once

#include "attention/cuda/plan_decode.h"
#include "common/cuda/launch.h"
#include "packed_attn/params.h"

namespace tokred::cuda {

// See attention/cuda/recompute.cuh.
void recompute_packed_rows(const PackedAttentionParams&, Stream);

// packed_attention of heads above 256 dimensions; see wide_decode.cuh.
void wide_packed_attention(const PackedAttentionParams&, Stream);

namespace attention {
struct PackedDecodeParams;
}
namespace scoring {
struct QkScoreArgs;
}
// packed_decode_kernel's `row_tiles` where takes_fragments() says so; see code_decode.cuh.
void launch_code_decode(const attention::PackedDecodeParams&, const ListShape&, int64_t row_tiles,
                        Stream);

// packed_score_kernel's work where makes_fragments(k), with `rows` up to kCodeRows of one key head;
// see code_score.cuh.
void launch_code_score(const scoring::QkScoreArgs&, const PackedSide& k, const SlotTable&, Stream);

}  // namespace tokred::cuda
