#pragma once
#include "bindings.h"
#include "linear_update/linear_update.h"

inline fk::LinearUpdateArgs linear_update_args(Address x, const std::vector<Address>& v, const std::vector<double>& b,
                                               double scale, Address out, Address low, int x_type, int v_type,
                                               int low_type, int64_t n) {
  return {at(x),   pointers(v),       b.data(),          int64_t(v.size()),   scale, at(out),
          at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type), n,     0};
}

template <class Module>
void bind_linear_update(Module& m) {
  m.def("linear_update", ON_THREADS(linear_update, LinearUpdateArgs), py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_linear_update_cuda(Module& m) {
  m.def("linear_update", on_stream(linear_update_args, fk::cuda::linear_update));
}
