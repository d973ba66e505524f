// pybind11: addresses and sizes in, then the device's number and the address of a stream; nothing is allocated and
// nothing waits. Callers are flowkernels/ops/<op>/__init__.py.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "bellman/bellman.h"
#include "common/cuda_runtime.h"
#include "cost_from_gram/cost_from_gram.h"
#include "euler_step/euler_step.h"

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

  m.def("cost_from_gram",
        [](Address gram, Address times, int64_t K, bool states, Address cost, int device, Address stream) {
          launch(fk::cuda::cost_from_gram, {at<double>(gram), at<double>(times), K, states, at<double>(cost)}, device,
                 stream);
        });

  m.def("bellman", [](Address cost, int64_t n, int64_t steps, Address value, Address parent, Address bad, int device,
                      Address stream) {
    launch(fk::cuda::bellman, {at<double>(cost), n, steps, at<double>(value), at<int64_t>(parent), at<int64_t>(bad)},
           device, stream);
  });

  m.def("euler_step", [](Address x, Address v, Address v_uncond, Address out, Address low, int x_type, int v_type,
                         int low_type, int64_t n, double h, double guidance, int device, Address stream) {
    launch(fk::cuda::euler_step,
           {at(x), at(v), at(v_uncond), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type), n,
            h, guidance, 0},
           device, stream);
  });
}
