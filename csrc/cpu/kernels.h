// The CPU kernels as each instruction set's namespace offers them.
#pragma once

#include "../ops/match_params.h"
#include "../ops/merge_params.h"
#include "../ops/packed_attn_params.h"
#include "../ops/topk_params.h"
#include "parallel.h"

#ifdef TOKRED_ONLY_ISA
namespace tokred::only {
#include "kernels.inc"
}
namespace tokred {
namespace generic = only;
namespace avx2 = only;
namespace avx512 = only;
}  // namespace tokred
#else
namespace tokred::generic {
#include "kernels.inc"
}
namespace tokred::avx2 {
#include "kernels.inc"
}
namespace tokred::avx512 {
#include "kernels.inc"
}
#endif
