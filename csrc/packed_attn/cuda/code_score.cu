// Launches packed_qk_score on codes as they are. Bytes as in packed_qk_score.cu.
#include "packed_attn/cuda/code_score.cuh"
#include "packed_attn/cuda/launch.h"

namespace tokred::cuda {

using namespace scoring;

void launch_code_score(const QkScoreArgs& score, const PackedSide& k, const SlotTable& slots,
                       Stream stream) {
  using attention::CodeConfig;
  static_assert(sizeof(CodeScoreShared<CodeConfig<1>>) == code_score_fixed_bytes());
  CodeScoreArgs a{score, k, slots, side_copy(k.packed)};
  const QkScoreParams& p = score.p;
  const int64_t heads = p.batch * p.heads_kv;
  a.score.chunk = code_score_chunk(heads, p.keys);
  const LaunchPlan plan = plan_code_score(heads, p.keys, a.copy);
  if (score.query_dtype == DType::f32) {
    launch(code_score_kernel<CodeConfig<2>>, plan, stream, a);
  } else {
    launch(code_score_kernel<CodeConfig<1>>, plan, stream, a);
  }
}

}  // namespace tokred::cuda
