// segment_weights and its gradient: what every token weighs among the members of its segment. The
// task of a segment reads its members, and writes their weights; gaussian reads x once (its
// gradient twice), and is bound by that.
#include "common/cpu/vexp.h"
#include "merge/cpu/slots.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kSegmentsPerTask = 32;

template <class A>
TOKRED_INLINE A read(const TokenTable& table, int64_t item, int64_t token) {
  return static_cast<const A*>(table.data)[item * table.stride_batch + token * table.stride_token];
}

// |a - b|^2 in sixteen partial sums over the channels.
template <class T>
TOKRED_INLINE Accumulator<T> squared_distance(const T* a, const T* b, int64_t channels) {
  auto total = splat(Accumulator<T>(0));
  for (int64_t c = 0; c < channels; c += kLanes) {
    const auto difference = load_row(a + c, channels - c) - load_row(b + c, channels - c);
    total = fma(difference, difference, total);
  }
  return sum(total);
}

// weight_i = exp(logit(i)) / sum, in three passes over the members; no logit is above `highest`,
// and none of the exponentials is above 1.
template <class T, class F>
TOKRED_INLINE void write_softmax(const Slot<T>& slot, Accumulator<T> highest, Accumulator<T>* out,
                                 const F& logit) {
  using A = Accumulator<T>;
  const A base = highest == -kInfinity<A> ? A(0) : highest;
  auto total = splat(A(0));
  for (int64_t m = 0; m < slot.count; m += kLanes) {
    const int64_t left = slot.count - m < kLanes ? slot.count - m : kLanes;
    A lane[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      lane[i] = i < left ? logit(slot.members[m + i]) - base : -kInfinity<A>;
    }
    const auto share = exp(load(lane));
    total = total + share;
    store(lane, share);
    for (int64_t i = 0; i < left; ++i) out[slot.members[m + i]] = lane[i];
  }
  const A divisor = sum(total), inverse = divisor == A(0) ? A(0) : A(1) / divisor;
  for (int64_t m = 0; m < slot.count; ++m) out[slot.members[m]] *= inverse;
}

template <class T>
int64_t pivot_of(const Slot<T>& slot) {
  return slot.p.weight.data ? slot.heaviest() : slot.members[slot.count / 2];
}

template <class T>
void write_gaussian(const SegmentWeightsParams& p, const Slot<T>& slot, Accumulator<T>* out) {
  using A = Accumulator<T>;
  const T* pivot = slot.x(pivot_of(slot));
  A total = A(0);
  for (int64_t m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    out[token] = squared_distance(slot.x(token), pivot, p.segments.channels);
    total += out[token];
  }
  const A sigma = static_cast<A>(p.sigma);
  const A variance = sigma > A(0) ? sigma * sigma : total / static_cast<A>(slot.count) + A(1e-8);
  const A scale = A(-0.5) / variance;
  write_softmax(slot, A(0), out, [&](int64_t token) { return out[token] * scale; });
}

template <class T>
void segment_forward(const SegmentWeightsParams& p, const Slot<T>& slot, Accumulator<T>* out) {
  using A = Accumulator<T>;
  switch (p.mode) {
    case SegmentMode::sqrt: {
      const A share = A(1) / square_root(static_cast<A>(slot.count));
      for (int64_t m = 0; m < slot.count; ++m) out[slot.members[m]] = share;
      return;
    }
    case SegmentMode::last: out[slot.members[slot.count - 1]] = A(1); return;
    case SegmentMode::softmax: {
      A highest = -kInfinity<A>;
      for (int64_t m = 0; m < slot.count; ++m) {
        const A logit = slot.weight(slot.members[m]);
        if (logit > highest) highest = logit;
      }
      return write_softmax(slot, highest, out, [&](int64_t token) { return slot.weight(token); });
    }
    case SegmentMode::gaussian: return write_gaussian(p, slot, out);
  }
}

// What is common to forward and backward: every segment that has members, by one task.
template <class T, class F>
void each_segment(const MergeParams& p, const Parallel& parallel, const F& f) {
  list_members(p, parallel);
  const int64_t chunks = (p.num_out + kSegmentsPerTask - 1) / kSegmentsPerTask;
  parallel_tasks(parallel, p.batch * chunks, [&](int64_t task, int64_t) {
    const int64_t item = task / chunks, first = task % chunks * kSegmentsPerTask;
    const int64_t last =
        first + kSegmentsPerTask < p.num_out ? first + kSegmentsPerTask : p.num_out;
    for (int64_t o = first; o < last; ++o) {
      const Slot<T> slot(p, item, o);
      if (slot.count > 0) f(slot);
    }
  });
}

// The gradient of the logits of a segment whose weights are a softmax: w (g - sum w g).
template <class A>
struct LogitGradient {
  const SegmentWeightsBackwardParams& p;
  int64_t item;
  A mean;  // sum w g

  template <class T>
  LogitGradient(const SegmentWeightsBackwardParams& params, const Slot<T>& slot)
      : p(params), item(slot.item), mean(0) {
    for (int64_t m = 0; m < slot.count; ++m) {
      const int64_t token = slot.members[m];
      mean += read<A>(p.weights, item, token) * read<A>(p.grad, item, token);
    }
  }
  A operator()(int64_t token) const {
    return read<A>(p.weights, item, token) * (read<A>(p.grad, item, token) - mean);
  }
};

// With logits -d / 2v, the gradient of d_i is -h_i / 2v for the gradient h of the logits; where v
// is the mean of d, every d_i receives (sum h d) / 2v^2 n besides. d_i gives 2 (x_i - x_pivot) of
// its own to x_i, and takes it from x_pivot.
template <class T>
void gaussian_backward(const SegmentWeightsBackwardParams& p, const Slot<T>& slot, T* grad_x) {
  using A = Accumulator<T>;
  const int64_t channels = slot.p.channels, center = pivot_of(slot);
  const T* pivot = slot.x(center);
  const LogitGradient<A> grad(p, slot);
  A variance = static_cast<A>(p.forward.sigma * p.forward.sigma), through_variance = A(0);
  if (!(p.forward.sigma > 0)) {
    A total = A(0), aligned = A(0);
    for (int64_t m = 0; m < slot.count; ++m) {
      const int64_t token = slot.members[m];
      const A distance = squared_distance(slot.x(token), pivot, channels);
      total += distance;
      aligned += grad(token) * distance;
    }
    const A count = static_cast<A>(slot.count);
    variance = total / count + A(1e-8);
    through_variance = aligned / (A(2) * variance * variance * count);
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    const auto at_pivot = load_row(pivot + c, channels - c);
    auto total = splat(A(0));
    for (int64_t m = 0; m < slot.count; ++m) {
      const int64_t token = slot.members[m];
      const A factor = A(2) * through_variance - grad(token) / variance;
      const auto moved = (load_row(slot.x(token) + c, channels - c) - at_pivot) * splat(factor);
      total = total + moved;
      store_row(grad_x + token * channels + c, moved, channels - c);
    }
    store_row(grad_x + center * channels + c, splat(A(0)) - total, channels - c);
  }
}

}  // namespace

void segment_weights(const SegmentWeightsParams& p, const Parallel& parallel) {
  visit_dtype(p.segments.dtype, [&]<class T>() {
    using A = Accumulator<T>;
    const int64_t tokens = p.segments.tokens;
    A* out = static_cast<A*>(p.out);
    fill_zero(out, p.segments.batch * tokens * static_cast<int64_t>(sizeof(A)));
    each_segment<T>(p.segments, parallel, [&](const Slot<T>& slot) {
      segment_forward(p, slot, out + slot.item * tokens);
    });
  });
}

void segment_weights_backward(const SegmentWeightsBackwardParams& p, const Parallel& parallel) {
  const MergeParams& s = p.forward.segments;
  visit_dtype(s.dtype, [&]<class T>() {
    using A = Accumulator<T>;
    if (p.forward.mode == SegmentMode::gaussian) {
      T* grad_x = static_cast<T*>(p.grad_input);
      const int64_t numbers = s.tokens * s.channels;
      parallel_tasks(parallel, s.batch, [&](int64_t item, int64_t) {
        fill_zero(grad_x + item * numbers, numbers * static_cast<int64_t>(sizeof(T)));
      });
      each_segment<T>(s, parallel, [&](const Slot<T>& slot) {
        gaussian_backward(p, slot, grad_x + slot.item * numbers);
      });
    } else {
      A* grad_weight = static_cast<A*>(p.grad_input);
      fill_zero(grad_weight, s.batch * s.tokens * static_cast<int64_t>(sizeof(A)));
      each_segment<T>(s, parallel, [&](const Slot<T>& slot) {
        const LogitGradient<A> grad(p, slot);
        for (int64_t m = 0; m < slot.count; ++m) {
          const int64_t token = slot.members[m];
          grad_weight[slot.item * s.tokens + token] = grad(token);
        }
      });
    }
  });
}

}  // namespace tokred::TOKRED_ISA
