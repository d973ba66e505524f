#pragma once
#include "bellman_pairs/bellman_pairs.h"
#include "bindings.h"
#include "tensors.h"

inline bool bellman_pairs_plain(py::handle first, py::handle cost, int64_t steps, py::handle value, py::handle parent) {
  const Plain begin(first), from(cost), least(value), before(parent);
  if (!begin || !from || begin.type() != Plain::f64 || from.type() != Plain::f64 || from.dims() != 3) return false;
  const int64_t n = from.size(0);
  if (from.size(1) != n || from.size(2) != n || !begin.is(1, n) || steps < 1 || steps > n - 1) return false;
  if (!least || !before) return false;
  py::gil_scoped_release others_run;
  return FK_SELECT(bellman_pairs)(
             {begin.data<double>(), from.data<double>(), n, steps, least.data<double>(), before.data<int64_t>()}) < 0;
}

template <class Module>
void bind_bellman_pairs(Module& m) {
  m.def("bellman_pairs_plain", &bellman_pairs_plain);
  m.def(
      "bellman_pairs",
      [](Address first, Address cost, int64_t n, int64_t steps, Address value, Address parent) {
        return FK_SELECT(bellman_pairs)(
            {at<double>(first), at<double>(cost), n, steps, at<double>(value), at<int64_t>(parent)});
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_bellman_pairs_cuda(Module& m) {
  m.def("bellman_pairs", [](Address first, Address cost, int64_t n, int64_t steps, Address value, Address parent,
                            Address bad, int device, Address stream) {
    launch(fk::cuda::bellman_pairs,
           {at<double>(first), at<double>(cost), n, steps, at<double>(value), at<int64_t>(parent), at<int64_t>(bad)},
           device, stream);
  });
}
