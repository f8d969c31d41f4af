// Launches attention/cuda/recompute.cuh for packed keys and values: a window may hide infinities
// and NaN, and params that were never written may be anything.
#include "common/cuda/launch.h"
#include "packed_attn/cuda/launch.h"
#include "packed_attn/cuda/recompute.cuh"

namespace tokred::cuda {

using namespace attention;

void recompute_packed_rows(const PackedAttentionParams& p, Stream stream) {
  const AttentionParams& a = p.attention;
  visit_dtype(a.dtype, [&]<class T>() {
    launch(recompute_rows_kernel<T, PackedKeys<T>, PackedAttentionParams>,
           plan_delta(attention_shape(a)), stream, p, a, false);
  });
}

}  // namespace tokred::cuda
