// similarity_stats. B = 8, 1370 x 1370, C = 64 in bf16 on an H200: 2.8 MB in, 1.9 GFLOP, 5 us at
// the 400 TFLOP/s of mma.sync, and 15 M similarities of some 20 instructions, 10 us; fp32 takes six
// products.
#include "common/cuda/launch.h"
#include "score/cuda/similarity_stats.cuh"

namespace tokred::cuda {
namespace {

using namespace scoring;

SimilarityArgs similarity_args(const SimilarityStatsParams& p) {
  SimilarityArgs args{};
  args.p = p;
  TokenPairs& m = args.pairs;
  m.a = {p.a,      p.a_stride_batch,      p.a_stride_token,      p.rows,  p.rows, nullptr, 0, 0, 1,
         p.mask_a, p.mask_a_stride_batch, p.mask_a_stride_token, nullptr, 0,      0};
  m.b = {p.b,
         p.b_stride_batch,
         p.b_stride_token,
         p.columns,
         p.columns,
         nullptr,
         0,
         0,
         1,
         p.mask_b,
         p.mask_b_stride_batch,
         p.mask_b_stride_token,
         nullptr,
         0,
         0};
  m.batch = p.batch;
  m.channels = p.channels;
  m.dtype = p.dtype;
  m.metric = p.metric;
  return args;
}

bool has_aligned_rows(const SimilarityStatsParams& p) {
  return is_aligned(p.a, p.a_stride_batch | p.a_stride_token, 2) &&
         is_aligned(p.b, p.b_stride_batch | p.b_stride_token, 2);
}

template <class T, bool kAsync>
void launch_stats(const SimilarityStatsParams& p, Stream stream) {
  using Config = SimilarityConfig<T, kAsync, kNarrowTiles>;
  static_assert(sizeof(SimilarityShared<Config>) ==
                similarity_shared_bytes(kNarrowTiles, Config::kPlanes == 3, kAsync));
  const LaunchPlan plan = plan_similarity_stats(p.batch, p.rows, sizeof(T) == 4, kAsync);
  launch(similarity_stats_kernel<Config>, plan, stream, similarity_args(p));
}

}  // namespace

int64_t similarity_stats_workspace(const SimilarityStatsParams&) { return 0; }

void similarity_stats(const SimilarityStatsParams& p, Stream stream) {
  visit_dtype(p.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      if (has_aligned_rows(p)) return launch_stats<T, true>(p, stream);
    }
    launch_stats<T, false>(p, stream);
  });
}

}  // namespace tokred::cuda
