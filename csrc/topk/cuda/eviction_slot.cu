// eviction_slot: one launch of a block a head; it reads logits and scores once: [8, 32, 1024] 1 MB.
#include "common/cuda/launch.h"
#include "topk/cuda/eviction_slot.cuh"

namespace tokred::cuda {

void eviction_slot(const EvictionSlotParams& p, Stream stream) {
  launch(selecting::eviction_slot_kernel, plan_eviction_slot(p.batch * p.heads), stream, p);
}

}  // namespace tokred::cuda
