// What the bindings of the ops share, csrc/<op>/bindings.h: pybind11, addresses and sizes in, nothing owned, nothing
// checked twice. Callers are flowkernels/ops/<op>/__init__.py. The CPU's functions take a number of threads after an
// op's arguments, CUDA's a device and a stream. They are templates, so that each module compiles its own alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "common/cuda_runtime.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace py = pybind11;
using Address = uintptr_t;

// The CUDA kernels, for flowkernels._C.cuda and for the host emulation of the tests.
void bind_cuda(py::module_& m);

template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

inline const void* const* pointers(const std::vector<Address>& a) {
  return reinterpret_cast<const void* const*>(a.data());
}

// The arguments that `make` puts together, and a number of threads, to `run`.
template <class Args, class... A, class Run>
auto on_threads(Args (*make)(A...), Run run) {
  return [=](A... a, int threads) {
    Args args = make(a...);
    args.threads = threads;
    return run(args);
  };
}
#define ON_THREADS(op, Args) on_threads(op##_args, [](const fk::Args& a) { return FK_SELECT(op)(a); })

// Runs a launcher of CUDA kernels on a device that need not be the current one; nothing is allocated, nothing waits.
template <class Args>
void launch(int (*launcher)(const Args&, void*), const Args& args, int device, Address stream) {
  fk::cuda::DeviceGuard guard(device);
  int status = guard.status();
  if (!status) {
    py::gil_scoped_release others_run;  // a launch waits where the device's queue is full
    status = launcher(args, at(stream));
  }
  if (status) throw std::runtime_error(fk::cuda::error_text(status));
}

template <class Args, class... A>
auto on_stream(Args (*make)(A...), int (*launcher)(const Args&, void*)) {
  return [=](A... a, int device, Address stream) { launch(launcher, make(a...), device, stream); };
}
