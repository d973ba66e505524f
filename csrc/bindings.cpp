// pybind11: addresses and sizes in, nothing owned, nothing checked twice. Callers are flowkernels/ops/<op>/__init__.py.
#include <pybind11/pybind11.h>

#include "bellman/bellman.h"
#include "common/isa.h"
#include "common/threads.h"
#include "euler_step/euler_step.h"
#include "velocity_gram/velocity_gram.h"

namespace py = pybind11;
using Address = uintptr_t;

template <class T = void>
static T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("isa", [] { return fk::isa_name(fk::isa()); });
  m.def("thread_runtime", &fk::thread_runtime);

  m.def(
      "velocity_gram",
      [](Address v, int v_type, int64_t K, int64_t M, int64_t v_stride, Address x, int64_t x_stride, Address times,
         Address gram, int threads) {
        FK_SELECT(velocity_gram)
        ({at(v), fk::Dtype(v_type), K, M, v_stride, at(x), x_stride, at<double>(times), at<double>(gram), threads});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "bellman",
      [](Address cost, int64_t n, int64_t steps, Address value, Address parent) {
        FK_SELECT(bellman)({at<double>(cost), n, steps, at<double>(value), at<int64_t>(parent)});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "euler_step",
      [](Address x, Address v, Address v_uncond, Address out, Address low, int x_type, int v_type, int low_type,
         int64_t n, double h, double guidance, int threads) {
        FK_SELECT(euler_step)
        ({at(x), at(v), at(v_uncond), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type), n, h,
          guidance, threads});
      },
      py::call_guard<py::gil_scoped_release>());
}
