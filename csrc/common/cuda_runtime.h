// What the bindings need of the CUDA runtime, so that they compile without its headers.
#pragma once
#include <string>

namespace fk {
namespace cuda {

std::string device_problem();  // empty where a driver shows a device
std::string error_text(int status);

// Makes a device current and, at its end, the one before again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  int status() const { return status_; }  // a cudaError_t

 private:
  int before_ = -1, status_ = 0;
};

}  // namespace cuda
}  // namespace fk
