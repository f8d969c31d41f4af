// Shares the items of a batch out to threads: one thread for an item, or all threads for one item
// after another.
#pragma once

#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {

struct ItemThreads {
  Parallel outside, inside;  // threads over the items, and threads within an item
  int64_t at_once;           // items at the same time

  // `large`: an item has work for all threads, and gets them where items are fewer than threads.
  ItemThreads(const Parallel& parallel, int64_t batch, bool large) {
    const Parallel single{1, nullptr};
    const bool wide = large && batch < parallel.threads;
    outside = wide ? single : parallel;
    inside = wide ? parallel : single;
    at_once = min(batch, outside.threads);
  }

  // Bytes of the memory that carve(threads, workspace) takes for every item at once.
  template <class Carve>
  int64_t bytes(const Carve& carve) const {
    return at_once * item_bytes(carve);
  }

  // f(item, memory, inside) for every item of the batch, with memory = carve(threads, workspace).
  template <class Carve, class F>
  void for_each(int64_t batch, void* memory, const Carve& carve, const F& f) const {
    const int64_t bytes = item_bytes(carve);
    parallel_tasks(outside, batch, [&](int64_t item, int64_t worker) {
      Workspace workspace(static_cast<char*>(memory) + worker * bytes);
      f(item, carve(inside.threads, workspace), inside);
    });
  }

 private:
  template <class Carve>
  int64_t item_bytes(const Carve& carve) const {
    return workspace_bytes([&](Workspace& workspace) { carve(inside.threads, workspace); });
  }
};

}  // namespace tokred::TOKRED_ISA
