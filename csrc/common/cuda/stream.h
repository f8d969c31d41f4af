// The name of a stream, for those who see no CUDA header.
#pragma once

namespace tokred::cuda {

using Stream = void*;  // a cudaStream_t

}  // namespace tokred::cuda
