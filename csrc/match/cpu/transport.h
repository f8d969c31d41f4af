// The plan of optimal transport of one item, for sinkhorn and its gradient: costs by register
// tiles, and the steps over them. A step reads the costs once, row by row: one exponential an entry
// serves the sum of its row and, divided by that, the sum of its column.
#pragma once

#include <cmath>

#include "common/cpu/lanes.h"
#include "common/cpu/register_tile.h"
#include "common/cpu/row.h"
#include "common/cpu/vexp.h"
#include "common/cpu/workspace.h"
#include "match/cpu/token_set.h"

namespace tokred::TOKRED_ISA {

inline constexpr int64_t kTransportRows = 48;  // sources converted at a time

// `padded` is N, rounded up to lanes; what is behind N costs inf.
struct TransportScratch {
  float* score;  // [M][padded] -cost / eps, -inf for skipped anchors
  float* panels;  // [padded / 16][C][16] normalised anchors, transposed; then free
  float* block;  // [kTransportRows][max(C, padded)]
  float* log_u;  // [M, padded]
  float* log_v;  // [padded]
  float* row;  // [padded]
  float* sum;  // [padded] of columns
  float* x;  // [padded] positions of anchors
  float* y;  // [padded]
  float* time;  // [padded] of anchors
  float* skip;  // [padded] 0, or -inf for skipped anchors
};

inline TransportScratch allocate_transport(Workspace& memory, const SinkhornParams& p) {
  const int64_t padded = round_up(p.b.count, kLanes);
  const int64_t channels = round_up(p.channels, kLanes);
  TransportScratch s;
  s.score = memory.allocate<float>(p.a.count * padded);
  s.panels = memory.allocate<float>(max(padded, kTransportRows) * channels);
  s.block = memory.allocate<float>(kTransportRows * max(p.channels, padded));
  s.log_u = memory.allocate<float>(round_up(p.a.count, kLanes));
  s.log_v = memory.allocate<float>(padded);
  s.row = memory.allocate<float>(padded);
  s.sum = memory.allocate<float>(padded);
  s.x = memory.allocate<float>(padded);
  s.y = memory.allocate<float>(padded);
  s.time = memory.allocate<float>(padded);
  s.skip = memory.allocate<float>(padded);
  return s;
}

// to[row][16 panel + lane] = sum over the steps of block(row, step) * panels[panel][step][lane],
// added to what is there with kAdd. What becomes of the sums is up to loops of their own: inside of
// the register tiles it would be compiled dozens of times.
template <Layout kLayout, bool kAdd>
inline void multiply_into(const float* block, int64_t stride, int64_t rows, const float* panels,
                          int64_t panel_stride, int64_t count, int64_t steps, float* to,
                          int64_t to_stride) {
  for (int64_t panel = 0; panel < count; panel += kTilePanels<float>) {
    multiply<kLayout>(block, stride, rows, panels + panel * panel_stride, panel_stride,
                      min(kTilePanels<float>, count - panel), steps,
                      [&](int64_t row, int64_t n, f32x16 sum) {
                        float* at = to + row * to_stride + (panel + n) * kLanes;
                        store(at, kAdd ? load(at) + sum : sum);
                      });
  }
}

template <class T>
class Transport {
 public:
  Transport(const SinkhornParams& p, int64_t item, const TransportScratch& s)
      : p_(p), item_(item), s_(s), m_(p.a.count), n_(p.b.count), padded_(round_up(n_, kLanes)) {}

 protected:
  const T* source(int64_t i) const {
    return static_cast<const T*>(p_.a.data) + item_ * p_.a.stride_batch + i * p_.a.stride_token;
  }
  const T* anchor(int64_t j) const {
    return static_cast<const T*>(p_.b.data) + item_ * p_.b.stride_batch + j * p_.b.stride_token;
  }
  bool skipped(int64_t i) const { return row_masked(p_.a, item_, i); }
  float* scores(int64_t i) const { return s_.score + i * padded_; }

  // Makes the costs, and puts the item before its first step.
  void prepare() {
    prepare_anchors();
    score_rows();
    log_a_ = -std::log(static_cast<float>(sources_));
    log_b_ = -std::log(static_cast<float>(anchors_));
    for (int64_t i = 0; i < round_up(m_, kLanes); ++i) s_.log_u[i] = -kInfinity<float>;
  }
  bool is_empty() const { return sources_ == 0 || anchors_ == 0; }

  // Makes the sums of the rows right, and then those of the columns.
  void step() {
    for (int64_t j = 0; j < padded_; ++j) s_.sum[j] = 0.0f;
    for (int64_t i = 0; i < m_; ++i) {
      if (!skipped(i)) scale_row(i);
    }
    for (int64_t j = 0; j < padded_; j += kLanes) scale_columns(j);
  }

  // 1 - exp(-(time difference)^2 / (2 time_scale^2)) of source i and sixteen anchors.
  f32x16 apart_in_time(int64_t i, int64_t j) const {
    const float time = p_.time_a[item_ * p_.time_a_stride[0] + i * p_.time_a_stride[1]];
    const f32x16 apart = (splat(time) - load(s_.time + j)) / splat(p_.time_scale);
    return splat(1.0f) - exp(splat(-0.5f) * apart * apart);
  }

  const SinkhornParams& p_;
  int64_t item_;
  const TransportScratch& s_;
  int64_t m_, n_, padded_;
  int64_t sources_ = 0, anchors_ = 0;  // that take part
  float log_a_ = 0, log_b_ = 0;  // the logarithms of their shares

 private:
  void prepare_anchors() {
    anchors_ = 0;
    for (int64_t j = 0; j < padded_; ++j) {
      const bool there = j < n_ && !row_masked(p_.b, item_, j);
      anchors_ += there;
      s_.skip[j] = there ? 0.0f : -kInfinity<float>;
      s_.log_v[j] = 0.0f;
      float* panel = s_.panels + j / kLanes * p_.channels * kLanes + j % kLanes;
      const T* row = there ? anchor(j) : nullptr;
      const float scale = there ? inverse_norm(squared_norm(row, p_.channels)) : 0.0f;
      for (int64_t c = 0; c < p_.channels; ++c) {
        panel[c * kLanes] = there ? to_float(row[c]) * scale : 0.0f;
      }
      s_.x[j] = s_.y[j] = s_.time[j] = 0.0f;
      if (p_.position_b && j < n_) {
        const float* at =
            p_.position_b + item_ * p_.position_b_stride[0] + j * p_.position_b_stride[1];
        s_.x[j] = at[0];
        s_.y[j] = at[1];
      }
      if (p_.time_b && j < n_) {
        s_.time[j] = p_.time_b[item_ * p_.time_b_stride[0] + j * p_.time_b_stride[1]];
      }
    }
  }

  // Fills the rows of `score`.
  void score_rows() {
    sources_ = 0;
    for (int64_t i0 = 0; i0 < m_; i0 += kTransportRows) {
      const int64_t rows = min(kTransportRows, m_ - i0);
      for (int64_t i = 0; i < rows; ++i) {
        const T* x = source(i0 + i);
        float* to = s_.block + i * p_.channels;
        if (skipped(i0 + i)) {
          for (int64_t c = 0; c < p_.channels; ++c) to[c] = 0.0f;
          continue;
        }
        ++sources_;
        const float scale = inverse_norm(squared_norm(x, p_.channels));
        pack_row(x, p_.channels, to);
        for (int64_t c = 0; c < p_.channels; ++c) to[c] *= scale;
      }
      multiply_into<Layout::row_step, false>(s_.block, p_.channels, rows, s_.panels,
                                             p_.channels * kLanes, padded_ / kLanes, p_.channels,
                                             scores(i0), padded_);
      for (int64_t i = i0; i < i0 + rows; ++i) {
        for (int64_t j = 0; j < padded_; j += kLanes) {
          store(scores(i) + j, score(load(scores(i) + j), i, j));
        }
      }
    }
  }
  f32x16 score(f32x16 cosine, int64_t i, int64_t j) const {
    f32x16 cost = splat(1.0f) - cosine;
    if (p_.offset) cost = cost - splat(p_.offset[item_ * p_.offset_stride]);
    if (p_.position_a) {
      const float* at =
          p_.position_a + item_ * p_.position_a_stride[0] + i * p_.position_a_stride[1];
      const f32x16 dx = splat(at[0]) - load(s_.x + j), dy = splat(at[1]) - load(s_.y + j);
      float distance[kLanes];
      store(distance, fma(dx, dx, dy * dy));
      for (float& d : distance) d = __builtin_sqrtf(d);
      cost = fma(splat(p_.position_weight), load(distance), cost);
    }
    if (p_.time_a) cost = cost * apart_in_time(i, j);
    const f32x16 scaled = splat(0.0f) - cost / splat(p_.eps), skip = load(s_.skip + j);
    return select_greater(splat(0.0f), skip, skip, scaled);
  }

  // Makes the sum of row i right, and adds its share to the sums of the columns.
  void scale_row(int64_t i) {
    const float* score = scores(i);
    f32x16 most = splat(-kInfinity<float>);
    for (int64_t j = 0; j < padded_; j += kLanes) {
      const f32x16 sum = load(score + j) + load(s_.log_v + j);
      store(s_.row + j, sum);
      most = max(sum, most);
    }
    const float top = max_lane(most);
    f32x16 total = splat(0.0f);
    for (int64_t j = 0; j < padded_; j += kLanes) {
      const f32x16 e = exp(load(s_.row + j) - splat(top));
      store(s_.row + j, e);
      total = total + e;
    }
    const float sum = tokred::TOKRED_ISA::sum(total);
    s_.log_u[i] = log_a_ - top - std::log(sum);
    const f32x16 share = splat(1.0f / sum);
    for (int64_t j = 0; j < padded_; j += kLanes) {
      store(s_.sum + j, fma(load(s_.row + j), share, load(s_.sum + j)));
    }
  }

  // Makes the sums of sixteen columns right.
  void scale_columns(int64_t j) {
    constexpr float kMinSum = 0x1p-90f;  // smaller sums have lost digits
    const uint32_t large = greater_lanes(load(s_.sum + j), splat(kMinSum));
    uint32_t there = greater_lanes(load(s_.skip + j), splat(-1.0f));
    if ((large & there) == there) {
      for (; there; there &= there - 1) {
        const int64_t column = j + __builtin_ctz(there);
        s_.log_v[column] += log_b_ - log_a_ - std::log(s_.sum[column]);
      }
      return;
    }
    f32x16 top = splat(-kInfinity<float>), total = splat(0.0f);
    for (int64_t i = 0; i < m_; ++i) {
      if (!skipped(i)) top = max(load(scores(i) + j) + splat(s_.log_u[i]), top);
    }
    for (int64_t i = 0; i < m_; ++i) {
      if (!skipped(i)) total = total + exp(load(scores(i) + j) + splat(s_.log_u[i]) - top);
    }
    float most[kLanes], sums[kLanes];
    store(most, top);
    store(sums, total);
    for (; there; there &= there - 1) {
      const int lane = __builtin_ctz(there);
      s_.log_v[j + lane] = log_b_ - most[lane] - std::log(sums[lane]);
    }
  }
};

}  // namespace tokred::TOKRED_ISA
