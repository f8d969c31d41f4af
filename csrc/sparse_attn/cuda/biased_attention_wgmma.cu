// biased_attention and block_sparse_attention forward on wgmma, for compute capability 9.0. Off
// unless the environment variable TOKRED_WGMMA is 1, since it has run on the emulated device only.
// Operations as in biased_attention.cu; at B = 1, H = 32, L = N = 32768, D = 128 in bf16 with 25 %
// of the blocks visible, 4.4 TFLOP: 7.3 ms at the 600 TFLOP/s that wgmma should reach of the 990 of
// an H200, 11 ms at the 400 of mma.sync. With D = 64 the exponentials take as long as the products.
#include <cstdlib>
#include <cstring>

#include "common/cuda/launch.h"
#include "sparse_attn/cuda/biased_attention_wgmma.cuh"
#include "sparse_attn/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace attention;

template <class T, int kDim>
void launch_wgmma(const AttentionParams& p, Stream stream) {
  static_assert(sizeof(WgmmaShared<WgmmaConfig<T, kDim, false>>) == wgmma_shared_bytes(kDim));
  const LaunchPlan plan = plan_wgmma(attention_shape(p));
  if (hides_pairs(p)) {
    launch(wgmma_attention_kernel<WgmmaConfig<T, kDim, true>>, plan, stream, p);
  } else {
    launch(wgmma_attention_kernel<WgmmaConfig<T, kDim, false>>, plan, stream, p);
  }
}

}  // namespace

bool is_wgmma_attention(const AttentionParams& p) {
  const char* wanted = std::getenv("TOKRED_WGMMA");
  if (!wanted || std::strcmp(wanted, "1") != 0 || p.softcap > 0 || p.pair_bias.data) return false;
  const bool aligned = is_aligned<bf16>(p.q) && is_aligned<bf16>(p.k) && is_aligned<bf16>(p.v) &&
                       is_aligned<bf16>(p.out_view());
  return takes_wgmma(attention_shape(p), aligned, current_device().capability);
}

void wgmma_attention(const AttentionParams& p, Stream stream) {
  visit_dtype(p.dtype, [&]<class T>() {
    if constexpr (Operand<T>::kPlanes == 1) {
      if (p.head_dim == 64) return launch_wgmma<T, 64>(p, stream);
      return launch_wgmma<T, 128>(p, stream);
    }
  });
}

}  // namespace tokred::cuda
