// linear_assignment: shortest augmenting paths with dual prices (Jonker and Volgenant, 1987), on
// short lists of every row's cheapest columns.
//
// A problem is solved with n <= m (else it is transposed): every row gets a column. Prices v only
// fall, so that the lists stay valid to the end. Paths read lists, and a whole row only where its
// bound is reached. That leaves two or three passes over the costs, which set the time: of 1024 x
// 1024 in fp32 4 MB a pass.
//
// Arithmetic is float64 on the costs as they are stored: the duals prove the result up to its
// rounding, and exactly for integers. Every choice is made in a fixed order.
#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"
#include "match/cpu/cheap_columns.h"
#include "match/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// A node of the heap, ordered by distance: a column, or a row at its bound, where its list ends.
struct Node {
  double key;
  int32_t id;  // a column, or m + a row
};

// One item's state. Sizes in brackets.
struct State : CheapColumnsState {
  void* transposed;  // [n][m] the costs of a tall problem, in their accumulator type
  double* distance;  // [m, padded] of the search; -inf where done
  double* matched;  // [n] cost of a row's pair
  double* offset;  // [n] of a row visited: what its reduced costs are added to
  double* done_at;  // [m] distance of columns done, in the order of `done`
  int32_t* partner;  // [n] column of a row, or -1
  int32_t* owner;  // [m] row of a column, or -1
  int32_t* from;  // [m] the row from which a column was reached
  int32_t* place;  // [m + n] of a node in the heap, or -1
  Node* heap;  // [m + n]
  int32_t* done;  // [m] columns done
  int32_t* touched;  // [m] columns whose distance is finite
  int32_t* waiting;  // [2][n] rows without a column
};

int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

State allocate_state(Workspace& memory, const LinearAssignmentParams& p) {
  const bool tall = p.rows > p.columns;
  const int64_t n = min(p.rows, p.columns), m = max(p.rows, p.columns);
  const int64_t padded = round_up(m, kLanes);
  State s;
  s.transposed = memory.allocate<char>(tall ? n * m * accumulator_bytes(p.dtype) : 0);
  s.list = memory.allocate<CheapList>(n);
  s.v = memory.allocate<double>(padded);
  s.rough = memory.allocate<float>(padded);
  s.distance = memory.allocate<double>(padded);
  s.matched = memory.allocate<double>(n);
  s.offset = memory.allocate<double>(n);
  s.done_at = memory.allocate<double>(m);
  s.partner = memory.allocate<int32_t>(n);
  s.owner = memory.allocate<int32_t>(m);
  s.from = memory.allocate<int32_t>(m);
  s.place = memory.allocate<int32_t>(m + n);
  s.heap = memory.allocate<Node>(m + n);
  s.done = memory.allocate<int32_t>(m);
  s.touched = memory.allocate<int32_t>(m);
  s.waiting = memory.allocate<int32_t>(2 * n);
  s.invalid = memory.allocate<int32_t>(n);
  return s;
}
int64_t state_bytes(const LinearAssignmentParams& p) {
  return workspace_bytes([&](Workspace& memory) { allocate_state(memory, p); });
}

// A wide problem whose costs are of type T.
template <class T>
class Solver : public CheapColumns<T> {
 public:
  Solver(const T* costs, int64_t stride, int64_t rows, int64_t columns, bool maximize,
         const State& s)
      : CheapColumns<T>(costs, stride, rows, columns, maximize, s), s_(s) {}

  // The pairs and the duals, once all columns are priced and all rows listed.
  AssignmentFailure solve() {
    for (int64_t i = 0; i < n_; ++i) {
      if (s_.invalid[i] >= 0) {
        return {AssignmentFailure::kInvalid, static_cast<int32_t>(i), s_.invalid[i]};
      }
    }
    clear();
    measure_prices();
    int64_t count = assign_cheapest();
    for (int pass = 0; pass < 2 && count > 0; ++pass) count = reduce_rows(count);
    for (int64_t w = 0; w < count; ++w) {
      if (!augment(s_.waiting[w])) return {AssignmentFailure::kInfeasible, s_.waiting[w], -1};
    }
    return {AssignmentFailure::kNone, -1, -1};
  }

  double row_dual(int64_t i) const { return s_.matched[i] - s_.v[s_.partner[i]]; }

 private:
  using Base = CheapColumns<T>;
  using Base::build_list, Base::cost, Base::measure_prices, Base::set_price;
  using Base::n_, Base::m_;

  void clear() {
    for (int64_t i = 0; i < n_; ++i) s_.partner[i] = -1;
    for (int64_t j = 0; j < m_; ++j) s_.owner[j] = -1;
    for (int64_t j = 0; j < m_; ++j) s_.distance[j] = kInfinity<double>;
    for (int64_t k = 0; k < m_ + n_; ++k) s_.place[k] = -1;
  }

  void pair(int64_t i, int64_t j, double cost) {
    s_.partner[i] = static_cast<int32_t>(j);
    s_.owner[j] = static_cast<int32_t>(i);
    s_.matched[i] = cost;
  }

  // Where columns have prices: gives every row its cheapest column if that is free, and lowers the
  // price of a column whose row has no other. Returns how many rows have no column yet.
  int64_t assign_cheapest() {
    int64_t count = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const CheapList& list = s_.list[i];
      int32_t cheapest = 0;
      for (int32_t k = 0; n_ == m_ && k < list.count; ++k) {
        const int32_t j = list.column[k];
        if (list.cost[k] != s_.v[j]) continue;
        ++cheapest;
        if (s_.owner[j] < 0 && s_.partner[i] < 0) pair(i, j, list.cost[k]);
      }
      if (s_.partner[i] < 0) {
        s_.waiting[count++] = static_cast<int32_t>(i);
      } else if (cheapest == 1) {
        const TwoSmallest two = two_smallest(i);
        const int32_t j = s_.partner[i];
        const double other = two.column[0] == j ? two.reduced[1] : two.reduced[0];
        if (other < kInfinity<double>) set_price(j, s_.v[j] - other);
      }
    }
    return count;
  }

  struct TwoSmallest {
    double reduced[2];  // inf where there is none
    int32_t column[2];
  };
  TwoSmallest two_listed(const CheapList& list) const {
    TwoSmallest two{{kInfinity<double>, kInfinity<double>}, {-1, -1}};
    for (int32_t k = 0; k < list.count; ++k) {
      const double reduced = list.cost[k] - s_.v[list.column[k]];
      if (reduced < two.reduced[0]) {
        two.reduced[1] = two.reduced[0];
        two.column[1] = two.column[0];
        two.reduced[0] = reduced;
        two.column[0] = list.column[k];
      } else if (reduced < two.reduced[1]) {
        two.reduced[1] = reduced;
        two.column[1] = list.column[k];
      }
    }
    return two;
  }
  // The two columns with the smallest reduced costs of row i.
  TwoSmallest two_smallest(int64_t i) {
    TwoSmallest two = two_listed(s_.list[i]);
    if (two.reduced[1] <= s_.list[i].bound) return two;
    build_list(i, 0);
    return two_listed(s_.list[i]);
  }

  // Augmenting row reduction: every waiting row takes its best column, lowers its price to that of
  // the second best, and sends the column's row to wait. Returns how many still wait.
  int64_t reduce_rows(int64_t count) {
    int32_t* later = s_.waiting + n_;
    int64_t left = 0, next = 0;
    for (int64_t steps = 8 * n_; next < count; --steps) {
      const int32_t i = s_.waiting[next++];
      const TwoSmallest two = two_smallest(i);
      if (steps <= 0 || !(two.reduced[1] < kInfinity<double>)) {
        later[left++] = i;
        continue;
      }
      int which = 0;
      const double lowered = s_.v[two.column[0]] - (two.reduced[1] - two.reduced[0]);
      const bool lowers = lowered < s_.v[two.column[0]];
      if (lowers) {
        set_price(two.column[0], lowered);
      } else if (s_.owner[two.column[0]] >= 0) {
        which = 1;
      }
      const int32_t j = two.column[which], before = s_.owner[j];
      pair(i, j, cost(i, j));
      if (before < 0) continue;
      s_.partner[before] = -1;
      if (lowers) {
        s_.waiting[--next] = before;
      } else {
        later[left++] = before;
      }
    }
    for (int64_t w = 0; w < left; ++w) s_.waiting[w] = later[w];
    return left;
  }

  // The shortest augmenting path from row `start` (Dijkstra's algorithm over reduced costs). False
  // where no free column can be reached.
  bool augment(int32_t start) {
    ++search_;
    heap_size_ = num_done_ = num_touched_ = 0;
    end_ = -1;
    end_distance_ = kInfinity<double>;
    visit(start, 0.0);
    while (heap_size_ > 0 && s_.heap[0].key < end_distance_) {
      const Node node = pop();
      if (node.id >= m_) {
        look_further(node.id - static_cast<int32_t>(m_), node.key);
        continue;
      }
      const int32_t j = node.id, i = s_.owner[j];
      s_.done[num_done_] = j;
      s_.done_at[num_done_++] = node.key;
      s_.distance[j] = -kInfinity<double>;
      visit(i, node.key - (s_.matched[i] - s_.v[j]));
    }
    while (heap_size_ > 0) s_.place[s_.heap[--heap_size_].id] = -1;
    for (int64_t k = 0; k < num_touched_; ++k) s_.distance[s_.touched[k]] = kInfinity<double>;
    if (end_ < 0) return false;
    for (int64_t k = 0; k < num_done_; ++k) {
      set_price(s_.done[k], s_.v[s_.done[k]] + (s_.done_at[k] - end_distance_));
    }
    for (int32_t j = end_, i = -1; i != start;) {
      i = s_.from[j];
      const int32_t before = s_.partner[i];
      pair(i, j, cost(i, j));
      j = before;
    }
    return true;
  }

  // Reaches the listed columns of row i, at `offset` + their reduced costs.
  void visit(int32_t i, double offset) {
    const CheapList& list = s_.list[i];
    for (int32_t k = 0; k < list.count; ++k) {
      reach(list.column[k], i, offset + (list.cost[k] - s_.v[list.column[k]]));
    }
    s_.offset[i] = offset;
    push(static_cast<int32_t>(m_) + i, offset + list.bound);
  }
  // The path is as long as the bound of row i: makes its list again with the present prices, or
  // reaches all of its columns.
  void look_further(int32_t i, double distance) {
    const double offset = s_.offset[i];
    if (s_.list[i].built != search_) {
      build_list(i, search_);
      if (offset + s_.list[i].bound > distance) return visit(i, offset);
    }
    for (int64_t j = 0; j < m_; j += kLanes) {
      const f64x16 reached = splat(offset) + (this->template costs<double>(i, j) - load(s_.v + j));
      const f64x16 best = min(load(s_.distance + j), splat(end_distance_));
      for (uint32_t lanes = greater_lanes(best, reached); lanes; lanes &= lanes - 1) {
        const int64_t column = j + __builtin_ctz(lanes);
        reach(static_cast<int32_t>(column), i, offset + (cost(i, column) - s_.v[column]));
      }
    }
  }
  void reach(int32_t j, int32_t i, double distance) {
    if (!(distance < end_distance_ && distance < s_.distance[j])) return;
    if (s_.distance[j] == kInfinity<double>) s_.touched[num_touched_++] = j;
    s_.distance[j] = distance;
    s_.from[j] = i;
    if (s_.owner[j] >= 0) return push(j, distance);
    end_ = j;
    end_distance_ = distance;
  }

  // Puts a node into the heap, or moves it up; none that lies behind the end.
  void push(int32_t id, double key) {
    if (!(key < end_distance_)) return;
    int64_t at = s_.place[id] >= 0 ? s_.place[id] : heap_size_++;
    for (; at > 0 && key < s_.heap[(at - 1) / 2].key; at = (at - 1) / 2) {
      set_node(at, s_.heap[(at - 1) / 2]);
    }
    set_node(at, {key, id});
  }
  Node pop() {
    const Node first = s_.heap[0], last = s_.heap[--heap_size_];
    s_.place[first.id] = -1;
    if (heap_size_ == 0) return first;
    int64_t at = 0;
    for (int64_t child = 1; child < heap_size_; child = 2 * at + 1) {
      if (child + 1 < heap_size_ && s_.heap[child + 1].key < s_.heap[child].key) ++child;
      if (!(s_.heap[child].key < last.key)) break;
      set_node(at, s_.heap[child]);
      at = child;
    }
    set_node(at, last);
    return first;
  }
  void set_node(int64_t at, Node node) {
    s_.heap[at] = node;
    s_.place[node.id] = static_cast<int32_t>(at);
  }

  const State& s_;
  // Of the current search.
  int32_t search_ = 0, end_ = -1;  // the free column that was reached
  double end_distance_ = 0.0;
  int64_t heap_size_ = 0, num_done_ = 0, num_touched_ = 0;
};

// Solves one item in steps whose tasks may run in any order.
template <class T>
class Item {
 public:
  Item(const LinearAssignmentParams& p, int64_t item, void* memory)
      : p_(p), item_(item), tall_(p.rows > p.columns) {
    Workspace workspace(memory);
    s_ = allocate_state(workspace, p);
  }

  void transpose(int64_t block) {
    auto* to = static_cast<Accumulator<T>*>(s_.transposed);
    const int64_t first = block * kLanes, last = min(first + kLanes, p_.columns);
    for (int64_t i = 0; i < p_.rows; ++i) {
      for (int64_t j = first; j < last; ++j) {
        to[j * p_.rows + i] = to_float(costs()[i * p_.stride_row + j]);
      }
    }
  }
  void price_columns(int64_t block) {
    with_solver([&](auto solver) { solver.price_columns(block); });
  }
  void list_rows(int64_t block) {
    with_solver([&](auto solver) { solver.list_rows(block); });
  }
  void solve() {
    with_solver([&](auto solver) {
      AssignmentFailure failure = solver.solve();
      if (failure.kind == AssignmentFailure::kNone) {
        write(solver);
      } else {
        refuse();
      }
      if (tall_) failure = {failure.kind, failure.column, failure.row};
      if (p_.failure) p_.failure[item_] = failure;
    });
  }

 private:
  const T* costs() const { return static_cast<const T*>(p_.cost) + item_ * p_.stride_batch; }
  int32_t* index() const { return p_.index + item_ * p_.rows; }
  double* row_dual() const { return p_.row_dual + item_ * p_.rows; }
  double* column_dual() const { return p_.column_dual + item_ * p_.columns; }

  template <class F>
  void with_solver(const F& f) const {
    if (tall_) {
      const auto* costs = static_cast<const Accumulator<T>*>(s_.transposed);
      f(Solver<Accumulator<T>>(costs, p_.rows, p_.columns, p_.rows, p_.maximize, s_));
    } else {
      f(Solver<T>(costs(), p_.stride_row, p_.rows, p_.columns, p_.maximize, s_));
    }
  }

  template <class S>
  void write(const S& solver) const {
    const double sign = p_.maximize ? -1.0 : 1.0;
    const int64_t n = min(p_.rows, p_.columns), m = max(p_.rows, p_.columns);
    double *narrow = tall_ ? column_dual() : row_dual(), *wide = tall_ ? row_dual() : column_dual();
    for (int64_t i = 0; i < n; ++i) narrow[i] = sign * solver.row_dual(i) + 0.0;
    for (int64_t j = 0; j < m; ++j) wide[j] = sign * s_.v[j] + 0.0;
    const int32_t* partner = tall_ ? s_.owner : s_.partner;
    for (int64_t i = 0; i < p_.rows; ++i) index()[i] = partner[i];
  }
  void refuse() const {
    for (int64_t i = 0; i < p_.rows; ++i) index()[i] = -1;
    for (int64_t i = 0; i < p_.rows; ++i) row_dual()[i] = __builtin_nan("");
    for (int64_t j = 0; j < p_.columns; ++j) column_dual()[j] = __builtin_nan("");
  }

  const LinearAssignmentParams& p_;
  int64_t item_;
  bool tall_;
  State s_;
};

// Whether items alone keep all threads busy; else the passes over the costs are shared out.
bool many_items(const LinearAssignmentParams& p, const Parallel& parallel) {
  return p.batch >= parallel.threads;
}

template <class T>
void assign_all(const LinearAssignmentParams& p, const Parallel& parallel) {
  const int64_t bytes = state_bytes(p);
  const int64_t n = min(p.rows, p.columns), m = max(p.rows, p.columns);
  const int64_t strips = p.rows > p.columns ? divide_up(p.columns, kLanes) : 0;
  const int64_t column_blocks = divide_up(m, kPricedColumns),
                row_blocks = divide_up(n, kListedRows);
  const auto memory = [&](int64_t slot) { return static_cast<char*>(p.workspace) + slot * bytes; };
  if (many_items(p, parallel)) {
    parallel_tasks(parallel, p.batch, [&](int64_t index, int64_t worker) {
      Item<T> item(p, index, memory(worker));
      for (int64_t strip = 0; strip < strips; ++strip) item.transpose(strip);
      for (int64_t block = 0; block < column_blocks; ++block) item.price_columns(block);
      for (int64_t block = 0; block < row_blocks; ++block) item.list_rows(block);
      item.solve();
    });
    return;
  }
  const auto each_block = [&](int64_t blocks, const auto& step) {
    parallel_tasks(parallel, p.batch * blocks, [&](int64_t task, int64_t) {
      Item<T> item(p, task / blocks, memory(task / blocks));
      step(item, task % blocks);
    });
  };
  each_block(strips, [](Item<T>& item, int64_t strip) { item.transpose(strip); });
  each_block(column_blocks, [](Item<T>& item, int64_t block) { item.price_columns(block); });
  each_block(row_blocks, [](Item<T>& item, int64_t block) { item.list_rows(block); });
  each_block(1, [](Item<T>& item, int64_t) { item.solve(); });
}

}  // namespace

int64_t linear_assignment_workspace(const LinearAssignmentParams& p, const Parallel& parallel) {
  return (many_items(p, parallel) ? parallel.threads : p.batch) * state_bytes(p);
}

void linear_assignment(const LinearAssignmentParams& p, const Parallel& parallel) {
  visit_dtype(p.dtype, [&]<class T>() { assign_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
