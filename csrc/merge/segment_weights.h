// Front ends of segment_weights and its gradient: checks, allocation, parameters.
#pragma once

#include <cmath>

#include "merge/merge.h"

namespace tokred {

// The inputs of segment_weights, checked; the result and the members are still to be set.
template <class Backend>
SegmentWeightsParams segment_weights_inputs(const Tensor& ids, int64_t num_segments,
                                            const Text& mode, const OptionalTensor& weight,
                                            const OptionalTensor& x, std::optional<double> sigma) {
  SegmentWeightsParams p{};
  p.mode = parse_choice<SegmentMode>(mode, "mode",
                                     {{"sqrt", SegmentMode::sqrt},
                                      {"last", SegmentMode::last},
                                      {"softmax", SegmentMode::softmax},
                                      {"gaussian", SegmentMode::gaussian}});
  const bool softmax = p.mode == SegmentMode::softmax, gaussian = p.mode == SegmentMode::gaussian;
  TOKRED_CHECK(weight.has_value() || !softmax, "mode softmax needs weight, the logits [B, N]");
  TOKRED_CHECK(!weight || softmax || gaussian, "weight is for the modes softmax and gaussian");
  TOKRED_CHECK(x.has_value() == gaussian,
               gaussian ? "mode gaussian needs x [B, N, C]" : "x is for mode gaussian alone");
  TOKRED_CHECK(!sigma || gaussian, "sigma is for mode gaussian alone");
  TOKRED_CHECK(!sigma || (*sigma > 0 && std::isfinite(*sigma)), "sigma must be positive, got ",
               sigma.value_or(0));
  p.sigma = sigma.value_or(0);

  MergeParams& s = p.segments;
  check_dim(ids, "ids", 2, "[B, N]");
  s.batch = ids.size(0);
  s.tokens = ids.size(1);
  s.num_out = num_segments;
  TOKRED_CHECK(num_segments >= 0 && num_segments < std::numeric_limits<int32_t>::max(),
               "num_segments must be between 0 and 2^31 - 2, got ", num_segments);
  if (gaussian) {
    s.dtype = float_dtype(*x, "x", Backend::kDouble);
    check_shape(*x, "x", {s.batch, s.tokens, -1}, "[B, N, C]");
    check_last_contiguous(*x, "x");
    s.channels = x->size(2);
    s.x = x->const_data_ptr();
    s.x_stride_batch = x->stride(0);
    s.x_stride_token = x->stride(1);
    check_map(ids, "ids", s.batch, s.tokens, *x, "x");
    s.weight = token_table(weight, "weight", *x, s.batch, s.tokens);
  } else {
    const bool wide = weight && weight->scalar_type() == ScalarType::Double && Backend::kDouble;
    s.dtype = wide ? DType::f64 : DType::f32;
    if (weight) {
      check_shape(*weight, "weight", {s.batch, s.tokens}, "[B, N]");
      check_dtype(*weight, "weight", wide ? ScalarType::Double : ScalarType::Float);
      s.weight = {weight->const_data_ptr(), weight->stride(0), weight->stride(1)};
    }
    check_map(ids, "ids", s.batch, s.tokens, weight ? *weight : ids, weight ? "weight" : "ids");
  }
  s.token_map = static_cast<const int32_t*>(ids.const_data_ptr());
  s.map_stride_batch = ids.stride(0);
  s.map_stride_token = ids.stride(1);
  return p;
}

inline ScalarType accumulator_type(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// f32 [B, N]; see SegmentWeightsParams.
template <class Backend>
Tensor segment_weights(const Tensor& ids, int64_t num_segments, const Text& mode,
                       const OptionalTensor& weight, const OptionalTensor& x,
                       std::optional<double> sigma) {
  SegmentWeightsParams p =
      segment_weights_inputs<Backend>(ids, num_segments, mode, weight, x, sigma);
  Backend backend(ids);
  Tensor out =
      allocate(ids, {p.segments.batch, p.segments.tokens}, accumulator_type(p.segments.dtype));
  p.out = out.mutable_data_ptr();
  Scratch members(ids, members_bytes(p.segments), Backend::kHost);
  set_members(p.segments, members.data());
  backend.segment_weights(p);
  return out;
}

// The gradient of weight f32 [B, N], or of x [B, N, C]; see SegmentWeightsBackwardParams.
template <class Backend>
Tensor segment_weights_backward(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                int64_t num_segments, const Text& mode,
                                const OptionalTensor& weight, const OptionalTensor& x,
                                std::optional<double> sigma) {
  SegmentWeightsBackwardParams p{};
  p.forward = segment_weights_inputs<Backend>(ids, num_segments, mode, weight, x, sigma);
  const MergeParams& s = p.forward.segments;
  const bool gaussian = p.forward.mode == SegmentMode::gaussian;
  TOKRED_CHECK(gaussian || p.forward.mode == SegmentMode::softmax,
               "only the modes softmax and gaussian have a gradient");
  const auto table = [&](const Tensor& t, const char* name) -> TokenTable {
    check_shape(t, name, {s.batch, s.tokens}, "[B, N]");
    check_dtype(t, name, accumulator_type(s.dtype));
    check_same_device(t, name, ids, "ids");
    return {t.const_data_ptr(), t.stride(0), t.stride(1)};
  };
  p.grad = table(grad, "grad");
  p.weights = table(weights, "weights");
  Backend backend(ids);
  Tensor out = gaussian ? allocate(ids, {s.batch, s.tokens, s.channels}, x->scalar_type())
                        : allocate(ids, {s.batch, s.tokens}, accumulator_type(s.dtype));
  p.grad_input = out.mutable_data_ptr();
  Scratch members(ids, members_bytes(s), Backend::kHost);
  set_members(p.forward.segments, members.data());
  backend.segment_weights_backward(p);
  return out;
}

}  // namespace tokred
