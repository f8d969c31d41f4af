// Attributes of the current device, by device; and how much shared memory kernels were allowed.
#include "common/cuda/device.h"

#ifdef TOKRED_SIMT

namespace tokred::cuda {
Device current_device() { return {90, static_cast<int64_t>(simt::shared_limit())}; }
}  // namespace tokred::cuda

#else

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace tokred::cuda {
namespace {

int current_number() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

std::string in_words(cudaError_t status) {
  if (status == cudaErrorInsufficientDriver) {
    return "the driver is older than the CUDA that tokred was built with: update the driver, or "
           "build tokred with the CUDA of the driver";
  }
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    return "tokred was not built for this GPU: build it with its compute capability in "
           "TOKRED_CUDA_ARCHITECTURES, 8.0 or newer";
  }
  return cudaGetErrorString(status);
}

std::mutex mutex;

}  // namespace

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error("tokred: CUDA error: " + in_words(status));
  }
}

Device current_device() {
  static std::map<int, Device> known;
  const int number = current_number();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(number);
  if (found != known.end()) return found->second;
  const Device device{10 * attribute(cudaDevAttrComputeCapabilityMajor, number) +
                          attribute(cudaDevAttrComputeCapabilityMinor, number),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, number)};
  return known[number] = device;
}

void allow_shared_bytes(const void* kernel, int64_t bytes) {
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const int number = current_number();
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& so_far = allowed[{kernel, number}];
  if (bytes <= so_far) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
  so_far = bytes;
}

}  // namespace tokred::cuda

// What the driver supports, 0 without one, and what tokred was built with: 1000 * major + 10 *
// minor.
extern "C" __attribute__((visibility("default"))) void tokred_cuda_versions(int* driver,
                                                                            int* runtime) {
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
}

#endif
