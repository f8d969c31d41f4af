// The scheduler behind simt.h.
#include "simt.h"

#include "stack.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kMaxThreads = 1024;
constexpr uint16_t kPoison = 0xffd5;       // a NaN in f32, f16 and bf16, and a negative integer

enum class State : uint8_t { ready, at_warp, at_block, at_condition, done };

struct Copy {
  void* destination;
  const void* source;
  unsigned bytes, size;  // what is copied; the rest is zeroed
  int group;
};

struct Fiber {
  Context context;
  Stack stack;
  dim3 index;
  State state = State::done;
  bool predicate = false;
  unsigned mask = 0;
  WarpFunction function = nullptr;
  bool (*condition)(void*) = nullptr;
  void* argument = nullptr;  // of the function or of the condition
  std::vector<Copy> copies;
  int copy_group = 0;
};

// Of copy_notify: the copies of the groups before `group` come first.
struct Event {
  unsigned thread;
  int group;
  void (*notify)(void*);
  void* argument;
};

struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers;
  Context scheduler;
  unsigned current = 0, threads = 0;
  bool on_fiber = false;
  int predicates = 0;
  uint64_t block_number = 0;
  std::vector<Event> events;
  void (*body)(void*) = nullptr;
  void* body_argument = nullptr;
  std::vector<uint16_t> shared;
  size_t shared_limit = 227 << 10;
  std::string error;
  uint64_t random_state = 0x9e3779b97f4a7c15;
#if defined(__SANITIZE_ADDRESS__)
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
#endif

  unsigned random(unsigned below) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((random_state >> 33) % below);
  }
};

Machine& machine() {
  static Machine m;
  return m;
}

void resume(Machine& m, unsigned thread) {
  Fiber& fiber = m.fibers[thread];
  m.current = thread;
  m.on_fiber = true;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.memory, fiber.stack.bytes);
#endif
  switch_context(m.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  m.on_fiber = false;
  if (!m.error.empty()) throw std::runtime_error("simt: " + std::exchange(m.error, {}));
}

void suspend(Machine& m, State state) {
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, m.host_stack, m.host_stack_bytes);
#endif
  switch_context(fiber.context, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &m.host_stack, &m.host_stack_bytes);
#endif
}

void entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.host_stack, &m.host_stack_bytes);
#endif
  for (;;) {
    m.body(m.body_argument);
    suspend(m, State::done);
  }
}

void grow(Machine& m, size_t threads) {
  m.fibers.reserve(kMaxThreads);
  while (m.fibers.size() < threads) {
    Fiber& fiber = m.fibers.emplace_back();
    fiber.stack = allocate_stack(m.fibers.size());
    prepare(fiber.context, fiber.stack, entry);
  }
}

// A launch that ends early leaves fibers in mid-kernel: they start afresh.
void abandon(Machine& m) {
  for (Fiber& fiber : m.fibers) {
    prepare(fiber.context, fiber.stack, entry);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack.memory, fiber.stack.bytes);
#endif
  }
}

// Runs the collectives whose lanes have all arrived; false where there were none.
bool release_warp(Machine& m, unsigned first, unsigned last) {
  bool released = false;
  for (unsigned i = first; i < last; ++i) {
    if (m.fibers[i].state != State::at_warp) continue;
    const unsigned mask = m.fibers[i].mask;
    const WarpFunction function = m.fibers[i].function;
    void* arguments[32] = {};
    bool complete = true;
    for (unsigned j = first; j < last && complete; ++j) {
      Fiber& other = m.fibers[j];
      if (!(mask >> (j - first) & 1) || other.state == State::done) continue;
      complete = other.state == State::at_warp && other.mask == mask && other.function == function;
      arguments[j - first] = other.argument;
    }
    if (!complete) continue;
    function(arguments);
    for (unsigned j = first; j < last; ++j) {
      if (arguments[j - first]) m.fibers[j].state = State::ready;
    }
    released = true;
  }
  return released;
}

bool is_ready(const Fiber& fiber) {
  return fiber.state == State::ready ||
         (fiber.state == State::at_condition && fiber.condition(fiber.argument));
}

// Runs a warp as far as it comes; false if that is nowhere.
bool run_warp(Machine& m, unsigned first) {
  const unsigned last = std::min(first + 32, m.threads);
  bool advanced = false, again = false;
  do {
    const unsigned offset = m.random(32), stride = m.random(16) * 2 + 1;
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned thread = first + ((offset + i * stride) & 31);
      if (thread >= last || !is_ready(m.fibers[thread])) continue;
      m.fibers[thread].state = State::ready;
      resume(m, thread);
      advanced = true;
    }
    again = release_warp(m, first, last);
    advanced |= again;
  } while (again);
  return advanced;
}

unsigned count(const Machine& m, unsigned first, unsigned last, State state) {
  unsigned found = 0;
  for (unsigned i = first; i < last; ++i) found += m.fibers[i].state == state;
  return found;
}

// What is wrong with a block in which no thread can go on, if not all of them wait at its barrier.
void explain(const Machine& m) {
  for (unsigned first = 0; first < m.threads; first += 32) {
    const unsigned last = std::min(first + 32, m.threads);
    if (count(m, first, last, State::at_warp) && !count(m, first, last, State::at_condition)) {
      fail("a warp collective that some lanes never reach");
    }
  }
  if (count(m, 0, m.threads, State::at_condition)) fail("every thread waits for another");
  fail("a block barrier that some threads never reach");
}

void complete_copies(Fiber& fiber, int before_group) {
  std::erase_if(fiber.copies, [&](const Copy& copy) {
    if (copy.group >= before_group) return false;
    if (copy.bytes) std::memcpy(copy.destination, copy.source, copy.bytes);
    std::memset(static_cast<char*>(copy.destination) + copy.bytes, 0, copy.size - copy.bytes);
    return true;
  });
}

// Some of the events take place; false if there are none.
bool run_events(Machine& m) {
  if (m.events.empty()) return false;
  for (unsigned left = m.random(static_cast<unsigned>(m.events.size())) + 1; left > 0; --left) {
    const unsigned chosen = m.random(static_cast<unsigned>(m.events.size()));
    const Event event = m.events[chosen];
    m.events[chosen] = m.events.back();
    m.events.pop_back();
    complete_copies(m.fibers[event.thread], event.group);
    event.notify(event.argument);
  }
  return true;
}

void run_block(Machine& m, std::vector<unsigned>& warps) {
  std::fill(m.shared.begin(), m.shared.end(), kPoison);
  ++m.block_number;
  m.events.clear();
  for (unsigned i = 0; i < m.threads; ++i) {
    m.fibers[i].state = State::ready;
    m.fibers[i].copies.clear();
    m.fibers[i].copy_group = 0;
  }
  for (;;) {
    for (unsigned i = static_cast<unsigned>(warps.size()) - 1; i > 0; --i) {
      std::swap(warps[i], warps[m.random(i + 1)]);
    }
    bool advanced = false;
    for (unsigned warp : warps) advanced |= run_warp(m, warp * 32);
    advanced |= run_events(m);
    if (count(m, 0, m.threads, State::done) == m.threads) return;
    if (count(m, 0, m.threads, State::at_block) != m.threads) {
      if (!advanced) explain(m);
      continue;
    }
    m.predicates = 0;
    for (unsigned i = 0; i < m.threads; ++i) {
      m.predicates += m.fibers[i].predicate;
      m.fibers[i].state = State::ready;
    }
  }
}

}  // namespace

size_t shared_limit() { return machine().shared_limit; }
void set_shared_limit(size_t bytes) { machine().shared_limit = bytes; }

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || grid.x == 0 || grid.y == 0 || grid.z == 0) {
    throw std::runtime_error("simt: a launch outside the limits of the hardware");
  }
  if (shared_bytes > shared_limit()) {
    throw std::runtime_error("simt: more shared memory than a block of this device may have");
  }
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  grow(m, threads);
  m.threads = static_cast<unsigned>(threads);
  m.body = body;
  m.body_argument = context;
  m.shared = std::vector<uint16_t>((shared_bytes + 1) / 2);
  m.shared.reserve(1);  // an address, also for kernels that have no use for it
  gridDim = grid;
  blockDim = block;
  for (unsigned i = 0; i < m.threads; ++i) {
    m.fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  std::vector<unsigned> warps((threads + 31) / 32);
  std::iota(warps.begin(), warps.end(), 0u);

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  uint64_t stride = 1 + m.random(1u << 20) % blocks;
  while (std::gcd(stride, blocks) != 1) ++stride;
  uint64_t at = m.random(1u << 30) % blocks;
  for (uint64_t i = 0; i < blocks; ++i, at = (at + stride) % blocks) {
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    try {
      run_block(m, warps);
    } catch (...) {
      abandon(m);
      throw;
    }
  }
}

void* shared_memory() { return machine().shared.data(); }

bool is_shared(const void* pointer, size_t bytes) {
  const auto& shared = machine().shared;
  const char* begin = reinterpret_cast<const char*>(shared.data());
  const char* p = static_cast<const char*>(pointer);
  return p >= begin && p + bytes <= begin + shared.size() * sizeof(shared[0]);
}

unsigned lane() { return machine().current & 31; }

void fail(const char* why) {
  Machine& m = machine();
  if (!m.on_fiber) throw std::runtime_error(std::string("simt: ") + why);
  m.error = why;
  for (;;) suspend(m, State::done);
}

void converge(unsigned mask, WarpFunction run, void* argument) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  if (!(mask >> lane() & 1)) fail("a lane calls a warp collective whose mask leaves it out");
  fiber.mask = mask;
  fiber.function = run;
  fiber.argument = argument;
  suspend(m, State::at_warp);
}

int block_barrier(bool predicate) {
  Machine& m = machine();
  m.fibers[m.current].predicate = predicate;
  suspend(m, State::at_block);
  return m.predicates;
}

void wait_until(bool (*ready)(void*), void* argument) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.condition = ready;
  fiber.argument = argument;
  suspend(m, State::at_condition);
}

uint64_t block_number() { return machine().block_number; }

void copy_async(void* destination, const void* source, unsigned bytes, unsigned size) {
  Machine& m = machine();
  if (!is_shared(destination, size)) fail("cp.async writes outside shared memory");
  if ((reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source)) % size) {
    fail("cp.async at a misaligned address");
  }
  std::fill_n(static_cast<uint16_t*>(destination), size / 2, kPoison);
  Fiber& fiber = m.fibers[m.current];
  fiber.copies.push_back({destination, source, bytes, size, fiber.copy_group});
}

void copy_commit() {
  Machine& m = machine();
  ++m.fibers[m.current].copy_group;
}

void copy_wait(int groups_in_flight) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  complete_copies(fiber, fiber.copy_group - groups_in_flight);
}

void copy_notify(void (*notify)(void*), void* argument) {
  copy_commit();
  Machine& m = machine();
  m.events.push_back({m.current, m.fibers[m.current].copy_group, notify, argument});
}

}  // namespace simt
