// Front end of transition_stats, how a layer changes its tokens.
#pragma once

#include "attention/inputs.h"
#include "score/params.h"

namespace tokred {

// x [B, N, C] with its strides.
inline void check_tokens(const Tensor& x, const char* name, const Tensor& like,
                         const char* like_name) {
  check_dim(x, name, 3, "[B, N, C]");
  check_last_contiguous(x, name);
  check_same_dtype(x, name, like, like_name);
  check_same_device(x, name, like, like_name);
  check_token_count(x, name, 1);
}

// ratio and cosine f32 [B, N]; see TransitionParams.
template <class Backend>
std::tuple<Tensor, Tensor> transition_stats(const Tensor& before, const Tensor& after) {
  TransitionParams p{};
  p.dtype = float_dtype(before, "before", false);
  check_tokens(before, "before", before, "before");
  check_tokens(after, "after", before, "before");
  check_shape(after, "after", {before.size(0), before.size(1), before.size(2)}, "[B, N, C]");
  p.before = before.const_data_ptr();
  p.after = after.const_data_ptr();
  p.before_stride_batch = before.stride(0);
  p.before_stride_token = before.stride(1);
  p.after_stride_batch = after.stride(0);
  p.after_stride_token = after.stride(1);
  p.batch = before.size(0);
  p.tokens = before.size(1);
  p.channels = before.size(2);
  Backend backend(before);
  Tensor ratio = allocate(before, {p.batch, p.tokens}, ScalarType::Float);
  Tensor cosine = allocate(before, {p.batch, p.tokens}, ScalarType::Float);
  p.ratio = static_cast<float*>(ratio.mutable_data_ptr());
  p.cosine = static_cast<float*>(cosine.mutable_data_ptr());
  if (p.batch > 0 && p.tokens > 0) backend.transition_stats(p);
  return moved(ratio, cosine);
}

}  // namespace tokred
