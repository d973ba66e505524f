// pybind11: addresses and sizes in, then the device's number and the address of a stream; nothing is allocated and
// nothing waits. Callers are flowkernels/ops/<op>/__init__.py.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "bellman/bellman.h"
#include "common/cuda_runtime.h"
#include "cost_from_gram/cost_from_gram.h"
#include "euler_step/euler_step.h"
#include "linear_euler/linear_euler.h"
#include "linear_update/linear_update.h"
#include "mlp_sample/mlp_sample.h"
#include "segment_points/segment_points.h"
#include "straighten_loss/straighten_loss.h"
#include "velocity_gram/velocity_gram.h"

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

  m.def("segment_points",
        [](Address bank, Address interval, Address sample, Address u, Address out, int bank_type, int out_type,
           int64_t knots, int64_t samples, int64_t B, int64_t D, int device, Address stream) {
          launch(fk::cuda::segment_points,
                 {at(bank), at<int64_t>(interval), at<int64_t>(sample), at(u), at(out), fk::Dtype(bank_type),
                  fk::Dtype(out_type), knots, samples, B, D, 0},
                 device, stream);
        });

  m.def("straighten_loss_partials", &fk::cuda::straighten_loss_partials, py::arg("B"), py::arg("D"),
        "Elements of the bank's type that straighten_loss takes for its sums.");
  m.def("straighten_loss", [](Address v, Address bank, Address step_sizes, Address interval, Address sample,
                              Address weight, double huber_c, int v_type, int bank_type, int64_t knots, int64_t samples,
                              int64_t B, int64_t D, Address loss, Address per_sample, Address per_interval,
                              Address gradient, Address partial, int device, Address stream) {
    launch(fk::cuda::straighten_loss,
           {at(v), at(bank), at(step_sizes), at<int64_t>(interval), at<int64_t>(sample), at(weight), huber_c,
            fk::Dtype(v_type), fk::Dtype(bank_type), knots, samples, B, D, at(loss), at(per_sample), at(per_interval),
            at(gradient), 0, at(partial)},
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

  m.def("mlp_program",
        [](Address prepared, Address to) { return fk::cuda::mlp_program(*at<fk::MlpPrepared>(prepared), at(to)); });
  m.def("mlp_upload", [](Address from, int64_t bytes, Address to, int device, Address stream) {
    launch(fk::cuda::mlp_upload, {at(from), bytes, at(to)}, device, stream);
  });
  m.def("mlp_scratch", [](Address prepared, int64_t n, int device) {
    fk::cuda::DeviceGuard guard(device);
    return fk::cuda::mlp_scratch({*at<fk::MlpPrepared>(prepared), nullptr, nullptr, n, nullptr, nullptr, 0});
  });
  m.def("mlp_sample", [](Address prepared, Address program, Address x, Address out, int64_t n, Address states,
                         Address velocities, Address scratch, int device, Address stream) {
    const fk::MlpSampleArgs a = {
        *at<fk::MlpPrepared>(prepared), at<float>(x), at<float>(out), n, at<float>(states), at<float>(velocities), 0};
    launch(fk::cuda::mlp_sample, {a, at(program), at(scratch)}, device, stream);
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
