// sinkhorn: entropic optimal transport in the log domain, an item a task, in the worker's memory.
//
// M = 603, N = 126, C = 1152: 0.18 GFLOP for the costs and as much for the aggregation, 1.8 ms at
// 200 GFLOP/s; a step takes 76 k exponentials, 25 us.
#include "common/cpu/parallel.h"
#include "match/cpu/transport.h"

namespace tokred::TOKRED_ISA {
namespace {

// One worker's memory.
struct Scratch {
  TransportScratch transport;
  float* u;  // [M, padded] exp(log_u) of the step before
  float* sums;  // [N][C, padded] of the aggregation
};

Scratch allocate_scratch(Workspace& memory, const SinkhornParams& p) {
  return {allocate_transport(memory, p), memory.allocate<float>(round_up(p.a.count, kLanes)),
          memory.allocate<float>(p.b.count * round_up(p.channels, kLanes))};
}
int64_t scratch_bytes(const SinkhornParams& p) {
  return workspace_bytes([&](Workspace& memory) { allocate_scratch(memory, p); });
}

template <class T>
class Item : Transport<T> {
  using Base = Transport<T>;
  using Base::p_, Base::item_, Base::s_, Base::m_, Base::n_, Base::padded_, Base::sources_;
  using Base::source, Base::skipped, Base::scores, Base::is_empty;

 public:
  Item(const SinkhornParams& p, int64_t item, const Scratch& s)
      : Base(p, item, s.transport), u_(s.u), sums_(s.sums) {}

  void run() {
    Base::prepare();
    p_.steps[item_] = iterate();
    aggregate();
  }

 private:
  // Returns the number of steps.
  int32_t iterate() {
    if (is_empty()) {
      for (int64_t j = 0; j < padded_; ++j) s_.log_v[j] = -kInfinity<float>;
      return 0;
    }
    for (int64_t i = 0; i < round_up(m_, kLanes); ++i) {
      u_[i] = i < m_ && !skipped(i) ? 1.0f : 0.0f;
    }
    int64_t step = 0;
    bool converged = false;
    while (step < p_.iterations && !converged) {
      Base::step();
      converged = change() < p_.tolerance;
      ++step;
    }
    return static_cast<int32_t>(min(step, int64_t{0x7fffffff}));
  }

  // mean |u - u of the step before|; NaN, which is below nothing, where u leaves fp32.
  float change() {
    f32x16 total = splat(0.0f);
    bool large = false;
    for (int64_t i = 0; i < m_; i += kLanes) {
      const f32x16 log_u = load(s_.log_u + i), u = exp(log_u);
      large |= greater_lanes(log_u, splat(88.0f)) != 0;
      const f32x16 moved = u - load(u_ + i);
      total = total + max(moved, splat(0.0f) - moved);
      store(u_ + i, u);
    }
    return large ? __builtin_nanf("") : sum(total) / static_cast<float>(sources_);
  }

  void aggregate() {
    const int64_t panels = divide_up(p_.channels, kLanes), wide = panels * kLanes;
    for (int64_t k = 0; k < n_ * wide; ++k) sums_[k] = 0.0f;
    for (int64_t j = 0; j < padded_; ++j) s_.sum[j] = 0.0f;
    for (int64_t i0 = 0; i0 < m_; i0 += kTransportRows) {
      const int64_t rows = min(kTransportRows, m_ - i0);
      for (int64_t i = 0; i < rows; ++i) {
        plan_row(i0 + i, s_.block + i * padded_);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t c = panel * kLanes;
          const f32x16 x =
              skipped(i0 + i) ? splat(0.0f) : load_row(source(i0 + i) + c, p_.channels - c);
          store(s_.panels + (panel * kTransportRows + i) * kLanes, x);
        }
      }
      multiply_into<Layout::step_row, true>(s_.block, padded_, n_, s_.panels,
                                            kTransportRows * kLanes, panels, rows, sums_, wide);
    }
    float* out = p_.aggregation + item_ * n_ * p_.channels;
    for (int64_t j = 0; j < n_; ++j) {
      for (int64_t c = 0; c < p_.channels; ++c) out[j * p_.channels + c] = sums_[j * wide + c];
      p_.load[item_ * n_ + j] = s_.sum[j];
      p_.log_v[item_ * n_ + j] = s_.skip[j] < 0 ? -kInfinity<float> : s_.log_v[j];
    }
  }

  // A row of the plan, which it adds to the sums of the columns; and its peak.
  void plan_row(int64_t i, float* plan) {
    const bool none = skipped(i) || is_empty();
    f32x16 total = splat(0.0f), most = splat(0.0f);
    for (int64_t j = 0; j < padded_; j += kLanes) {
      const f32x16 t =
          none ? splat(0.0f) : exp(load(scores(i) + j) + load(s_.log_v + j) + splat(s_.log_u[i]));
      store(plan + j, t);
      store(s_.sum + j, load(s_.sum + j) + t);
      total = total + t;
      most = max(t, most);
    }
    p_.peak[item_ * m_ + i] = none ? 0.0f : max_lane(most) / sum(total);
    p_.log_u[item_ * m_ + i] = s_.log_u[i];
  }

  float *u_, *sums_;
};

}  // namespace

int64_t sinkhorn_workspace(const SinkhornParams& p, const Parallel& parallel) {
  return parallel.threads * scratch_bytes(p);
}

void sinkhorn(const SinkhornParams& p, const Parallel& parallel) {
  const int64_t bytes = scratch_bytes(p);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch, [&](int64_t item, int64_t worker) {
      Workspace memory(static_cast<char*>(p.workspace) + worker * bytes);
      const Scratch s = allocate_scratch(memory, p);
      Item<T>(p, item, s).run();
    });
  });
}

}  // namespace tokred::TOKRED_ISA
