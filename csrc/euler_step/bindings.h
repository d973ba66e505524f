#pragma once
#include "bindings.h"
#include "euler_step/euler_step.h"
#include "tensors.h"

inline fk::EulerStepArgs euler_step_args(Address x, Address v, Address v_uncond, Address out, Address low, int x_type,
                                         int v_type, int low_type, int64_t n, double h, double guidance) {
  return {at(x), at(v), at(v_uncond), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type),
          n,     h,     guidance,     0};
}

inline bool euler_step_plain(py::handle x, py::handle v, double h, py::handle v_uncond, double guidance, py::handle out,
                             bool gradients, int threads) {
  const Plain state(x, gradients), velocity(v, gradients), to(out, gradients);
  if (!state || !velocity || !to || !state.is_state() || !velocity.is_velocity_of(state)) return false;
  if (!velocity.is_like(state) || !to.is_like(state) || to.type() != state.type()) return false;
  void* other = nullptr;
  if (!v_uncond.is_none()) {
    const Plain t(v_uncond, gradients);
    if (!t || t.type() != velocity.type() || !t.is_like(state)) return false;
    other = t.data();
  } else if (guidance != 1) {
    return false;
  }
  py::gil_scoped_release others_run;
  FK_SELECT(euler_step)({state.data(),
                         velocity.data(),
                         other,
                         to.data(),
                         nullptr,
                         state.dtype(),
                         velocity.dtype(),
                         {},
                         state.count(),
                         h,
                         guidance,
                         threads});
  return true;
}

template <class Module>
void bind_euler_step(Module& m) {
  m.def("euler_step", ON_THREADS(euler_step, EulerStepArgs), py::call_guard<py::gil_scoped_release>());
  m.def("euler_step_plain", &euler_step_plain);
}

template <class Module>
void bind_euler_step_cuda(Module& m) {
  m.def("euler_step", on_stream(euler_step_args, fk::cuda::euler_step));
}
