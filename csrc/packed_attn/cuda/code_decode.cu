// Launches packed_attention on codes as they are. Bytes as in packed_attention.cu; unpacking takes
// some 1.2 instructions a code, all of the loop less than three.
#include "packed_attn/cuda/code_decode.cuh"
#include "packed_attn/cuda/launch.h"

namespace tokred::cuda {

using namespace attention;

namespace {

SideCopy copies(const PackedRows& rows) {
  const auto of = [](const void* data, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(bytes);
  };
  return side_copy(
      rows.format,
      of(rows.codes, rows.codes_stride_batch | rows.codes_stride_head | rows.codes_stride_token),
      of(rows.params,
         2 * (rows.params_stride_batch | rows.params_stride_head | rows.params_stride_row)));
}

}  // namespace

void launch_code_decode(const PackedDecodeParams& params, const ListShape& shape, int64_t row_tiles,
                        Stream stream) {
  static_assert(sizeof(CodeShared<CodeConfig<1>>) == code_fixed_bytes());
  const CodeDecodeParams p{params, code_stage(copies(params.k.packed), copies(params.v.packed))};
  const LaunchPlan plan = plan_code_decode(shape, row_tiles, p.stage_of_codes);
  if (params.k.packed.format.rotated) {
    launch(code_decode_kernel<CodeConfig<2>>, plan, stream, p);
  } else {
    launch(code_decode_kernel<CodeConfig<1>>, plan, stream, p);
  }
}

}  // namespace tokred::cuda
