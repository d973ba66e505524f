// The CUDA kernels compiled for the host as a Python module, for tests: what flowkernels._C.cuda has, on the memory of
// CPU tensors, and the emulation's settings.
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "common/cuda_runtime.h"
#include "host_cuda/emulation.h"
#ifdef HOST_CUDA_CHECK
#include "host_cuda/checks.h"
#endif

namespace fk {
namespace cuda {
int device_count() {
  return 1;
}
std::string error_text(int status) {
  return std::to_string(status);
}
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}
}  // namespace cuda
}  // namespace fk

namespace py = pybind11;

PYBIND11_MODULE(HOST_CUDA_MODULE, m) {
  bind_cuda(m);
  m.def(
      "schedule",
      [](int order, uint64_t seed) { host_cuda::options().sched = order, host_cuda::options().seed = seed; },
      "Order of threads and blocks: 0 forward, 1 reverse, 2 random with this seed.");
  m.def(
      "async_lazy", [](bool lazy) { host_cuda::options().async_lazy = lazy; },
      "Whether cp.async lands as late as is legal, or at once.");
#ifdef HOST_CUDA_CHECK
  m.def("clear", &host_cuda_clear);
  m.def(
      "buffer",
      [](uintptr_t p, size_t bytes, unsigned element, bool initialised, const char* name) {
        host_cuda_buffer(reinterpret_cast<void*>(p), bytes, element, initialised, name);
      },
      "Memory that the kernels may touch; once one is registered, everything else is out of bounds.");
  m.def(
      "unwritten", [](uintptr_t p) { return host_cuda_unwritten(reinterpret_cast<void*>(p)); },
      "Elements of that buffer that were never written.");
  m.def("report", [] { return std::string(host_cuda_report()); }, "The accesses of the last launch, a line each.");
#endif
}
