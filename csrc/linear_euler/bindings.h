#pragma once
#include "bindings.h"
#include "linear_euler/linear_euler.h"
#include "tensors.h"

using Operand = std::tuple<Address, int, int64_t>;  // of rows: address, type, stride
inline fk::Rows rows(const Operand& t) {
  return {at(std::get<0>(t)), fk::Dtype(std::get<1>(t)), std::get<2>(t)};
}

inline fk::LinearEulerArgs linear_euler_args(Address x, const Operand& z, int64_t z_token, const Operand& weight,
                                             const Operand& bias, const Operand& norm_weight, const Operand& norm_bias,
                                             const Operand& scale, const Operand& shift,
                                             const std::vector<Address>& history, const std::vector<double>& b,
                                             Address out, Address low, Address velocity, int x_type, int history_type,
                                             int low_type, int velocity_type, std::array<int64_t, 4> sizes,
                                             std::array<int64_t, 4> patches, bool channels_first,
                                             std::optional<double> eps, double h, double x_scale,
                                             std::optional<double> guidance) {
  auto [n, T, d, outputs] = sizes;
  auto [patch, C, H, W] = patches;
  return {at(x),
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
          x_scale,
          0};
}

// Of a plain layer, whose outputs are a sample's elements in their order: no norm, no modulation, no guidance.
inline bool linear_euler_plain(py::handle x, py::handle z, py::handle weight, py::handle bias, double h, py::handle out,
                               bool gradients, int threads) {
  const Plain state(x, gradients), tokens(z, gradients), matrix(weight, gradients), to(out, gradients);
  if (!state || !tokens || !matrix || !to || !state.is_state() || !tokens.is_velocity_of(state)) return false;
  if (matrix.dims() != 2 || (matrix.type() != tokens.type() && matrix.type() != state.type())) return false;
  const int64_t n = state.size(0), outputs = matrix.size(0), d = matrix.size(1);
  if (state.dims() < 1 || tokens.dims() < 2 || tokens.size(0) != n || tokens.size(tokens.dims() - 1) != d) return false;
  const int64_t T = tokens.count() / n / d;
  if (T * outputs != state.count() / n || !to.is_like(state) || to.type() != state.type()) return false;
  fk::Rows shift{};
  if (!bias.is_none()) {
    const Plain t(bias, gradients);
    if (!t || !t.is(1, outputs) || (t.type() != tokens.type() && t.type() != state.type())) return false;
    shift = {t.data(), t.dtype(), 0};
  }
  fk::LinearEulerArgs args{};
  args.x = state.data(), args.out = to.data(), args.x_type = state.dtype();
  args.z = {tokens.data(), tokens.dtype(), T * d};
  args.z_token = d;
  args.weight = {matrix.data(), matrix.dtype(), outputs == 1 ? 0 : d};
  args.bias = shift;
  args.n = n, args.T = T, args.d = d, args.outputs = outputs;
  args.h = h, args.guidance = args.x_scale = 1, args.threads = threads;
  py::gil_scoped_release others_run;
  FK_SELECT_BF16(linear_euler)(args);
  return true;
}

template <class Module>
void bind_linear_euler(Module& m) {
  m.def("linear_euler_plain", &linear_euler_plain);
  auto run = [](const fk::LinearEulerArgs& a) { FK_SELECT_BF16(linear_euler)(a); };
  m.def("linear_euler", on_threads(linear_euler_args, run), py::call_guard<py::gil_scoped_release>());
}

template <class... A>
auto linear_euler_on_stream(fk::LinearEulerArgs (*make)(A...)) {
  return [=](A... a, Address workspace, int device, Address stream) {
    fk::LinearEulerArgs args = make(a...);
    args.workspace = at(workspace);
    launch(fk::cuda::linear_euler, args, device, stream);
  };
}

template <class Module>
void bind_linear_euler_cuda(Module& m) {
  m.def("linear_euler", linear_euler_on_stream(linear_euler_args));
  m.def("linear_euler_workspace",
        [](std::array<int64_t, 4> sizes, int z_type, int weight_type, bool plain, bool guided, int device) {
          fk::cuda::DeviceGuard guard(device);
          fk::LinearEulerArgs a{};
          a.n = sizes[0], a.T = sizes[1], a.d = sizes[2], a.outputs = sizes[3];
          a.z.type = fk::Dtype(z_type), a.weight.type = fk::Dtype(weight_type);
          a.normed = !plain, a.guided = guided;
          return fk::cuda::linear_euler_workspace(a);
        });
}
