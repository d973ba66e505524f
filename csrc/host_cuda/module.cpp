// The CUDA kernels compiled for the host as a Python module, for tests: what flowkernels._C.cuda has, on the memory of
// CPU tensors, and the emulation's settings.
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/cuda_runtime.h"
#include "common/dtype.h"
#include "host_cuda/emulation.h"
#ifdef HOST_CUDA_CHECK
#include "host_cuda/checks.h"
#endif
#ifdef HOST_CUDA_PTX
#include "host_cuda/ptx.h"
#endif

namespace fk {
namespace cuda {
std::string device_problem() {
  return "";
}
std::string error_text(int status) {
  return std::to_string(status);
}
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}
#ifdef HOST_CUDA_CHECK  // tests/csrc/host_cuda.cu
int seeded_bug(int bug, const float* x, float* sums, float* scratch, float* total, unsigned* done, unsigned* large,
               int n);
int product(Dtype type, const void* a, const void* b, float* d, int depth);
#endif
}  // namespace cuda
}  // namespace fk

namespace py = pybind11;

PYBIND11_MODULE(HOST_CUDA_MODULE, m) {
  bind_cuda(m);
  m.def(
      "schedule",
      [](int order, uint64_t seed) {
        host_cuda::options().order = static_cast<host_cuda::Order>(order);
        host_cuda::options().seed = seed;
      },
      "Order of threads and blocks: 0 forward, 1 reverse, 2 random with this seed.");
  m.def(
      "async_lazy", [](bool lazy) { host_cuda::options().async_lazy = lazy; },
      "Whether cp.async lands as late as it may, or at once.");
  m.def(
      "pause", [](int milliseconds) { host_cuda::options().pause = milliseconds; },
      "How long other threads have after a setter of a kernel's attributes, before the launch.");
  m.def(
      "large_launches",
      [] {
        py::list all;
        for (const auto& [kernel, bytes] : host_cuda::large_launches())
          all.append(py::make_tuple(reinterpret_cast<uintptr_t>(kernel), bytes));
        return all;
      },
      "Since the last call: the kernels that were launched with more than 48 KiB of dynamic shared memory, and how "
      "much.");
#ifdef HOST_CUDA_PTX
  m.def("ptx_launches", &host_cuda::ptx::launches, "Launches so far of kernels translated from PTX.");
#endif
#ifdef HOST_CUDA_CHECK
  m.def("seeded_bug", [](int bug, uintptr_t x, uintptr_t sums, uintptr_t scratch, uintptr_t total, uintptr_t done,
                         uintptr_t large, int n) {
    const auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
    const auto counts = [](uintptr_t p) { return reinterpret_cast<unsigned*>(p); };
    fk::cuda::seeded_bug(bug, floats(x), floats(sums), floats(scratch), floats(total), counts(done), counts(large), n);
  });
  m.def("product", [](int type, uintptr_t a, uintptr_t b, uintptr_t d, int depth) {
    const auto at = [](uintptr_t p) { return reinterpret_cast<void*>(p); };
    fk::cuda::product(fk::Dtype(type), at(a), at(b), static_cast<float*>(at(d)), depth);
  });
  namespace check = host_cuda::check;
  m.def("clear", &check::clear, "Forgets buffers and accesses.");
  m.def(
      "buffer",
      [](uintptr_t p, size_t bytes, size_t element, bool initialised, const std::string& name) {
        check::buffer(reinterpret_cast<void*>(p), bytes, element, initialised, name);
      },
      "Memory that kernels may touch; everything else is out of bounds.");
  m.def(
      "unwritten", [](uintptr_t p) { return check::unwritten(reinterpret_cast<void*>(p)); },
      "Elements of the buffer at this address that no kernel has written.");
  m.def(
      "lines",
      [] {
        py::list all;
        for (const auto& l : check::lines()) {
          const char* kind = l.kind == check::Kind::load ? "load" : l.kind == check::Kind::store ? "store" : "atomic";
          all.append(py::make_tuple(l.where, l.shared ? "shared" : "global", kind, l.bytes, l.requests, l.lanes,
                                    l.parts, l.least));
        }
        return all;
      },
      "Accesses since clear(), by line: (where, space, kind, bytes a lane, requests of a warp, lanes of all requests, "
      "sectors or passes through the banks, the least that these could be).");
  m.def(
      "report",
      [] {
        std::string all;
        for (const auto& l : check::lines()) {
          char text[256];
          const double n = double(l.requests);
          snprintf(text, sizeof text,
                   "%-28s %s %s %2zu B  requests %8llu  lanes %4.1f  %s a request %5.2f  least %5.2f\n",
                   l.where.c_str(), l.shared ? "shared" : "global",
                   l.kind == check::Kind::load    ? "load  "
                   : l.kind == check::Kind::store ? "store "
                                                  : "atomic",
                   l.bytes, static_cast<unsigned long long>(l.requests), double(l.lanes) / n,
                   l.shared ? "passes " : "sectors", double(l.parts) / n, double(l.least) / n);
          all += text;
        }
        return all;
      },
      "lines() as text.");
#endif
}
