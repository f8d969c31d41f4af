// match: the choice of tiles, and the launch.
#include <limits>

#include "match/cuda/launch.h"
#include "match/cuda/match.cuh"

namespace tokred::cuda {

void match_short(const MatchParams&, Stream);

namespace {

using namespace matching;

template <class Config>
void launch_match(const MatchParams& p, Stream stream) {
  static_assert(sizeof(SimilarityShared<Config>) ==
                similarity_shared_bytes(Config::kTiles, Config::kPlanes == 3, Config::kAsync));
  const LaunchPlan plan = plan_match(shape_of(p));
  if constexpr (Config::kGeneral) {
    if (p.k > 1) return launch(match_many_kernel<Config>, plan, stream, p);
  }
  launch(match_kernel<Config>, plan, stream, p);
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

}  // namespace

int64_t match_workspace(const MatchParams& p) {
  if (!is_short(p)) return 0;
  return p.batch * column_tiles(p.b.count) * static_cast<int64_t>(sizeof(ColumnTerms));
}

void match(const MatchParams& p, Stream stream) {
  if (is_short(p)) return match_short(p, stream);
  constexpr int64_t kMaxRow = std::numeric_limits<int32_t>::max();
  MatchParams bounded = p;
  if (bounded.band > kMaxRow) bounded.band = kMaxRow;  // no limit either way, but sums fit
  visit_dtype(p.dtype, [&]<class T>() { match_rows<T>(bounded, stream); });
}

}  // namespace tokred::cuda
