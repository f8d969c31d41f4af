// match of short rows: the launches.
#include "match/cuda/launch.h"
#include "match/cuda/match_short.cuh"

namespace tokred::cuda {
namespace {

using namespace matching;

template <class T, SimilarityTiles kTiles>
void launch_short(const MatchParams& p, Stream stream) {
  using Config = ShortConfig<T, kTiles>;
  const LaunchPlan plan = plan_match_short(shape_of(p));
  static_assert(
      sizeof(ShortShared<Config>) ==
      tile_bytes(kSimilarityChannels, Config::kRows + kShortStages * kSimilarityColumns, 1) +
          16 * Config::kRows + kShortStages * sizeof(ColumnTerms));
  launch(match_short_kernel<Config>, plan, stream, p);
}

}  // namespace

void match_short(const MatchParams& p, Stream stream) {
  const LaunchPlan terms = plan_column_terms(p.batch, p.b.count);
  const bool wide = match_tiles(shape_of(p)) == kWideTiles;
  const auto run = [&]<class T>() {
    static_assert(sizeof(TermsShared<T>) ==
                  tile_bytes(kSimilarityChannels, kSimilarityColumns, 1) + 16 * kSimilarityColumns);
    launch(column_terms_kernel<T>, terms, stream, p);
    if (wide) return launch_short<T, kWideTiles>(p, stream);
    launch_short<T, kNarrowTiles>(p, stream);
  };
  if (p.dtype == DType::f16) return run.template operator()<f16>();
  run.template operator()<bf16>();
}

}  // namespace tokred::cuda
