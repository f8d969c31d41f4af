// linear_assignment: shortest augmenting paths with dual prices (Jonker and Volgenant, 1987), one
// block a problem. A thread has every kAssignmentThreads-th column; a step is one pass over a row
// of the costs and one reduction over the block, which decide all; thread 0 writes what it changed.
//
// B = 64, 256 x 256 in fp32: 16.8 MB of costs, which stay in the L2 cache. A row takes about four
// steps of some 2 us (two barriers, a reduction, a row from L2): 1024 steps a block, 2 ms.
#pragma once

#include "common/cuda/block.cuh"
#include "match/cuda/plan.h"
#include "match/params.h"

namespace tokred::cuda::matching {

// A problem is solved wide, with rows <= columns: of a tall one columns are rows.
struct AssignmentSize {
  int64_t rows, columns;
  bool tall;

  __host__ __device__ explicit AssignmentSize(const LinearAssignmentParams& p)
      : rows(p.rows > p.columns ? p.columns : p.rows),
        columns(p.rows > p.columns ? p.rows : p.columns), tall(p.rows > p.columns) {}
};

// The two smallest reduced costs of a row, the lowest column first among equals; inf and -1 where
// there are fewer.
struct TwoSmallest {
  double reduced[2];
  int column[2];

  __device__ __forceinline__ void clear() {
    reduced[0] = reduced[1] = __builtin_huge_val();
    column[0] = column[1] = -1;
  }
  static __device__ __forceinline__ bool before(double x, int i, double y, int j) {
    return x < y || (x == y && static_cast<unsigned>(i) < static_cast<unsigned>(j));
  }
  __device__ __forceinline__ void add(double x, int j) {
    if (before(x, j, reduced[0], column[0])) {
      reduced[1] = reduced[0];
      column[1] = column[0];
      reduced[0] = x;
      column[0] = j;
    } else if (before(x, j, reduced[1], column[1])) {
      reduced[1] = x;
      column[1] = j;
    }
  }
};

struct AssignmentScratch {
  double reduced[2][kWarp];  // a warp's result
  int column[2][kWarp];
};

template <class T>
struct AssignmentSolver {
  const LinearAssignmentParams& p;
  const AssignmentSize size;
  const int64_t item;
  AssignmentScratch& s;
  const T* costs;
  double sign;
  double* v;  // [columns] prices
  double* distance;  // [columns] of a search
  int* owner;  // [columns] row, or -1
  int* from;  // [columns] row from which it was reached; ~row once it is done
  int* partner;  // [rows] column, or -1
  int* waiting;  // [rows] rows without a column
  int* later;  // [rows] the same for the next pass

  __device__ AssignmentSolver(const LinearAssignmentParams& p, int64_t item, AssignmentScratch& s,
                              char* state)
      : p(p), size(p), item(item), s(s) {
    costs = static_cast<const T*>(p.cost) + item * p.stride_batch;
    sign = p.maximize ? -1.0 : 1.0;
    v = reinterpret_cast<double*>(state);
    distance = v + size.columns;
    owner = reinterpret_cast<int*>(distance + size.columns);
    from = owner + size.columns;
    partner = from + size.columns;
    waiting = partner + size.rows;
    later = waiting + size.rows;
  }

  __device__ __forceinline__ double cost(int64_t i, int64_t j) const {
    const int64_t at = size.tall ? j * p.stride_row + i : i * p.stride_row + j;
    return sign * static_cast<double>(to_float(costs[at]));
  }

  // f(j) for the columns of this thread.
  template <class F>
  __device__ __forceinline__ void each_column(F f) const {
    for (int64_t j = threadIdx.x; j < size.columns; j += kAssignmentThreads) f(j);
  }

  // The two smallest of all threads, in every thread.
  __device__ __forceinline__ TwoSmallest reduce(TwoSmallest two) {
    merge_lanes(two);
    if (lane_id() == 0) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        s.reduced[k][warp_id()] = two.reduced[k];
        s.column[k][warp_id()] = two.column[k];
      }
    }
    __syncthreads();
    two.clear();
    if (lane_id() < kAssignmentThreads / kWarp) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        two.reduced[k] = s.reduced[k][lane_id()];
        two.column[k] = s.column[k][lane_id()];
      }
    }
    __syncthreads();
    merge_lanes(two);
    return two;
  }
  static __device__ __forceinline__ void merge_lanes(TwoSmallest& two) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      double reduced[2];
      int column[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        reduced[k] = __shfl_xor_sync(kAllLanes, two.reduced[k], step);
        column[k] = __shfl_xor_sync(kAllLanes, two.column[k], step);
      }
      two.add(reduced[0], column[0]);
      two.add(reduced[1], column[1]);
    }
  }

  // Whether a cost is NaN, or inf of the sign that no pair may have.
  __device__ bool has_invalid() const {
    bool invalid = false;
    for (int64_t i = 0; i < size.rows; ++i) {
      each_column([&](int64_t j) { invalid |= !(cost(i, j) > -__builtin_huge_val()); });
    }
    return __syncthreads_or(invalid);
  }

  // Prices are the smallest costs where every column gets a row, else 0; all rows wait.
  __device__ void start() {
    each_column([&](int64_t j) {
      double smallest = __builtin_huge_val();
      for (int64_t i = 0; size.rows == size.columns && i < size.rows; ++i) {
        smallest = fmin(smallest, cost(i, j));
      }
      v[j] = smallest < __builtin_huge_val() ? smallest : 0.0;
      owner[j] = -1;
    });
    for (int64_t i = threadIdx.x; i < size.rows; i += kAssignmentThreads) {
      partner[i] = -1;
      waiting[i] = static_cast<int>(i);
    }
    __syncthreads();
  }

  // Augmenting row reduction: every waiting row takes its best column, lowers its price to that of
  // the second best, and sends the column's row to wait. Returns how many still wait.
  __device__ int64_t reduce_rows(int64_t count) {
    int64_t left = 0, next = 0;
    for (int64_t steps = 8 * size.rows; next < count; --steps) {
      const int i = waiting[next++];
      TwoSmallest two;
      two.clear();
      each_column([&](int64_t j) { two.add(cost(i, j) - v[j], static_cast<int>(j)); });
      two = reduce(two);
      const bool skipped = steps <= 0 || !(two.reduced[1] < __builtin_huge_val());
      const double price = skipped ? 0.0 : v[two.column[0]];
      const double lowered = price - (two.reduced[1] - two.reduced[0]);
      const bool lowers = lowered < price;
      const bool second = !skipped && !lowers && owner[two.column[0]] >= 0;
      const int j = second ? two.column[1] : two.column[0];
      const int before = skipped ? i : owner[j];
      __syncthreads();  // all have read
      const bool again = lowers && !skipped && before >= 0;
      if (threadIdx.x == 0) {
        if (!skipped) {
          if (lowers) v[j] = lowered;
          owner[j] = i;
          partner[i] = j;
          if (before >= 0) partner[before] = -1;
        }
        if (again) waiting[next - 1] = before;
        if (!again && before >= 0) later[left] = before;
      }
      if (again) --next;
      if (!again && before >= 0) ++left;
      __syncthreads();
    }
    int* spare = waiting;
    waiting = later;
    later = spare;
    return left;
  }

  // The shortest augmenting path from row `first` (Dijkstra's algorithm over reduced costs). False
  // where no free column can be reached.
  __device__ bool augment(int first) {
    int i = first, end = -1;
    double offset = 0.0, best = 0.0;
    each_column([&](int64_t j) { distance[j] = __builtin_huge_val(), from[j] = 0; });
    while (end < 0) {
      // Free columns come first among equals, so that paths end early.
      TwoSmallest nearest;
      nearest.clear();
      const int free_first = static_cast<int>(size.columns);
      each_column([&](int64_t j) {
        if (from[j] < 0) return;
        const double reached = offset + (cost(i, j) - v[j]);
        if (reached < distance[j]) {
          distance[j] = reached;
          from[j] = i;
        }
        nearest.add(distance[j], static_cast<int>(owner[j] < 0 ? j : free_first + j));
      });
      nearest = reduce(nearest);
      best = nearest.reduced[0];
      if (!(best < __builtin_huge_val())) return false;
      int j = nearest.column[0];
      if (j < free_first) {
        end = j;
      } else {
        j -= free_first;
        i = owner[j];
        offset = best - (cost(i, j) - v[j]);
        if (j % kAssignmentThreads == static_cast<int>(threadIdx.x)) from[j] = ~from[j];
      }
    }
    each_column([&](int64_t j) {
      if (from[j] < 0) v[j] += distance[j] - best;
    });
    __syncthreads();  // the path is known to all
    if (threadIdx.x == 0) {
      for (int j = end, row = -1; row != first;) {
        row = from[j] < 0 ? ~from[j] : from[j];
        const int before = partner[row];
        partner[row] = j;
        owner[j] = row;
        j = before;
      }
    }
    __syncthreads();
    return true;
  }

  __device__ bool solve() {
    if (has_invalid()) return false;
    start();
    int64_t count = size.rows;
    for (int pass = 0; pass < 2 && count > 0; ++pass) count = reduce_rows(count);
    for (int64_t w = 0; w < count; ++w) {
      if (!augment(waiting[w])) return false;
    }
    return true;
  }

  __device__ void run() {
    const bool solved = solve();
    double* row_dual = p.row_dual + item * p.rows;
    double* column_dual = p.column_dual + item * p.columns;
    double *narrow = size.tall ? column_dual : row_dual, *wide = size.tall ? row_dual : column_dual;
    const int* column_of = size.tall ? owner : partner;
    for (int64_t i = threadIdx.x; i < size.rows; i += kAssignmentThreads) {
      narrow[i] = solved ? sign * (cost(i, partner[i]) - v[partner[i]]) + 0.0 : __builtin_nan("");
    }
    each_column([&](int64_t j) { wide[j] = solved ? sign * v[j] + 0.0 : __builtin_nan(""); });
    for (int64_t i = threadIdx.x; i < p.rows; i += kAssignmentThreads) {
      p.index[item * p.rows + i] = solved ? column_of[i] : -1;
    }
    __syncthreads();  // before the next item
  }
};

template <class T>
__global__ void __launch_bounds__(kAssignmentThreads)
    linear_assignment_kernel(const __grid_constant__ LinearAssignmentParams p) {
  const AssignmentSize size(p);
  char* shared = &shared_memory<char>();
  auto& scratch = *reinterpret_cast<AssignmentScratch*>(shared);
  const int64_t bytes = assignment_state_bytes(size.rows, size.columns);
  const bool in_shared = assignment_in_shared(size.rows, size.columns);
  for (int64_t item = blockIdx.x; item < p.batch; item += gridDim.x) {
    char* state =
        in_shared ? shared + kAssignmentScratch : static_cast<char*>(p.workspace) + item * bytes;
    AssignmentSolver<T>(p, item, scratch, state).run();
  }
}

}  // namespace tokred::cuda::matching
