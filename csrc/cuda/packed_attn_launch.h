// How packed_attention reaches the kernel that does rows again.
#pragma once

#include "kernels.h"

namespace tokred::cuda {

// See sparse_attn_mend.cuh.
void mend_packed_rows(const PackedAttentionParams&, Stream);

}  // namespace tokred::cuda
