// The CPU kernels as each instruction set's namespace offers them.
#pragma once

#include "bind/params.h"
#include "common/cpu/parallel.h"

#ifdef TOKRED_ONLY_ISA
namespace tokred::only {
#include "bind/cpu_kernels.inc"
}
namespace tokred {
namespace generic = only;
namespace avx2 = only;
namespace avx512 = only;
}  // namespace tokred
#else
namespace tokred::generic {
#include "bind/cpu_kernels.inc"
}
namespace tokred::avx2 {
#include "bind/cpu_kernels.inc"
}
namespace tokred::avx512 {
#include "bind/cpu_kernels.inc"
}
#endif
