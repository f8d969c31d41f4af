// The launch that recomputes rows of packed_attention whose result is NaN.
#pragma once

#include "bind/cuda_kernels.h"

namespace tokred::cuda {

// See sparse_attn/cuda/recompute.cuh.
void mend_packed_rows(const PackedAttentionParams&, Stream);

}  // namespace tokred::cuda
