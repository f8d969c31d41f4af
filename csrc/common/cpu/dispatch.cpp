// The choice of an instruction set, once for the process.
#include "common/cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace tokred {
namespace {

Isa detect() {
#ifdef __x86_64__
  // The feature lists of -march=x86-64-v4 and -v3, as far as the kernels use them.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::generic;
}

bool parse(const char* name, Isa& isa) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) {
      isa = static_cast<Isa>(i);
      return isa <= best_isa();
    }
  }
  return false;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa = [] {
    Isa chosen = best_isa();
    if (const char* name = std::getenv("TOKRED_CPU_ISA")) parse(name, chosen);
    return chosen <= best_isa() ? chosen : best_isa();
  }();
  return isa;
}

bool machine_has_vnni() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

std::atomic<bool>& vnni() {
  static std::atomic<bool> use = [] {
    const char* wanted = std::getenv("TOKRED_CPU_VNNI");
    return machine_has_vnni() && !(wanted && std::strcmp(wanted, "0") == 0);
  }();
  return use;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  Isa isa;
  if (!parse(name, isa)) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

bool has_vnni() { return vnni().load(std::memory_order_relaxed); }

bool set_vnni(bool use) {
  if (use && !machine_has_vnni()) return false;
  vnni().store(use, std::memory_order_relaxed);
  return true;
}

}  // namespace tokred

// What tokred._C calls.
extern "C" __attribute__((visibility("default"))) const char* tokred_cpu_isa() {
  return tokred::kIsaNames[static_cast<int>(tokred::current_isa())];
}
extern "C" __attribute__((visibility("default"))) const char* tokred_best_cpu_isa() {
  return tokred::kIsaNames[static_cast<int>(tokred::best_isa())];
}
extern "C" __attribute__((visibility("default"))) bool tokred_cpu_vnni() {
  return tokred::has_vnni();
}
extern "C" __attribute__((visibility("default"))) bool tokred_set_cpu_isa(const char* name) {
  return tokred::set_isa(name);
}
extern "C" __attribute__((visibility("default"))) bool tokred_set_cpu_vnni(bool use) {
  return tokred::set_vnni(use);
}
