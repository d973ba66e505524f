#pragma once
#include "axpy/axpy.h"
#include "bindings.h"

inline fk::AxpyArgs axpy_args(Address x, Address y, double a, Address out, int64_t n) {
  return {at<float>(x), at<float>(y), float(a), at<float>(out), n};
}

template <class Module>
void bind_axpy(Module& m) {
  m.def(
      "axpy",
      [](Address x, Address y, double a, Address out, int64_t n) { FK_SELECT(axpy)(axpy_args(x, y, a, out, n)); },
      py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_axpy_cuda(Module& m) {
  m.def("axpy", on_stream(axpy_args, fk::cuda::axpy));
}
