// Launches the packing of rows that are runs. Bytes as in kv_pack.cu; some ten instructions a
// number (docs/cuda.md) hide behind them.
#include "kv_pack/cuda/launch.h"
#include "kv_pack/cuda/pack_runs.cuh"

namespace tokred::cuda::packing {
namespace {

template <class T, int kBits>
void launch_groups(const KvAppendParams& p, const RunLayout& layout, Stream stream) {
  const LaunchPlan plan = plan_pack_runs(p.batch * p.heads, layout);
  switch (layout.groups) {
    case 1: return launch(pack_runs_kernel<T, kBits, 1>, plan, stream, p, layout);
    case 2:
      if constexpr (kBits <= 4) launch(pack_runs_kernel<T, kBits, 2>, plan, stream, p, layout);
      return;
    default:
      if constexpr (kBits == 2) launch(pack_runs_kernel<T, kBits, 4>, plan, stream, p, layout);
  }
}

}  // namespace

bool launch_pack_runs(const KvAppendParams& p, int64_t tokens, Stream stream) {
  if (p.slots.data) return false;
  const PackedRows& packed = p.packed;
  const auto strides =
      packed.codes_stride_batch | packed.codes_stride_head | packed.codes_stride_token;
  const bool whole_codes =
      (reinterpret_cast<uintptr_t>(packed.codes) | static_cast<uintptr_t>(strides)) % 8 == 0;
  bool launched = false;
  visit_dtype(p.dtype, [&]<class T>() {
    const bool aligned = whole_codes && is_aligned<T>(p.x) && is_aligned<T>(p.window);
    if (!packs_runs(packed.format, aligned)) return;
    const RunLayout layout = run_layout(packed.format, tokens);
    switch (packed.format.bits) {
      case 2: launch_groups<T, 2>(p, layout, stream); break;
      case 4: launch_groups<T, 4>(p, layout, stream); break;
      default: launch_groups<T, 8>(p, layout, stream);
    }
    launched = true;
  });
  return launched;
}

}  // namespace tokred::cuda::packing
