#pragma once
#include "bellman/bellman.h"
#include "bindings.h"
#include "tensors.h"

inline bool bellman_plain(py::handle cost, int64_t steps, double carry, py::handle value, py::handle parent) {
  const Plain from(cost), least(value), before(parent);
  if (!from || from.type() != Plain::f64 || from.dims() != 2 || from.size(0) != from.size(1)) return false;
  const int64_t n = from.size(0);
  if (steps < 1 || steps > n - 1 || !(carry > 0 && std::isfinite(carry)) || !least || !before) return false;
  py::gil_scoped_release others_run;
  return FK_SELECT(bellman)({from.data<double>(), n, steps, carry, least.data<double>(), before.data<int64_t>()}) < 0;
}

template <class Module>
void bind_bellman(Module& m) {
  m.def("bellman_plain", &bellman_plain);
  m.def(
      "bellman",
      [](Address cost, int64_t n, int64_t steps, double carry, Address value, Address parent) {
        return FK_SELECT(bellman)({at<double>(cost), n, steps, carry, at<double>(value), at<int64_t>(parent)});
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_bellman_cuda(Module& m) {
  m.def("bellman", [](Address cost, int64_t n, int64_t steps, double carry, Address value, Address parent, Address bad,
                      int device, Address stream) {
    launch(fk::cuda::bellman,
           {at<double>(cost), n, steps, carry, at<double>(value), at<int64_t>(parent), at<int64_t>(bad)}, device,
           stream);
  });
}
