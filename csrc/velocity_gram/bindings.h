#pragma once
#include "bindings.h"
#include "tensors.h"
#include "velocity_gram/velocity_gram.h"

inline bool velocity_gram_plain(py::handle v, py::handle gram, int threads) {
  const Plain velocities(v), to(gram);
  if (!velocities || !to || velocities.dims() < 2 || velocities.type() > Plain::f16) return false;
  const int64_t K = velocities.size(0), M = velocities.count() / K;
  py::gil_scoped_release others_run;
  FK_SELECT_AMX(velocity_gram)
  ({velocities.data(), velocities.dtype(), K, M, M, nullptr, 0, nullptr, to.data<double>(), threads});
  return true;
}

template <class Module>
void bind_velocity_gram(Module& m) {
  m.def("velocity_gram_plain", &velocity_gram_plain);
  m.def(
      "velocity_gram",
      [](Address v, int v_type, int64_t K, int64_t M, int64_t v_stride, Address x, int64_t x_stride, Address times,
         Address gram, int threads) {
        FK_SELECT_AMX(velocity_gram)
        ({at(v), fk::Dtype(v_type), K, M, v_stride, at(x), x_stride, at<double>(times), at<double>(gram), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_velocity_gram_cuda(Module& m) {
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
