#include <cuda_runtime.h>

#include "common/cuda_runtime.h"

namespace fk {
namespace cuda {

std::string device_problem() {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  cudaGetLastError();  // not to be found by the next launch
  return error_text(status ? status : n ? cudaSuccess : cudaErrorNoDevice);
}

std::string error_text(int status) {
  const auto error = static_cast<cudaError_t>(status);
  if (error == cudaSuccess) return "";
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
