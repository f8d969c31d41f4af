// Which instruction set the CPU kernels run on: the best one of the machine, unless overridden by
// TOKRED_CPU_ISA or tokred._C.set_cpu_isa. And whether they may use VNNI beside AVX-512, unless
// TOKRED_CPU_VNNI is 0 or tokred._C.set_cpu_vnni says no.
#pragma once

#include <cstdint>

namespace tokred {

enum class Isa : int32_t { generic, avx2, avx512 };
inline constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512"};

Isa best_isa();                     // what this machine supports
Isa current_isa();
bool set_isa(const char* name);     // false: unknown name, or more than the machine supports
bool has_vnni();  // one instruction multiplies four pairs of bytes and adds them (AVX-512)
bool set_vnni(bool use);            // false: the machine has none to use

// select(generic::f, avx2::f, avx512::f)(arguments) calls the current one.
template <class F>
F* select(F* generic, [[maybe_unused]] F* avx2, [[maybe_unused]] F* avx512) {
#ifdef __x86_64__
  switch (current_isa()) {
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: break;
  }
#endif
  return generic;
}

}  // namespace tokred
