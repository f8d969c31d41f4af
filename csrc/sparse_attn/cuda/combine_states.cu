// combine_states reads both halves once and writes the whole.
#include "common/cuda/launch.h"
#include "sparse_attn/cuda/combine_states.cuh"

namespace tokred::cuda {

using namespace attention;

void combine_states(const CombineParams& p, Stream stream) {
  visit_dtype(p.dtype, [&]<class T>() {
    launch(combine_states_kernel<T>, plan_combine_states(p.batch * p.heads * p.queries), stream, p);
  });
}

}  // namespace tokred::cuda
