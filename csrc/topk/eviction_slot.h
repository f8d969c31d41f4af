// Front end of eviction_slot: checks, allocation, parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "tensor.h"
#include "topk/params.h"

namespace tokred {

// Numbers of every key, f32 [B, H, N]; null if absent.
inline const float* key_numbers(const OptionalTensor& t, const char* name, int64_t batch,
                                int64_t heads, const Tensor& position, int64_t& stride_batch,
                                int64_t& stride_head) {
  if (!t) return nullptr;
  check_shape(*t, name, {batch, heads, position.size(2)}, heads < 0 ? "[B, Hq, N]" : "[B, H, N]");
  check_dtype(*t, name, ScalarType::Float);
  check_same_device(*t, name, position, "position");
  check_last_contiguous(*t, name);
  stride_batch = t->stride(0);
  stride_head = t->stride(1);
  return static_cast<const float*>(t->const_data_ptr());
}

inline void set_received(EvictionSlotParams& p, const OptionalTensor& logits,
                         const OptionalTensor& lse, std::optional<double> softcap,
                         const Tensor& position) {
  TOKRED_CHECK(logits.has_value() == lse.has_value(),
               "logits and lse go together, got one of the two");
  if (softcap) {
    const auto cap = static_cast<float>(*softcap);
    TOKRED_CHECK(cap > 0 && std::isfinite(cap), "softcap must be positive and finite, got ",
                 *softcap);
    p.softcap = cap;
  }
  if (!logits) return;
  p.logits = key_numbers(logits, "logits", p.batch, -1, position, p.logits_stride_batch,
                         p.logits_stride_head);
  p.heads_q = logits->size(1);
  TOKRED_CHECK(p.heads > 0 ? p.heads_q > 0 && p.heads_q % p.heads == 0 : p.heads_q == 0,
               "the heads of logits must be a multiple of the heads of position, got ", p.heads_q,
               " and ", p.heads);
  const bool has_query = lse->dim() == 3 && lse->size(2) == 1;
  TOKRED_CHECK(
      (lse->dim() == 2 || has_query) && lse->size(0) == p.batch && lse->size(1) == p.heads_q,
      "lse must be [B, Hq] or [B, Hq, 1] with B = ", p.batch, ", Hq = ", p.heads_q, ", got shape ",
      shape_string(*lse));
  check_dtype(*lse, "lse", ScalarType::Float);
  check_same_device(*lse, "lse", position, "position");
  p.lse = static_cast<const float*>(lse->const_data_ptr());
  p.lse_stride_batch = lse->stride(0);
  p.lse_stride_head = lse->stride(1);
}

inline void set_hidden(EvictionSlotParams& p, const OptionalTensor& bias,
                       const OptionalTensor& start, const OptionalTensor& newest,
                       const Tensor& position) {
  if (bias) {
    check_dim(*bias, "bias", 3, "[B | 1, H | 1, N]");
    check_dtype(*bias, "bias", ScalarType::Float);
    check_same_device(*bias, "bias", position, "position");
    check_last_contiguous(*bias, "bias");
    TOKRED_CHECK((bias->size(0) == p.batch || bias->size(0) == 1) &&
                     (bias->size(1) == p.heads || bias->size(1) == 1) && bias->size(2) == p.slots,
                 "bias must be [B | 1, H | 1, N] with B = ", p.batch, ", H = ", p.heads,
                 ", N = ", p.slots, ", got shape ", shape_string(*bias));
    p.bias = static_cast<const float*>(bias->const_data_ptr());
    p.bias_stride_batch = broadcast_stride(*bias, 0);
    p.bias_stride_head = broadcast_stride(*bias, 1);
  }
  if (start) {
    check_shape(*start, "start", {p.batch}, "[B]");
    check_dtype(*start, "start", ScalarType::Int);
    check_same_device(*start, "start", position, "position");
    p.start = static_cast<const int32_t*>(start->const_data_ptr());
    p.start_stride = start->stride(0);
  }
  if (newest) {
    check_shape(*newest, "newest", {p.batch, p.heads, 1}, "[B, H, 1]");
    check_dtype(*newest, "newest", ScalarType::Int);
    check_same_device(*newest, "newest", position, "position");
    p.newest = static_cast<const int32_t*>(newest->const_data_ptr());
    p.newest_stride_batch = newest->stride(0);
    p.newest_stride_head = newest->stride(1);
  }
}

// slot i32 [B, H, 1] and total f32 [B, H, N], or [B, H, 0] without logits; see EvictionSlotParams.
template <class Backend>
std::tuple<Tensor, Tensor> eviction_slot(const Tensor& position, int64_t length,
                                         const OptionalTensor& scores, const OptionalTensor& logits,
                                         const OptionalTensor& lse, const OptionalTensor& bias,
                                         const OptionalTensor& start, const OptionalTensor& newest,
                                         int64_t first, int64_t recent, bool shared, bool largest,
                                         std::optional<double> softcap) {
  EvictionSlotParams p{};
  check_dim(position, "position", 3, "[B, H, N]");
  check_dtype(position, "position", ScalarType::Int);
  check_last_contiguous(position, "position");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TOKRED_CHECK(position.size(2) <= kMax, "position may have at most 2^31 - 1 keys, got ",
               position.size(2));
  TOKRED_CHECK(length >= 0, "length must be at least 0, got ", length);
  TOKRED_CHECK(first >= 0, "first must be at least 0, got ", first);
  TOKRED_CHECK(recent >= 0, "recent must be at least 0, got ", recent);
  p.position = static_cast<const int32_t*>(position.const_data_ptr());
  p.position_stride_batch = position.stride(0);
  p.position_stride_head = position.stride(1);
  p.batch = position.size(0);
  p.heads = position.size(1);
  p.slots = position.size(2);
  p.scores = key_numbers(scores, "scores", p.batch, p.heads, position, p.scores_stride_batch,
                         p.scores_stride_head);
  set_received(p, logits, lse, softcap, position);
  set_hidden(p, bias, start, newest, position);
  p.first = std::min(first, int64_t{1} << 32);
  p.recent_after = static_cast<int32_t>(std::clamp(length - 1 - recent, -kMax - 1, kMax));
  p.shared = shared;
  p.largest = largest;
  Backend backend(position);
  Tensor slot = allocate(position, {p.batch, p.heads, 1}, ScalarType::Int);
  Tensor total = allocate(position, {p.batch, p.heads, logits ? p.slots : 0}, ScalarType::Float);
  p.slot = static_cast<int32_t*>(slot.mutable_data_ptr());
  if (logits) p.total = static_cast<float*>(total.mutable_data_ptr());
  if (p.batch > 0 && p.heads > 0) backend.eviction_slot(p);
  return moved(slot, total);
}

}  // namespace tokred
