// sinkhorn_backward: the steps of an item once more, this time kept, and then back through them. A
// step back passes once over the gradient of the scores, two exponentials an entry.
//
// M = 603, N = 126, C = 1152: four products of 0.18 GFLOP beside the costs, 4.5 ms at 200 GFLOP/s;
// a step and its gradient take 0.23 M exponentials.
#include "common/cpu/parallel.h"
#include "match/cpu/transport.h"

namespace tokred::TOKRED_ISA {
namespace {

// One worker's memory.
struct Scratch {
  TransportScratch transport;
  float* log_u;   // [steps][M, padded] after every step
  float* log_v;   // [steps + 1][padded] the same, and before the first
  float* grad;    // [M][padded] of the scores, then of the cosines
  float* panels;  // as large as those of the transport, or [N][C, padded] sums
  float* cosine;  // [kTransportRows][C, padded] the part of a gradient that comes from the cosine
  float* direct;  // [kTransportRows][C, padded] the part that comes from the aggregation
  float* grad_v;  // [padded] of log_v
  float* next_v;  // [padded] of log_v a step earlier
  float* load;  // [padded] gradient of the loads
};

Scratch allocate_scratch(Workspace& memory, const SinkhornBackwardParams& p) {
  const SinkhornParams& f = p.forward;
  const int64_t padded = round_up(f.b.count, kLanes), channels = round_up(f.channels, kLanes);
  Scratch s;
  s.transport = allocate_transport(memory, f);
  s.log_u = memory.allocate<float>(p.max_steps * round_up(f.a.count, kLanes));
  s.log_v = memory.allocate<float>((p.max_steps + 1) * padded);
  s.grad = memory.allocate<float>(f.a.count * padded);
  s.panels = memory.allocate<float>(max(padded, kTransportRows) * channels);
  s.cosine = memory.allocate<float>(kTransportRows * channels);
  s.direct = memory.allocate<float>(kTransportRows * channels);
  s.grad_v = memory.allocate<float>(padded);
  s.next_v = memory.allocate<float>(padded);
  s.load = memory.allocate<float>(padded);
  return s;
}
int64_t scratch_bytes(const SinkhornBackwardParams& p) {
  return workspace_bytes([&](Workspace& memory) { allocate_scratch(memory, p); });
}

// The gradient of a row of tokens whose unit vector has the gradient `cosine`, plus `direct` where
// there is one. A row of no length has no direction, and no gradient through it.
template <class T>
void write_gradient(const T* row, const float* cosine, const float* direct, int64_t channels,
                    T* to) {
  const float inverse = inverse_norm(squared_norm(row, channels));
  const f32x16 scale = splat(inverse < 1 / kNormEps ? inverse : 0.0f);
  f32x16 total = splat(0.0f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    total = fma(load_row(row + c, channels - c), load(cosine + c), total);
  }
  const f32x16 along = splat(sum(total)) * scale;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const f32x16 unit = load_row(row + c, channels - c) * scale;
    const f32x16 across = (load(cosine + c) - unit * along) * scale;
    store_row(to + c, direct ? across + load(direct + c) : across, channels - c);
  }
}

template <class T>
class Item : Transport<T> {
  using Base = Transport<T>;
  using Base::log_a_, Base::log_b_, Base::source, Base::anchor, Base::skipped, Base::scores;
  using Base::p_, Base::item_, Base::s_, Base::m_, Base::n_, Base::padded_;

 public:
  Item(const SinkhornBackwardParams& p, int64_t item, const Scratch& s)
      : Base(p.forward, item, s.transport), b_(p), own_(s), rows_(round_up(m_, kLanes)),
        channels_(p_.channels), wide_(round_up(channels_, kLanes)) {}

  void run() {
    Base::prepare();
    steps_ = max(int64_t{0}, min(b_.max_steps, int64_t{b_.steps[item_ * b_.steps_stride]}));
    if (Base::is_empty() || steps_ == 0) {
      fill_zero(grad_x(0), m_ * channels_ * static_cast<int64_t>(sizeof(T)));
      fill_zero(grad_anchor(0), n_ * channels_ * static_cast<int64_t>(sizeof(T)));
      return;
    }
    make_steps();
    start_back();
    for (int64_t step = steps_; step > 0; --step) step_back(step);
    scale_gradients();
    write_anchors();
    write_sources();
  }

 private:
  T* grad_x(int64_t i) const { return static_cast<T*>(b_.grad_x) + (item_ * m_ + i) * channels_; }
  T* grad_anchor(int64_t j) const {
    return static_cast<T*>(b_.grad_anchors) + (item_ * n_ + j) * channels_;
  }
  bool left_out(int64_t j) const { return j >= n_ || s_.skip[j] < 0; }
  const float* aggregation(int64_t j) const {
    return b_.grad_aggregation + item_ * b_.aggregation_stride[0] + j * b_.aggregation_stride[1];
  }
  float* grads(int64_t i) const { return own_.grad + i * padded_; }
  float* log_u(int64_t step) const { return own_.log_u + (step - 1) * rows_; }
  float* log_v(int64_t step) const { return own_.log_v + step * padded_; }

  void make_steps() {
    for (int64_t step = 0;; ++step) {
      for (int64_t j = 0; j < padded_; ++j) log_v(step)[j] = s_.log_v[j];
      if (step == steps_) return;
      Base::step();
      for (int64_t i = 0; i < rows_; ++i) log_u(step + 1)[i] = s_.log_u[i];
    }
  }

  // Sixteen entries of the plan, of a source that takes part.
  f32x16 plan(int64_t i, int64_t j) const {
    return exp(load(scores(i) + j) + load(s_.log_v + j) + splat(s_.log_u[i]));
  }

  // The gradient of the scores through the plan alone: T_ij (<grad_aggregation_j, x_i> +
  // grad_load_j); its sums over the sources are the gradient of log_v.
  void start_back() {
    for (int64_t j = 0; j < padded_; ++j) {
      const bool out = left_out(j);
      float* panel = s_.panels + j / kLanes * channels_ * kLanes + j % kLanes;
      for (int64_t c = 0; c < channels_; ++c) panel[c * kLanes] = out ? 0.0f : aggregation(j)[c];
      own_.load[j] = out ? 0.0f : b_.grad_load[item_ * b_.load_stride[0] + j * b_.load_stride[1]];
      own_.grad_v[j] = 0.0f;
    }
    for (int64_t i0 = 0; i0 < m_; i0 += kTransportRows) {
      const int64_t rows = min(kTransportRows, m_ - i0);
      for (int64_t i = 0; i < rows; ++i) unpack(i0 + i, 1.0f, s_.block + i * channels_);
      multiply_into<Layout::row_step, false>(s_.block, channels_, rows, s_.panels,
                                             channels_ * kLanes, padded_ / kLanes, channels_,
                                             grads(i0), padded_);
      for (int64_t i = i0; i < i0 + rows; ++i) {
        for (int64_t j = 0; j < padded_; j += kLanes) {
          const f32x16 dot = load(grads(i) + j) + load(own_.load + j);
          store(grads(i) + j, skipped(i) ? splat(0.0f) : plan(i, j) * dot);
        }
      }
      for (int64_t i = i0; i < i0 + rows; ++i) add_row(grads(i), own_.grad_v);
    }
  }
  void add_row(const float* row, float* to) const {
    for (int64_t j = 0; j < padded_; j += kLanes) store(to + j, load(to + j) + load(row + j));
  }
  // A source times `scale`, zeros where it takes no part.
  void unpack(int64_t i, float scale, float* to) const {
    if (skipped(i)) {
      for (int64_t c = 0; c < channels_; ++c) to[c] = 0.0f;
      return;
    }
    pack_row(source(i), channels_, to);
    for (int64_t c = 0; c < channels_; ++c) to[c] *= scale;
  }

  // Back through log_v = log b - logsumexp(scores + log_u) and then log_u = log a -
  // logsumexp(scores + log_v of the step before). Only the last log_u enters the plan itself.
  void step_back(int64_t step) {
    for (int64_t j = 0; j < padded_; ++j) own_.next_v[j] = 0.0f;
    for (int64_t i = 0; i < m_; ++i) {
      if (!skipped(i)) row_back(i, step);
    }
    for (int64_t j = 0; j < padded_; ++j) own_.grad_v[j] = own_.next_v[j];
  }
  void row_back(int64_t i, int64_t step) {
    const float *score = scores(i), *after = log_v(step), *before = log_v(step - 1);
    float* grad = grads(i);
    const f32x16 column = splat(log_u(step)[i]), log_a = splat(log_a_), log_b = splat(log_b_);
    f32x16 total = splat(0.0f);
    for (int64_t j = 0; j < padded_; j += kLanes) {
      const f32x16 share = exp(load(score + j) + load(after + j) + column - log_b);
      const f32x16 part = load(own_.grad_v + j) * share, here = load(grad + j);
      total = total + (step == steps_ ? here - part : splat(0.0f) - part);
      store(grad + j, here - part);
    }
    const f32x16 grad_u = splat(sum(total));
    for (int64_t j = 0; j < padded_; j += kLanes) {
      const f32x16 share = exp(load(score + j) + load(before + j) + column - log_a);
      const f32x16 part = grad_u * share;
      store(grad + j, load(grad + j) - part);
      store(own_.next_v + j, load(own_.next_v + j) - part);
    }
  }

  // From the gradient of the scores to that of the cosines.
  void scale_gradients() {
    const f32x16 eps = splat(p_.eps);
    for (int64_t i = 0; i < m_; ++i) {
      if (skipped(i)) continue;
      for (int64_t j = 0; j < padded_; j += kLanes) {
        f32x16 scaled = load(grads(i) + j) / eps;
        if (p_.time_a) scaled = scaled * Base::apart_in_time(i, j);
        // The time of an anchor that is left out may be NaN.
        store(grads(i) + j, select_greater(splat(0.0f), load(s_.skip + j), splat(0.0f), scaled));
      }
    }
  }

  void write_anchors() {
    float* sums = own_.panels;
    for (int64_t k = 0; k < n_ * wide_; ++k) sums[k] = 0.0f;
    for (int64_t i0 = 0; i0 < m_; i0 += kTransportRows) {
      const int64_t rows = min(kTransportRows, m_ - i0);
      for (int64_t i = 0; i < rows; ++i) {
        const bool none = skipped(i0 + i);
        const f32x16 scale =
            splat(none ? 0.0f : inverse_norm(squared_norm(source(i0 + i), channels_)));
        for (int64_t c = 0; c < wide_; c += kLanes) {
          const f32x16 x = none ? scale : load_row(source(i0 + i) + c, channels_ - c) * scale;
          store(s_.panels + (c / kLanes * kTransportRows + i) * kLanes, x);
        }
      }
      multiply_into<Layout::step_row, true>(grads(i0), padded_, n_, s_.panels,
                                            kTransportRows * kLanes, wide_ / kLanes, rows, sums,
                                            wide_);
    }
    for (int64_t j = 0; j < n_; ++j) {
      if (left_out(j)) {
        fill_zero(grad_anchor(j), channels_ * static_cast<int64_t>(sizeof(T)));
      } else {
        write_gradient<T>(anchor(j), sums + j * wide_, nullptr, channels_, grad_anchor(j));
      }
    }
  }

  void write_sources() {
    const int64_t panels = wide_ / kLanes;
    for (int64_t j = 0; j < n_; ++j) {
      const bool out = left_out(j);
      const f32x16 scale = splat(out ? 0.0f : inverse_norm(squared_norm(anchor(j), channels_)));
      for (int64_t c = 0; c < wide_; c += kLanes) {
        const int64_t at = (c / kLanes * n_ + j) * kLanes, left = channels_ - c;
        store(s_.panels + at, out ? scale : load_row(anchor(j) + c, left) * scale);
        store(own_.panels + at, out ? scale : load_row(aggregation(j) + c, left));
      }
    }
    for (int64_t i0 = 0; i0 < m_; i0 += kTransportRows) {
      const int64_t rows = min(kTransportRows, m_ - i0);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < padded_; j += kLanes) {
          store(s_.block + i * padded_ + j, skipped(i0 + i) ? splat(0.0f) : plan(i0 + i, j));
        }
      }
      multiply_into<Layout::row_step, false>(grads(i0), padded_, rows, s_.panels, n_ * kLanes,
                                             panels, n_, own_.cosine, wide_);
      multiply_into<Layout::row_step, false>(s_.block, padded_, rows, own_.panels, n_ * kLanes,
                                             panels, n_, own_.direct, wide_);
      for (int64_t i = 0; i < rows; ++i) {
        if (skipped(i0 + i)) {
          fill_zero(grad_x(i0 + i), channels_ * static_cast<int64_t>(sizeof(T)));
        } else {
          write_gradient<T>(source(i0 + i), own_.cosine + i * wide_, own_.direct + i * wide_,
                            channels_, grad_x(i0 + i));
        }
      }
    }
  }

  const SinkhornBackwardParams& b_;
  const Scratch& own_;
  int64_t rows_, channels_, wide_;  // wide_: channels, padded
  int64_t steps_ = 0;
};

}  // namespace

int64_t sinkhorn_backward_workspace(const SinkhornBackwardParams& p, const Parallel& parallel) {
  return parallel.threads * scratch_bytes(p);
}

void sinkhorn_backward(const SinkhornBackwardParams& p, const Parallel& parallel) {
  const int64_t bytes = scratch_bytes(p);
  visit_f32(p.forward.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.forward.batch, [&](int64_t item, int64_t worker) {
      Workspace memory(static_cast<char*>(p.workspace) + worker * bytes);
      const Scratch s = allocate_scratch(memory, p);
      Item<T>(p, item, s).run();
    });
  });
}

}  // namespace tokred::TOKRED_ISA
