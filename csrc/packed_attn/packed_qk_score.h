// Front end of packed_qk_score: checks, allocation, parameters. Compiled for every backend.
#pragma once

#include "packed_attn/sides.h"

namespace tokred {

// f32 [B, Hq | Hkv | 1, T]; see PackedScoreParams.
template <class Backend>
Tensor packed_qk_score(const Tensor& q, const Tensor& codes, const Tensor& params, int64_t bits,
                       int64_t group_size, const Text& axis, const Text& scheme, bool rotated,
                       const OptionalTensor& residual, const Text& reduce,
                       std::optional<double> scale, std::optional<int64_t> length,
                       const OptionalTensor& lengths, const OptionalTensor& mask,
                       const OptionalTensor& slots, const OptionalTensor& levels) {
  PackedScoreParams p{};
  check_dim(q, "q", 4, "[B, Hq, L, D]");
  check_dim(codes, "codes", 4, "[B, Hkv, N, bytes of a row]");
  const SideInputs k =
      packed_side(codes, params, {"", bits, group_size, axis, scheme, rotated, levels}, residual,
                  "residual", length, codes.size(1), q, &p.slots, slots);
  TOKRED_CHECK(k.tokens <= std::numeric_limits<int32_t>::max(),
               "there may be at most 2^31 - 1 tokens, got ", k.tokens);
  const AttentionParams a = packed_query(q, codes.size(1), k.side.packed.format.head_dim, scale);
  TOKRED_CHECK(Backend::kHost || a.head_dim <= kMaxHeadDim,
               "the head dimension of packed keys that are scored must be at most ", kMaxHeadDim,
               " on CUDA, got ", a.head_dim);
  TOKRED_CHECK(a.queries >= 1, "q must have at least one query, got shape ", shape_string(q));
  QkScoreParams& s = p.score;
  s.q = a.q;
  s.k = k.window;
  s.batch = a.batch;
  s.heads_q = a.heads_q;
  s.heads_kv = a.heads_kv;
  s.queries = a.queries;
  s.keys = s.stored_keys = k.tokens;
  s.head_dim = a.head_dim;
  s.dtype = a.dtype;
  s.scale = static_cast<float>(a.scale);
  s.reduction = parse_reduction(reduce);
  s.lengths = batch_lengths(lengths, s.batch, q, "q", s.lengths_stride);
  s.mask = token_mask(mask, "mask", s.batch, s.keys, true, q, "q", s.mask_stride_batch,
                      s.mask_stride_token);
  p.k = k.side;
  TOKRED_CHECK(!lengths || length, "lengths needs length, the largest of them");

  Backend backend(q);
  Tensor out = allocate(q, {s.batch, reduced_heads(s.reduction, s.heads_q, s.heads_kv), s.keys},
                        ScalarType::Float);
  s.out = static_cast<float*>(out.mutable_data_ptr());
  Scratch workspace(q, backend.packed_qk_score_workspace(p), Backend::kHost);
  s.workspace = workspace.data();
  backend.packed_qk_score(p);
  return out;
}

}  // namespace tokred
