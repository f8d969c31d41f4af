// greedy_select: the launches. [16, 1024, 64] in fp32, k = 256: a block an item reads 256 KiB from
// the L2 cache at every step, about 3 us, 0.7 ms in all.
#include "cluster/cuda/greedy_select.cuh"
#include "common/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace greedy;

template <class T>
void select(const GreedySelectParams& p, const Scratch& s, Stream stream) {
  constexpr int kWidth = std::is_same_v<T, float> || std::is_same_v<T, Loose<float>> ? 4 : 8;
  const int64_t tokens = p.batch * p.x.tokens;
  launch(greedy_prepare_kernel<T, kWidth>, plan_greedy_tokens(tokens), stream, p, s);
  static_assert(sizeof(BestScratch) == kGreedySharedBytes);
  if (p.first == FirstPick::isolated) {
    launch(greedy_isolated_kernel<T, kWidth>, plan_greedy_blocks(tokens), stream, p, s);
  }
  if (p.rule == GreedyRule::facility) {
    const LaunchPlan items = plan_greedy_blocks(p.batch);
    launch(facility_start_kernel<T, kWidth>, items, stream, p, s);
    launch(facility_gains_kernel<T, kWidth>, plan_greedy_blocks(tokens), stream, p, s);
    launch(facility_select_kernel<T, kWidth>, items, stream, p, s);
    return;
  }
  const LaunchPlan plan = plan_greedy_blocks(p.batch * s.parts);
  const int64_t steps = s.parts == 1 ? p.k + 1 : 1;
  for (int64_t step = 0; step <= p.k; step += steps) {
    launch(greedy_select_kernel<T, kWidth>, plan, stream, p, s, step, steps);
  }
}

}  // namespace

int64_t greedy_select_workspace(const GreedySelectParams& p) {
  return greedy_scratch_bytes(p.batch, p.x.tokens, p.channels);
}

void greedy_select(const GreedySelectParams& p, Stream stream) {
  const int64_t tokens = p.batch * p.x.tokens;
  Scratch s{};
  s.parts = greedy_parts(p.x.tokens, p.channels);
  s.best = static_cast<Best*>(p.workspace);
  s.scale = reinterpret_cast<float*>(s.best + 2 * p.batch * s.parts);
  s.value = s.scale + tokens;
  s.score = s.value + tokens;
  s.seen = reinterpret_cast<int32_t*>(s.score + tokens);
  const bool aligned = is_aligned(p.x.data, p.x.stride_batch | p.x.stride_token | p.channels,
                                  p.dtype == DType::f32 ? 4 : 2);
  visit_dtype(p.dtype, [&]<class T>() {
    if (aligned) {
      select<T>(p, s, stream);
    } else {
      select<Loose<T>>(p, s, stream);
    }
  });
}

}  // namespace tokred::cuda
