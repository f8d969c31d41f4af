// bipartite_soft_matching and threshold_matching: one launch for items of up to 1024 tokens, else
// one for the matches and one for the maps.
#include <algorithm>

#include "match/cuda/bipartite_soft_matching.cuh"
#include "match/cuda/launch.h"

namespace tokred::cuda {

int64_t match_workspace(const MatchParams&);
void match(const MatchParams&, Stream);

namespace {

using namespace matching;

template <class Config>
void launch_small_items(const BipartiteParams& p, Stream stream) {
  static_assert(sizeof(SmallMapShared) == kSmallMapBytes);
  static_assert(sizeof(SmallItemShared<Config>) ==
                similarity_shared_bytes(Config::kTiles, Config::kPlanes == 3, Config::kAsync) +
                    kSmallMapBytes);
  const LaunchPlan plan = plan_small_items(shape_of(p.match), current_device().shared_limit);
  launch(small_item_kernel<Config>, plan, stream, p);
}

template <class T>
void map_small_items(const BipartiteParams& p, Stream stream) {
  const MatchShape shape = shape_of(p.match);
  if constexpr (sizeof(T) == 2) {
    if (shape.async()) {
      if (item_tiles(shape, current_device().shared_limit) == kWideItemTiles) {
        return launch_small_items<MatchConfig<T, true, false, kWideItemTiles>>(p, stream);
      }
      return launch_small_items<MatchConfig<T, true, false, kItemTiles>>(p, stream);
    }
  }
  launch_small_items<MatchConfig<T, false, false, kItemTiles>>(p, stream);
}

bool in_one_block(const BipartiteParams& p) {
  return is_small_item(shape_of(p.match), p.tokens, current_device().shared_limit);
}

}  // namespace

int64_t bipartite_soft_matching_workspace(const BipartiteParams& p) {
  if (in_one_block(p)) return 0;
  // The matches are done with theirs before the maps begin.
  return std::max(p.match.batch * map_scratch_bytes(p.tokens, p.match.a.count),
                  match_workspace(p.match));
}

void bipartite_soft_matching(const BipartiteParams& p, Stream stream) {
  if (in_one_block(p)) {
    return visit_dtype(p.match.dtype, [&]<class T>() { map_small_items<T>(p, stream); });
  }
  if (p.match.a.count > 0) match(p.match, stream);
  static_assert(sizeof(LargeMapShared) == kLargeMapBytes);
  launch(token_map_kernel<kMapThreads>, plan_large_items(p.match.batch), stream, p);
}

}  // namespace tokred::cuda
