// Front end of qk_score: checks, allocation, parameters. Compiled for every backend.
#pragma once

#include "attention/inputs.h"
#include "score/params.h"

namespace tokred {

// The head dimensions of q that count: i32 [Hq, F], contiguous.
inline void set_dims(QkScoreParams& p, const OptionalTensor& dims, const Tensor& q) {
  if (!dims) return;
  check_shape(*dims, "dims", {p.heads_q, -1}, "[Hq, F]");
  check_dtype(*dims, "dims", ScalarType::Int);
  check_same_device(*dims, "dims", q, "q");
  TOKRED_CHECK(dims->is_contiguous(), "dims must be contiguous, got strides of a view");
  TOKRED_CHECK(dims->size(1) >= 1 && dims->size(1) <= kMaxHeadDim, "dims must list between 1 and ",
               kMaxHeadDim, " dimensions a head, got ", dims->size(1));
  p.dims = static_cast<const int32_t*>(dims->const_data_ptr());
  p.num_dims = dims->size(1);
}

// Where keys lie in a pool k [1, Hkv, S, D]: i32 [B, N].
inline void set_slots(QkScoreParams& p, const OptionalTensor& slots, const Tensor& q,
                      const Tensor& k) {
  const int64_t batch = slots ? 1 : p.batch;
  TOKRED_CHECK(k.size(0) == batch, "k must have the batch size ", batch,
               slots ? " of a pool, as slots are given," : " of q,", " got shape ",
               shape_string(k));
  p.keys = p.stored_keys = k.size(2);
  if (!slots) return;
  check_slots(*slots, p.batch, "[B, N]", q, "q");
  p.slots = static_cast<const int32_t*>(slots->const_data_ptr());
  p.slots_stride_batch = slots->stride(0);
  p.keys = slots->size(1);
}

// f32 [B, Hq | Hkv | 1, N]; see QkScoreParams.
template <class Backend>
Tensor qk_score(const Tensor& q, const Tensor& k, const Text& reduce, const OptionalTensor& dims,
                std::optional<double> scale, const OptionalTensor& lengths,
                const OptionalTensor& mask, const OptionalTensor& slots) {
  QkScoreParams p{};
  p.dtype = float_dtype(q, "q", false);
  check_heads(q, "q", q);
  check_heads(k, "k", q);
  TOKRED_CHECK(k.size(3) == q.size(3), "k must have the head dimension ", q.size(3),
               " of q, got shape ", shape_string(k));
  check_groups(q.size(1), k.size(1));
  check_head_dim(q, "q", 3);
  check_token_count(k, "k", 2);
  TOKRED_CHECK(q.size(2) >= 1, "q must have at least one query, got shape ", shape_string(q));
  p.q = head_tensor(q);
  p.k = head_tensor(k);
  p.batch = q.size(0);
  p.heads_q = q.size(1);
  p.heads_kv = k.size(1);
  p.queries = q.size(2);
  p.head_dim = q.size(3);
  p.scale = static_cast<float>(attention_scale(scale, p.head_dim));
  p.reduction = parse_reduction(reduce);
  set_slots(p, slots, q, k);
  set_dims(p, dims, q);
  p.lengths = batch_lengths(lengths, p.batch, q, "q", p.lengths_stride);
  p.mask = token_mask(mask, "mask", p.batch, p.keys, true, q, "q", p.mask_stride_batch,
                      p.mask_stride_token);

  Backend backend(q);
  const int64_t heads = reduced_heads(p.reduction, p.heads_q, p.heads_kv);
  Tensor out = allocate(q, {p.batch, heads, p.keys}, ScalarType::Float);
  Scratch workspace(q, backend.qk_score_workspace(p), Backend::kHost);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0 && p.keys > 0) backend.qk_score(p);
  return out;
}

}  // namespace tokred
