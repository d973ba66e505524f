#include <cuda_runtime.h>

#include "common/cuda_runtime.h"

namespace fk {
namespace cuda {

int device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();  // not to be found by the next launch
  return 0;
}

std::string error_text(int status) {
  const auto error = static_cast<cudaError_t>(status);
  return std::string("CUDA: ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

DeviceGuard::DeviceGuard(int device) {
  int current;
  status_ = static_cast<int>(cudaGetDevice(&current));
  if (status_ || current == device) return;
  status_ = static_cast<int>(cudaSetDevice(device));
  if (!status_) before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace cuda
}  // namespace fk
