// pybind11: addresses and sizes in, then the device's number and the address of a stream; nothing is allocated and
// nothing waits. Callers are flowkernels/ops/<op>/__init__.py.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "common/cuda_runtime.h"
#include "euler_step/euler_step.h"
#include "linear_euler/linear_euler.h"
#include "linear_update/linear_update.h"

namespace py = pybind11;
using Address = uintptr_t;

template <class T = void>
static T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

using Operand = std::tuple<Address, int, int64_t>;  // of rows: address, type, stride
static fk::Rows rows(const Operand& t) {
  return {at(std::get<0>(t)), fk::Dtype(std::get<1>(t)), std::get<2>(t)};
}
static const void* const* pointers(const std::vector<Address>& a) {
  return reinterpret_cast<const void* const*>(a.data());
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

  m.def("linear_euler",
        [](Address x, const Operand& z, int64_t z_token, const Operand& weight, const Operand& bias,
           const Operand& norm_weight, const Operand& norm_bias, const Operand& scale, const Operand& shift,
           const std::vector<Address>& history, const std::vector<double>& b, Address out, Address low,
           Address velocity, int x_type, int history_type, int low_type, int velocity_type,
           std::array<int64_t, 4> sizes, std::array<int64_t, 4> patches, bool channels_first, std::optional<double> eps,
           double h, std::optional<double> guidance, int device, Address stream) {
          auto [n, T, d, outputs] = sizes;
          auto [patch, C, H, W] = patches;
          launch(fk::cuda::linear_euler,
                 {at(x),
                  rows(z),
                  z_token,
                  rows(weight),
                  rows(bias),
                  rows(norm_weight),
                  rows(norm_bias),
                  rows(scale),
                  rows(shift),
                  pointers(history),
                  b.data(),
                  int64_t(history.size()),
                  at(out),
                  at(low),
                  at(velocity),
                  fk::Dtype(x_type),
                  fk::Dtype(history_type),
                  fk::Dtype(low_type),
                  fk::Dtype(velocity_type),
                  n,
                  T,
                  d,
                  outputs,
                  patch,
                  C,
                  H,
                  W,
                  channels_first,
                  eps.has_value(),
                  guidance.has_value(),
                  eps.value_or(0),
                  h,
                  guidance.value_or(1),
                  0},
                 device, stream);
        });

  m.def("linear_update", [](Address x, const std::vector<Address>& v, const std::vector<double>& b, Address out,
                            Address low, int x_type, int v_type, int low_type, int64_t n, int device, Address stream) {
    launch(fk::cuda::linear_update,
           {at(x), pointers(v), b.data(), int64_t(v.size()), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type),
            fk::Dtype(low_type), n, 0},
           device, stream);
  });
}
