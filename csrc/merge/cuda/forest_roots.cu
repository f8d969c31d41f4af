// forest_roots: one launch, of one block an item; 12 bytes a token and round.
#include "common/cuda/launch.h"
#include "merge/cuda/forest_roots.cuh"

namespace tokred::cuda {

void forest_roots(const ForestRootsParams& p, Stream stream) {
  launch(merging::forest_roots_kernel<kItemThreads>, plan_item_scan(p.batch), stream, p);
}

}  // namespace tokred::cuda
