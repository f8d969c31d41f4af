// Tasks on torch's thread pool, for kernels that see no torch header.
#pragma once

#include <atomic>
#include <cstdint>

namespace tokred {

struct Parallel {
  int64_t threads;
  // Calls body(context, worker) once for each worker in [0, count), possibly at the same time.
  void (*run)(int64_t count, void (*body)(void* context, int64_t worker), void* context);
};

// Calls f(task, worker) for every task in [0, tasks). A free worker gets the next task, so
// tasks may differ in cost; results must not depend on which worker runs a task. worker < threads.
template <class F>
inline void parallel_tasks(const Parallel& parallel, int64_t tasks, const F& f) {
  const int64_t workers = tasks < parallel.threads ? tasks : parallel.threads;
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, int64_t{0});
    return;
  }
  struct Context {
    const F& f;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } context{f, tasks};
  parallel.run(
      workers,
      [](void* raw, int64_t worker) {
        auto& context = *static_cast<Context*>(raw);
        const auto next_task = [&] { return context.next.fetch_add(1, std::memory_order_relaxed); };
        for (int64_t task = next_task(); task < context.tasks; task = next_task())
          context.f(task, worker);
      },
      &context);
}

}  // namespace tokred
