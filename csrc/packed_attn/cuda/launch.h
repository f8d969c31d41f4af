// The launch that recomputes rows of packed_attention whose result is NaN.
#pragma once

#include "common/cuda/launch.h"
#include "packed_attn/params.h"

namespace tokred::cuda {

// See attention/cuda/recompute.cuh.
void recompute_packed_rows(const PackedAttentionParams&, Stream);

}  // namespace tokred::cuda
