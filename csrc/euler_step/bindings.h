#pragma once
#include "bindings.h"
#include "euler_step/euler_step.h"

inline fk::EulerStepArgs euler_step_args(Address x, Address v, Address v_uncond, Address out, Address low, int x_type,
                                         int v_type, int low_type, int64_t n, double h, double guidance) {
  return {at(x), at(v), at(v_uncond), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type),
          n,     h,     guidance,     0};
}

template <class Module>
void bind_euler_step(Module& m) {
  m.def("euler_step", ON_THREADS(euler_step, EulerStepArgs), py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_euler_step_cuda(Module& m) {
  m.def("euler_step", on_stream(euler_step_args, fk::cuda::euler_step));
}
