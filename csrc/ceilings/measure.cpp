// Rounds of the loops of kernels.h on all threads, timed together.
#include "ceilings/measure.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <iterator>
#include <new>
#include <random>
#include <stdexcept>
#include <thread>

#include <sys/mman.h>

#include "ceilings/kernels.h"
#include "common/cpu/dispatch.h"
#include "common/cpu/pages.h"

extern "C" const char* tokred_best_cpu_isa();

namespace tokred::ceilings {
namespace {

constexpr int64_t kPart = 4 * kReadBlock;  // threads share arrays in multiples of it
constexpr int64_t kRowsApart = 8;          // of a table's rows, one in eight is gathered
constexpr int64_t kAhead[] = {0, 512, 1024, 2048, 4096};
constexpr int64_t kRowsAhead[] = {0, 8, 16, 32};
constexpr int kStreams[] = {1, 2, 4};

void check(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

const Kernels& kernels_of(const std::string& isa) {
  const Kernels* all[] = {&generic::kCeilings
#ifdef __x86_64__
                          ,
                          &avx2::kCeilings, &avx512::kCeilings
#endif
  };
  std::string known;
  for (size_t i = 0; i < std::size(all); ++i) {
    if (isa == kIsaNames[i]) return *all[i];
    if (i > 0) known += ", ";
    known += kIsaNames[i];
    if (std::string(kIsaNames[i]) == tokred_best_cpu_isa()) break;
  }
  throw std::invalid_argument("isa must be of " + known + " on this machine, got " + isa);
}

void check_run(int64_t threads, int64_t rounds) {
  check(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  check(rounds >= 1, "rounds must be at least 1, got " + std::to_string(rounds));
}

// Mapped memory, with no page behind it before the first touch.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<char*>(data);
    advise_huge_pages(data_, bytes);
  }
  ~Buffer() { munmap(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* at(int64_t byte) { return data_ + byte; }
  // Ones, which no system shares between pages.
  void touch(int64_t begin, int64_t end) {
    auto* first = reinterpret_cast<float*>(data_ + begin);
    for (auto* p = first; p < reinterpret_cast<float*>(data_ + end); ++p) *p = 1.0f;
  }

 private:
  char* data_;
  int64_t bytes_;
};

// The part of [0, whole) of one thread, in multiples of `unit`.
struct Part {
  int64_t begin, end;
  Part(int64_t whole, int64_t unit, int64_t thread, int64_t threads)
      : begin(whole / unit * thread / threads * unit),
        end(whole / unit * (thread + 1) / threads * unit) {}
  int64_t size() const { return end - begin; }
};

// prepare(thread) on every thread, and then work(thread, round) on all of them, round by round:
// the seconds from the first one's beginning to the last one's end.
template <class Prepare, class Work>
std::vector<double> time_rounds(int64_t threads, int64_t rounds, const Prepare& prepare,
                                const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> begins(threads), ends(threads);
  std::vector<double> seconds;
  seconds.reserve(rounds);
  std::barrier together(threads);
  const auto body = [&](int64_t thread) {
    prepare(thread);
    for (int64_t round = 0; round < rounds; ++round) {
      together.arrive_and_wait();
      begins[thread] = Clock::now();
      work(thread, round);
      ends[thread] = Clock::now();
      together.arrive_and_wait();
      if (thread > 0) continue;
      const std::chrono::duration<double> elapsed = *std::max_element(ends.begin(), ends.end()) -
                                                    *std::min_element(begins.begin(), begins.end());
      seconds.push_back(elapsed.count());
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (auto& other : others) other.join();
  return seconds;
}

template <class T, size_t kCount>
T alternate(const T (&choices)[kCount], int64_t round) {
  return choices[round % kCount];
}

}  // namespace

Rounds measure_read(const std::string& isa, int64_t bytes, int64_t threads, int64_t rounds) {
  const Kernels& kernels = kernels_of(isa);
  check_run(threads, rounds);
  check(bytes >= threads * kPart, "bytes must be at least " + std::to_string(threads * kPart) +
                                      ", got " + std::to_string(bytes));
  bytes = bytes / kPart * kPart;
  Buffer data(bytes + kPart);  // the loops prefetch beyond the end
  std::vector<Sink> sinks(threads);
  const auto prepare = [&](int64_t thread) {
    const Part part(bytes, kPart, thread, threads);
    data.touch(part.begin, part.end);
  };
  const auto work = [&](int64_t thread, int64_t round) {
    const Part part(bytes, kPart, thread, threads);
    kernels.read(data.at(part.begin), part.size(), alternate(kStreams, round),
                 alternate(kAhead, round), &sinks[thread]);
  };
  return {bytes, time_rounds(threads, rounds, prepare, work)};
}

Rounds measure_copy(const std::string& isa, int64_t bytes, int64_t threads, int64_t rounds,
                    bool non_temporal) {
  const Kernels& kernels = kernels_of(isa);
  check_run(threads, rounds);
  check(bytes >= threads * kPart, "bytes must be at least " + std::to_string(threads * kPart) +
                                      ", got " + std::to_string(bytes));
  bytes = bytes / kPart * kPart;
  Buffer source(bytes + kPart), target(bytes);
  const auto prepare = [&](int64_t thread) {
    const Part part(bytes, kPart, thread, threads);
    source.touch(part.begin, part.end);
    target.touch(part.begin, part.end);
  };
  const auto work = [&](int64_t thread, int64_t round) {
    const Part part(bytes, kPart, thread, threads);
    kernels.copy(source.at(part.begin), target.at(part.begin), part.size(), non_temporal,
                 alternate(kAhead, round));
  };
  return {2 * bytes, time_rounds(threads, rounds, prepare, work)};
}

Rounds measure_gather(const std::string& isa, int64_t table_bytes, int64_t row_bytes,
                      int64_t threads, int64_t rounds, bool shuffled) {
  const Kernels& kernels = kernels_of(isa);
  check_run(threads, rounds);
  check(row_bytes >= kLine && row_bytes % kLine == 0,
        "row_bytes must be a multiple of 64, got " + std::to_string(row_bytes));
  const int64_t picked = table_bytes / row_bytes / kRowsApart;
  check(picked >= threads && picked * kRowsApart < INT32_MAX,
        "table_bytes must hold " + std::to_string(kRowsApart) +
            " rows a thread, and fewer than 2^31 rows, got " + std::to_string(table_bytes));
  const int64_t table_rows = picked * kRowsApart;
  Buffer table((table_rows + kRowsApart) * row_bytes);
  std::vector<int32_t> rows(picked);
  std::vector<Sink> sinks(threads);
  const auto prepare = [&](int64_t thread) {
    const Part part(picked, 1, thread, threads);
    const int64_t spare = thread + 1 == threads ? kRowsApart : 0;
    table.touch(part.begin * kRowsApart * row_bytes, (part.end * kRowsApart + spare) * row_bytes);
    std::minstd_rand random(static_cast<uint32_t>(thread) + 1);
    for (int64_t i = part.begin; i < part.end; ++i) {
      rows[i] = static_cast<int32_t>(i * kRowsApart + random() % kRowsApart);
    }
    if (shuffled) std::shuffle(rows.begin() + part.begin, rows.begin() + part.end, random);
  };
  const auto work = [&](int64_t thread, int64_t round) {
    // Another row of the eight each round, and none beside the one before: an odd step of three.
    const int64_t moved = round * 3 % kRowsApart;
    const Part part(picked, 1, thread, threads);
    kernels.gather(table.at(moved * row_bytes), rows.data() + part.begin, part.size(), row_bytes,
                   alternate(kRowsAhead, round), &sinks[thread]);
  };
  return {picked * row_bytes, time_rounds(threads, rounds, prepare, work)};
}

Rounds measure_operations(const std::string& isa, const std::string& what, int64_t steps,
                          int64_t threads, int64_t rounds) {
  const Kernels& kernels = kernels_of(isa);
  check_run(threads, rounds);
  check(steps >= 1, "steps must be at least 1, got " + std::to_string(steps));
  const auto run = what == "multiply_add" ? kernels.multiply_add
                   : what == "dot_int16"  ? kernels.dot_int16
                   : what == "dot_int8"   ? kernels.dot_int8
                                          : nullptr;
  check(run != nullptr, "what must be multiply_add, dot_int16 or dot_int8, got " + what);
  std::vector<Sink> sinks(threads);
  std::vector<int64_t> done(threads);
  const auto work = [&](int64_t thread, int64_t) { done[thread] = run(steps, &sinks[thread]); };
  auto seconds = time_rounds(threads, rounds, [](int64_t) {}, work);
  int64_t operations = 0;
  for (const int64_t one : done) operations += one;
  return {operations, std::move(seconds)};
}

}  // namespace tokred::ceilings
