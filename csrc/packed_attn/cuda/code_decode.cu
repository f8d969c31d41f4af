// Launches packed_attention on codes as they are. Bytes as in packed_attention.cu; unpacking takes
// some 1.8 instructions a code with the products, all of the loop six (docs/cuda.md).
#include "packed_attn/cuda/code_decode.cuh"
#include "packed_attn/cuda/launch.h"

namespace tokred::cuda {

using namespace attention;

void launch_code_decode(const PackedDecodeParams& params, const ListShape& shape, int64_t row_tiles,
                        Stream stream) {
  static_assert(sizeof(CodeShared<CodeConfig<1>>) == code_fixed_bytes());
  const CodeDecodeParams p{params,
                           code_copy(side_copy(params.k.packed), side_copy(params.v.packed))};
  const LaunchPlan plan = plan_code_decode(shape, row_tiles, p.copy_of_codes);
  if (params.k.packed.format.rotated) {
    launch(code_decode_kernel<CodeConfig<2>>, plan, stream, p);
  } else {
    launch(code_decode_kernel<CodeConfig<1>>, plan, stream, p);
  }
}

}  // namespace tokred::cuda
