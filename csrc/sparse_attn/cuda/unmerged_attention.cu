// unmerged_attention. 28 heads of 729 positions, D = 128, causal: 3.8 GFLOP, 63 us at the
// 60 TFLOP/s of f32 on an H200; the rows of the queries, 10 MB in f32, are written and read once.
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/unmerged_attention.cuh"

namespace tokred::cuda {
namespace {

using namespace unmerged;

int64_t attended_bytes(const UnmergedParams& p) {
  return 4 * p.batch * p.heads_q * p.queries * p.value_dim;
}

template <class T, int kDim>
void launch_rows(const UnmergedArgs& args, Stream stream) {
  const UnmergedParams& p = args.p;
  launch(unmerged_attention_kernel<T, kDim>,
         plan_unmerged_attention(p.batch * p.heads_q, p.queries, kDim), stream, args);
}

}  // namespace

int64_t unmerged_attention_workspace(const UnmergedParams& p) {
  return attended_bytes(p) + 4 * p.batch * (p.query_tokens + p.queries);
}

void unmerged_attention(const UnmergedParams& p, Stream stream) {
  UnmergedArgs args{p, static_cast<float*>(p.workspace), nullptr, nullptr};
  args.first = reinterpret_cast<int32_t*>(static_cast<char*>(p.workspace) + attended_bytes(p));
  args.next = args.first + p.batch * p.query_tokens;
  launch(list_queries_kernel, plan_list_queries(p.batch), stream, args);
  visit_dtype(p.dtype, [&]<class T>() {
    switch (unmerged_dim(p.head_dim, p.value_dim)) {
      case 64: launch_rows<T, 64>(args, stream); break;
      case 128: launch_rows<T, 128>(args, stream); break;
      default: launch_rows<T, 256>(args, stream); break;
    }
    launch(mean_of_queries_kernel<T>, plan_mean_of_queries(p.batch * p.heads_q * p.query_tokens),
           stream, args);
  });
}

}  // namespace tokred::cuda
