// The costs of a wide assignment problem (n <= m), the prices v of its columns, and a list of every
// row's cheapest ones: those with the smallest reduced costs c_ij - v_j, with a bound below all the
// others. Prices only fall, so reduced costs only rise, and a list stays true to the end.
#pragma once

#include "common/cpu/lanes.h"
#include "common/cpu/row.h"

namespace tokred::TOKRED_ISA {

inline constexpr int kListed = 32;  // columns in a list at most; half of them after it overflowed
inline constexpr int kListedRows = 32, kPricedColumns = 16 * kLanes;  // of a task
inline constexpr double kMaxCost = 0x1p960;  // keeps sums of float64 costs finite
inline constexpr double kMaxRough = 0x1p100;  // prices up to it are compared with costs in fp32
inline constexpr double kRoughness = 0x1p-21;  // of that, relative to price and reduced cost
inline constexpr double kMaxFinite = 0x1.fffffffffffffp1023;

// The smallest reduced costs of a row, in no order; `bound` is below those of all other columns.
struct CheapList {
  int32_t column[kListed];
  double cost[kListed];
  double bound;
  int32_t count;
  int32_t built;  // number of the search before which it was made
};

// The columns of an item. Sizes in brackets.
struct CheapColumnsState {
  CheapList* list;  // [n]
  double* v;  // [m, padded] prices
  float* rough;  // [m, padded] the same in fp32
  int32_t* invalid;  // [n] column of a cost that is not a number, or -1
};

// Costs of type T, in rows.
template <class T>
class CheapColumns {
 public:
  CheapColumns(const T* costs, int64_t stride, int64_t rows, int64_t columns, bool maximize,
               const CheapColumnsState& s)
      : n_(rows), m_(columns), costs_(costs), stride_(stride), sign_(maximize ? -1 : 1),
        columns_(s) {}

  // Prices of a block of columns: their smallest costs where every column gets a row, else 0.
  void price_columns(int64_t block) {
    const int64_t first = block * kPricedColumns, last = min(first + kPricedColumns, m_);
    alignas(64) Acc smallest[kPricedColumns];
    for (Acc& x : smallest) x = kInfinity<Acc>;
    constexpr int kRows = 4;
    for (int64_t i = 0; n_ == m_ && i < n_; i += kRows) {
      for (int64_t j = first; j < last; j += kLanes) {
        Vec<Acc> cost = load(smallest + j - first);
        for (int64_t k = i; k < min(i + kRows, n_); ++k) {
          cost = min(load_columns(k, j) * splat(static_cast<Acc>(sign_)), cost);
        }
        store(smallest + j - first, cost);
      }
    }
    for (int64_t j = first; j < round_up(last, kLanes); ++j) {
      const double price = static_cast<double>(smallest[j - first]);
      set_price(j, j < m_ && price < kInfinity<double> ? price : 0.0);
    }
  }

  void list_rows(int64_t block) {
    measure_prices();
    for (int64_t i = block * kListedRows; i < min((block + 1) * kListedRows, n_); ++i) {
      columns_.invalid[i] = first_invalid(i);
      build_list(i, 0);
    }
  }

 protected:
  using Acc = Accumulator<T>;

  const T* row(int64_t i) const { return costs_ + i * stride_; }
  double cost(int64_t i, int64_t j) const {
    return sign_ * static_cast<double>(to_float(row(i)[j]));
  }
  // Sixteen stored costs; where columns end, such that their sign times them is inf.
  __attribute__((always_inline)) Vec<Acc> load_columns(int64_t i, int64_t j) const {
    const T* p = row(i) + j;
    if (j + kLanes <= m_) return load_as(p);
    Acc lane[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      lane[k] = j + k < m_ ? to_float(p[k]) : static_cast<Acc>(sign_) * kInfinity<Acc>;
    }
    return load(lane);
  }
  // The costs in float64 or, where they are stored in no more, fp32.
  template <class F>
  __attribute__((always_inline)) Vec<F> costs(int64_t i, int64_t j) const {
    if constexpr (sizeof(F) == sizeof(Acc)) {
      return load_columns(i, j) * splat(static_cast<F>(sign_));
    } else {
      return widen(load_columns(i, j)) * splat(sign_);
    }
  }

  // The first column whose cost is NaN, -inf or too large, or -1.
  int32_t first_invalid(int64_t i) const {
    for (int64_t j = 0; j < m_; j += kLanes) {
      const Vec<Acc> c = costs<Acc>(i, j);
      uint32_t invalid = 0;
      if constexpr (sizeof(T) == 8) {
        invalid = ~greater_lanes(c, splat(-kMaxCost)) & 0xffffu;
        invalid |= ~greater_lanes(splat(kMaxCost), c) & greater_lanes(splat(kInfinity<Acc>), c);
      } else {
        invalid = ~greater_lanes(c, splat(-kInfinity<Acc>)) & 0xffffu;
      }
      if (invalid) return static_cast<int32_t>(j + __builtin_ctz(invalid));
    }
    return -1;
  }

  void set_price(int64_t j, double price) {
    columns_.v[j] = price;
    columns_.rough[j] = static_cast<float>(price);
    if (price > max_price_) max_price_ = price;
    if (-price > max_price_) max_price_ = -price;
  }
  void measure_prices() {
    f64x16 most = splat(0.0);
    for (int64_t j = 0; j < m_; j += kLanes) {
      const f64x16 v = load(columns_.v + j);
      most = max(max(v, splat(0.0) - v), most);
    }
    max_price_ = max_lane(most);
  }

  // Lists the columns with the smallest reduced costs of row i.
  void build_list(int64_t i, int32_t search) {
    columns_.list[i].built = search;
    if constexpr (sizeof(Acc) == 4) {
      if (max_price_ < kMaxRough) return collect<float>(i, columns_.rough);
    }
    collect<double>(i, columns_.v);
  }
  // At least seven columns, if there are so many: those up to the second largest of the minima over
  // eighths of the row, about fourteen. That bound, and which columns to look at, is found in F.
  template <class F>
  void collect(int64_t i, const F* prices) {
    CheapList& list = columns_.list[i];
    Vec<F> smallest = splat(kInfinity<F>);
    for (int64_t j = 0; j < m_; j += kLanes)
      smallest = min(costs<F>(i, j) - load(prices + j), smallest);
    double bound = static_cast<double>(second_of_eight(smallest));
    bound += kRoughness * ((bound < 0 ? -bound : bound) + max_price_);
    const F rough =
        static_cast<F>(bound + 2 * kRoughness * ((bound < 0 ? -bound : bound) + max_price_));
    double most = bound < kMaxFinite ? bound : kMaxFinite;
    list.count = 0;
    for (int64_t j = 0; j < m_; j += kLanes) {
      uint32_t lanes = ~greater_lanes(costs<F>(i, j), load(prices + j) + splat(rough)) & 0xffffu;
      for (; lanes; lanes &= lanes - 1) {
        const int64_t column = j + __builtin_ctz(lanes);
        if (column >= m_) break;
        const double c = cost(i, column);
        if (!(c - columns_.v[column] <= most)) continue;
        if (list.count == kListed) {
          bound = halve(list);
          most = __builtin_nextafter(bound, -kInfinity<double>);
          if (!(c - columns_.v[column] <= most)) continue;
        }
        list.column[list.count] = static_cast<int32_t>(column);
        list.cost[list.count++] = c;
      }
    }
    list.bound = bound;
  }
  template <class F>
  static F second_of_eight(Vec<F> v) {
    v = min(v, exchange_lanes<8>(v));
    Vec<F> first = v, second = splat(-kInfinity<F>);
    const auto fold = [&](Vec<F> other_first, Vec<F> other_second) {
      second = max(min(first, other_first), max(second, other_second));
      first = max(first, other_first);
    };
    fold(exchange_lanes<4>(first), exchange_lanes<4>(second));
    fold(exchange_lanes<2>(first), exchange_lanes<2>(second));
    fold(exchange_lanes<1>(first), exchange_lanes<1>(second));
    return second.r[0][0];
  }
  // Keeps the smaller half of a full list; returns the smallest reduced cost that it drops.
  double halve(CheapList& list) const {
    double reduced[kListed];
    for (int k = 0; k < kListed; ++k) {
      const double value = list.cost[k] - columns_.v[list.column[k]], cost = list.cost[k];
      const int32_t column = list.column[k];
      int at = k;
      for (; at > 0 && value < reduced[at - 1]; --at) {
        reduced[at] = reduced[at - 1];
        list.cost[at] = list.cost[at - 1];
        list.column[at] = list.column[at - 1];
      }
      reduced[at] = value;
      list.cost[at] = cost;
      list.column[at] = column;
    }
    list.count = kListed / 2;
    return reduced[kListed / 2];
  }

  int64_t n_, m_;

 private:
  const T* costs_;
  int64_t stride_;
  double sign_;
  double max_price_ = 0.0;  // at least every |v|
  const CheapColumnsState& columns_;
};

}  // namespace tokred::TOKRED_ISA
