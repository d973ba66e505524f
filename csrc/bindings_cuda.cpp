// pybind11: addresses and sizes in, then the device's number and the address of a stream; nothing is allocated and
// nothing waits. Callers are flowkernels/ops/<op>/__init__.py.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "common/cuda_runtime.h"
#include "euler_step/euler_step.h"
#include "velocity_gram/velocity_gram.h"

namespace py = pybind11;
using Address = uintptr_t;

template <class T = void>
static T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// Runs a launcher on a device that need not be the current one.
template <class Args>
static void launch(int (*launcher)(const Args&, void*), const Args& args, int device, Address stream) {
  fk::cuda::DeviceGuard guard(device);
  const int status = guard.status() ? guard.status() : launcher(args, at(stream));
  if (status) throw std::runtime_error(fk::cuda::error_text(status));
}

void bind_cuda(py::module_& m) {
  m.def("device_count", &fk::cuda::device_count, "Devices that a driver shows; 0 without a driver.");

  m.def("euler_step", [](Address x, Address v, Address v_uncond, Address out, Address low, int x_type, int v_type,
                         int low_type, int64_t n, double h, double guidance, int device, Address stream) {
    launch(fk::cuda::euler_step,
           {at(x), at(v), at(v_uncond), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type), n,
            h, guidance, 0},
           device, stream);
  });

  using Gram = std::tuple<Address, int, int64_t, int64_t, int64_t, Address, int64_t, Address>;  // what is read
  auto gram_args = [](const Gram& g, Address gram, Address workspace) -> fk::VelocityGramArgs {
    const auto [v, v_type, K, M, v_stride, x, x_stride, times] = g;
    return {at(v), fk::Dtype(v_type), K, M, v_stride, at(x), x_stride, at<double>(times), at<double>(gram),
            0,     at(workspace)};
  };
  m.def("velocity_gram_workspace", [=](const Gram& g, int device) {
    fk::cuda::DeviceGuard guard(device);
    return fk::cuda::velocity_gram_workspace(gram_args(g, 0, 0));
  });
  m.def("velocity_gram", [=](const Gram& g, Address gram, Address workspace, int device, Address stream) {
    launch(fk::cuda::velocity_gram, gram_args(g, gram, workspace), device, stream);
  });
}
