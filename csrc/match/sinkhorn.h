// Front ends of sinkhorn and its gradient: checks, allocation, parameters.
#pragma once

#include <algorithm>
#include <cmath>

#include "match/match.h"
#include "match/params.h"
#include "tensor.h"

namespace tokred {

// Two f32 tensors [B, M, ..] and [B, N, ..] that come together, `width` numbers a token.
inline void token_numbers(const OptionalTensor& t, const char* name, const Tensor& tokens,
                          int64_t width, const float*& data, int64_t (&stride)[2]) {
  if (!t) return;
  if (width > 1) {
    check_shape(*t, name, {tokens.size(0), tokens.size(1), width}, "[B, tokens, 2]");
    check_last_contiguous(*t, name);
  } else {
    check_shape(*t, name, {tokens.size(0), tokens.size(1)}, "[B, tokens]");
  }
  check_dtype(*t, name, ScalarType::Float);
  check_same_device(*t, name, tokens, "x");
  data = static_cast<const float*>(t->const_data_ptr());
  stride[0] = t->stride(0);
  stride[1] = t->stride(1);
}

// The inputs of sinkhorn, checked; the tolerance and the results are still to be set.
inline SinkhornParams sinkhorn_inputs(
    const Tensor& x, const Tensor& anchors, const OptionalTensor& position_x,
    const OptionalTensor& position_anchors, const OptionalTensor& time_x,
    const OptionalTensor& time_anchors, const OptionalTensor& mask_x,
    const OptionalTensor& mask_anchors, const OptionalTensor& offset, double position_weight,
    double time_scale, double eps, int64_t iterations) {
  SinkhornParams p{};
  p.metric = Metric::cosine;
  p.dtype = float_dtype(x, "x", false);
  p.a = token_set(x, "x", mask_x, "mask_x", {}, "");
  p.b = token_set(anchors, "anchors", mask_anchors, "mask_anchors", {}, "");
  check_same_dtype(anchors, "anchors", x, "x");
  check_same_device(anchors, "anchors", x, "x");
  TOKRED_CHECK(x.size(0) == anchors.size(0) && x.size(2) == anchors.size(2),
               "anchors must have the batch and channel sizes of x ", shape_string(x),
               ", got shape ", shape_string(anchors));
  TOKRED_CHECK(position_x.has_value() == position_anchors.has_value(),
               "position_x and position_anchors go together, got one of them");
  TOKRED_CHECK(time_x.has_value() == time_anchors.has_value(),
               "time_x and time_anchors go together, got one of them");
  token_numbers(position_x, "position_x", x, 2, p.position_a, p.position_a_stride);
  token_numbers(position_anchors, "position_anchors", anchors, 2, p.position_b,
                p.position_b_stride);
  token_numbers(time_x, "time_x", x, 1, p.time_a, p.time_a_stride);
  token_numbers(time_anchors, "time_anchors", anchors, 1, p.time_b, p.time_b_stride);
  if (offset) {
    check_shape(*offset, "offset", {x.size(0)}, "[B]");
    check_dtype(*offset, "offset", ScalarType::Float);
    check_same_device(*offset, "offset", x, "x");
    p.offset = static_cast<const float*>(offset->const_data_ptr());
    p.offset_stride = offset->stride(0);
  }
  TOKRED_CHECK(std::isfinite(position_weight), "position_weight must be finite, got ",
               position_weight);
  TOKRED_CHECK(std::isfinite(time_scale) && time_scale > 0,
               "time_scale must be positive and finite, got ", time_scale);
  TOKRED_CHECK(std::isfinite(eps) && eps >= 1e-6, "eps must be finite and at least 1e-6, got ",
               eps);
  TOKRED_CHECK(iterations >= 1, "iterations must be at least 1, got ", iterations);
  p.position_weight = static_cast<float>(position_weight);
  p.time_scale = static_cast<float>(time_scale);
  p.eps = static_cast<float>(eps);
  p.iterations = iterations;
  p.batch = x.size(0);
  p.channels = x.size(2);
  return p;
}

// aggregation f32 [B, N, C], load f32 [B, N], peak f32 [B, M], log_u f32 [B, M], log_v f32 [B, N],
// steps i32 [B]; see SinkhornParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& x, const Tensor& anchors, const OptionalTensor& position_x,
    const OptionalTensor& position_anchors, const OptionalTensor& time_x,
    const OptionalTensor& time_anchors, const OptionalTensor& mask_x,
    const OptionalTensor& mask_anchors, const OptionalTensor& offset, double position_weight,
    double time_scale, double eps, int64_t iterations, double tolerance) {
  SinkhornParams p =
      sinkhorn_inputs(x, anchors, position_x, position_anchors, time_x, time_anchors, mask_x,
                      mask_anchors, offset, position_weight, time_scale, eps, iterations);
  TOKRED_CHECK(tolerance >= 0, "tolerance must be at least 0, got ", tolerance);
  p.tolerance = static_cast<float>(tolerance);

  Backend backend(x);
  const auto floats = [&](std::initializer_list<int64_t> shape, float*& data) {
    Tensor t = allocate(x, shape, ScalarType::Float);
    data = static_cast<float*>(t.mutable_data_ptr());
    return t;
  };
  Tensor aggregation = floats({p.batch, p.b.count, p.channels}, p.aggregation);
  Tensor load = floats({p.batch, p.b.count}, p.load);
  Tensor peak = floats({p.batch, p.a.count}, p.peak);
  Tensor log_u = floats({p.batch, p.a.count}, p.log_u);
  Tensor log_v = floats({p.batch, p.b.count}, p.log_v);
  Tensor steps = allocate(x, {p.batch}, ScalarType::Int);
  p.steps = static_cast<int32_t*>(steps.mutable_data_ptr());
  Scratch workspace(x, backend.sinkhorn_workspace(p), Backend::kHost);
  p.workspace = workspace.data();
  if (p.batch > 0) backend.sinkhorn(p);
  return moved(aggregation, load, peak, log_u, log_v, steps);
}

// Gradients of x [B, M, C] and anchors [B, N, C]; see SinkhornBackwardParams.
template <class Backend>
std::tuple<Tensor, Tensor> sinkhorn_backward(
    const Tensor& grad_aggregation, const Tensor& grad_load, const Tensor& x, const Tensor& anchors,
    const OptionalTensor& position_x, const OptionalTensor& position_anchors,
    const OptionalTensor& time_x, const OptionalTensor& time_anchors, const OptionalTensor& mask_x,
    const OptionalTensor& mask_anchors, const OptionalTensor& offset, const Tensor& steps,
    double position_weight, double time_scale, double eps, int64_t iterations) {
  SinkhornBackwardParams p{};
  p.forward =
      sinkhorn_inputs(x, anchors, position_x, position_anchors, time_x, time_anchors, mask_x,
                      mask_anchors, offset, position_weight, time_scale, eps, iterations);
  const SinkhornParams& f = p.forward;
  check_shape(grad_aggregation, "grad_aggregation", {f.batch, f.b.count, f.channels}, "[B, N, C]");
  check_last_contiguous(grad_aggregation, "grad_aggregation");
  check_shape(grad_load, "grad_load", {f.batch, f.b.count}, "[B, N]");
  for (const auto& [grad, name] :
       {std::pair{&grad_aggregation, "grad_aggregation"}, std::pair{&grad_load, "grad_load"}}) {
    check_dtype(*grad, name, ScalarType::Float);
    check_same_device(*grad, name, x, "x");
  }
  check_shape(steps, "steps", {f.batch}, "[B]");
  check_dtype(steps, "steps", ScalarType::Int);
  check_same_device(steps, "steps", x, "x");
  p.grad_aggregation = static_cast<const float*>(grad_aggregation.const_data_ptr());
  p.grad_load = static_cast<const float*>(grad_load.const_data_ptr());
  for (int dim = 0; dim < 2; ++dim) {
    p.aggregation_stride[dim] = grad_aggregation.stride(dim);
    p.load_stride[dim] = grad_load.stride(dim);
  }
  p.steps = static_cast<const int32_t*>(steps.const_data_ptr());
  p.steps_stride = steps.stride(0);
  // Steps are kept: as many as were made where the host can see that.
  p.max_steps = iterations;
  if (Backend::kHost) {
    int64_t made = 0;
    for (int64_t b = 0; b < f.batch; ++b) {
      made = std::max<int64_t>(made, p.steps[b * p.steps_stride]);
    }
    p.max_steps = std::min(iterations, made);
  } else {
    TOKRED_CHECK(iterations <= kMaxKeptSteps, "iterations must be at most ", kMaxKeptSteps,
                 " for a gradient on a device, got ", iterations);
  }

  Backend backend(x);
  Tensor grad_x = allocate(x, {f.batch, f.a.count, f.channels}, x.scalar_type());
  Tensor grad_anchors = allocate(x, {f.batch, f.b.count, f.channels}, x.scalar_type());
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_anchors = grad_anchors.mutable_data_ptr();
  Scratch workspace(x, backend.sinkhorn_backward_workspace(p), Backend::kHost);
  p.workspace = workspace.data();
  if (f.batch > 0) backend.sinkhorn_backward(p);
  return moved(grad_x, grad_anchors);
}

}  // namespace tokred
