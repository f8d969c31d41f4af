// Which match kernel runs, and how it is launched.
#include "common/cuda/launch.h"
#include "match/cuda/token_map.cuh"

namespace tokred::cuda {
namespace {

using namespace matching;

bool has_aligned_rows(const TokenSet& set) {
  return is_aligned(set.data, set.stride_batch | set.stride_token, 2);
}

MatchShape shape_of(const MatchParams& p) {
  return {p.batch, p.a.count, p.dtype == DType::f32, has_aligned_rows(p.a) && has_aligned_rows(p.b),
          p.band >= 0 || p.a.weight || p.b.weight};
}

template <class Config>
void launch_match(const MatchParams& p, Stream stream) {
  static_assert(sizeof(SimilarityShared<Config>) ==
                similarity_shared_bytes(Config::kTiles, Config::kPlanes == 3, Config::kAsync));
  launch(match_kernel<Config>, plan_match(shape_of(p)), stream, p);
}

template <class T>
void match_rows(const MatchParams& p, Stream stream) {
  const MatchShape shape = shape_of(p);
  if constexpr (sizeof(T) == 2) {
    if (shape.async()) {
      if (shape.general) return launch_match<MatchConfig<T, true, true, kNarrowTiles>>(p, stream);
      if (match_tiles(shape) == kWideTiles) {
        return launch_match<MatchConfig<T, true, false, kWideTiles>>(p, stream);
      }
      return launch_match<MatchConfig<T, true, false, kNarrowTiles>>(p, stream);
    }
  }
  if (shape.general) return launch_match<MatchConfig<T, false, true, kNarrowTiles>>(p, stream);
  return launch_match<MatchConfig<T, false, false, kNarrowTiles>>(p, stream);
}

template <class Config>
void launch_small_items(const BipartiteParams& p, Stream stream) {
  static_assert(sizeof(SmallPlanShared) == kSmallPlanBytes);
  static_assert(sizeof(SmallItemShared<Config>) ==
                similarity_shared_bytes(Config::kTiles, Config::kPlanes == 3, Config::kAsync) +
                    kSmallPlanBytes);
  launch(small_item_kernel<Config>, plan_small_items(shape_of(p.match)), stream, p);
}

template <class T>
void plan_small(const BipartiteParams& p, Stream stream) {
  const MatchShape shape = shape_of(p.match);
  if constexpr (sizeof(T) == 2) {
    if (shape.async()) {
      if (item_tiles(shape) == kWideItemTiles) {
        return launch_small_items<MatchConfig<T, true, false, kWideItemTiles>>(p, stream);
      }
      return launch_small_items<MatchConfig<T, true, false, kItemTiles>>(p, stream);
    }
  }
  launch_small_items<MatchConfig<T, false, false, kItemTiles>>(p, stream);
}

}  // namespace

int64_t match_workspace(const MatchParams&) { return 0; }

void match(const MatchParams& p, Stream stream) {
  MatchParams bounded = p;
  if (bounded.band > kNobody) bounded.band = kNobody;  // no limit either way, but sums fit
  visit_dtype(p.dtype, [&]<class T>() { match_rows<T>(bounded, stream); });
}

int64_t bipartite_soft_matching_workspace(const BipartiteParams& p) {
  if (is_small_item(p.tokens, p.match.a.count)) return 0;
  return p.match.batch * plan_scratch_bytes(p.tokens, p.match.a.count);
}

void bipartite_soft_matching(const BipartiteParams& p, Stream stream) {
  if (is_small_item(p.tokens, p.match.a.count)) {
    return visit_dtype(p.match.dtype, [&]<class T>() { plan_small<T>(p, stream); });
  }
  if (p.match.a.count > 0) match(p.match, stream);
  static_assert(sizeof(PlanShared) == kLargePlanBytes);
  launch(plan_kernel<kPlanThreads>, plan_large_items(p.match.batch), stream, p);
}

}  // namespace tokred::cuda
