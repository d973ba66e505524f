#pragma once
#include "bindings.h"
#include "linear_update/linear_update.h"
#include "tensors.h"

inline fk::LinearUpdateArgs linear_update_args(Address x, const std::vector<Address>& v, const std::vector<double>& b,
                                               double scale, Address out, Address low, int x_type, int v_type,
                                               int low_type, int64_t n) {
  return {at(x),   pointers(v),       b.data(),          int64_t(v.size()),   scale, at(out),
          at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type), n,     0};
}

inline bool linear_update_plain(py::handle x, py::handle v, py::handle b, double scale, py::handle out, bool gradients,
                                int threads) {
  const bool lists = PyList_CheckExact(v.ptr()) && PyList_CheckExact(b.ptr());
  const Plain state(x, gradients), to(out, gradients);
  if (!lists || !state || !to || !state.is_state() || !to.is_like(state) || to.type() != state.type()) return false;
  const Py_ssize_t terms = PyList_GET_SIZE(v.ptr());
  if (terms == 0 || PyList_GET_SIZE(b.ptr()) != terms) return false;
  std::vector<const void*> velocities(terms);
  std::vector<double> factors(terms);
  auto type = Plain::other;
  for (Py_ssize_t i = 0; i < terms; i++) {
    const Plain term(PyList_GET_ITEM(v.ptr(), i), gradients);
    PyObject* factor = PyList_GET_ITEM(b.ptr(), i);
    if (!term || !PyFloat_CheckExact(factor) || !term.is_like(state)) return false;
    if (i == 0 ? !term.is_velocity_of(state) : term.type() != type) return false;
    type = term.type(), velocities[i] = term.data(), factors[i] = PyFloat_AS_DOUBLE(factor);
  }
  py::gil_scoped_release others_run;
  FK_SELECT(linear_update)({state.data(),
                            velocities.data(),
                            factors.data(),
                            int64_t(terms),
                            scale,
                            to.data(),
                            nullptr,
                            state.dtype(),
                            fk::Dtype(type),
                            {},
                            state.count(),
                            threads});
  return true;
}

template <class Module>
void bind_linear_update(Module& m) {
  m.def("linear_update_plain", &linear_update_plain);
  m.def("linear_update", ON_THREADS(linear_update, LinearUpdateArgs), py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_linear_update_cuda(Module& m) {
  m.def("linear_update", on_stream(linear_update_args, fk::cuda::linear_update));
}
