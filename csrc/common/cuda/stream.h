// The type of a stream, for files that include no CUDA header.
#pragma once

namespace tokred::cuda {

using Stream = void*;  // a cudaStream_t

}  // namespace tokred::cuda
