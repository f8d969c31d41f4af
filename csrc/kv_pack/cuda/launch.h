// Launches of the kv_pack ops, and the lanes of a row as a constant.
#pragma once

#include "common/cuda/launch.h"
#include "kv_pack/cuda/plan.h"

namespace tokred::cuda::packing {

// Packs with pack_runs_kernel, if it can; else nothing happens. Without slots.
bool launch_pack_runs(const KvAppendParams&, int64_t tokens, Stream);

// Of rows of more than kMaxHeadDim channels; see wide_rows.cuh.
void launch_pack_wide(const KvAppendParams&, int64_t tokens, Stream);
void launch_wide_window(const KvAppendParams&, int64_t newest, Stream);
void launch_unpack_wide(const KvUnpackParams&, Stream);

template <class F>
void visit_lanes(int64_t head_dim, F&& f) {
  switch (pack_lanes(head_dim)) {
    case 8: return f.template operator()<8>();
    case 16: return f.template operator()<16>();
    default: return f.template operator()<32>();
  }
}

}  // namespace tokred::cuda::packing
