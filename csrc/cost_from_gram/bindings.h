#pragma once
#include "bindings.h"
#include "cost_from_gram/cost_from_gram.h"
#include "tensors.h"

inline bool cost_from_gram_plain(py::handle gram, py::handle times, bool states, py::handle cost) {
  const Plain sums(gram), knots(times), to(cost);
  if (!sums || !to || sums.type() != Plain::f64 || sums.dims() != 2 || !are_times(knots)) return false;
  const int64_t K = knots.count() - 1, rows = states ? 2 * K - 1 : K - 1;
  if (sums.size(0) != rows || sums.size(1) != rows) return false;
  py::gil_scoped_release others_run;
  FK_SELECT(cost_from_gram)({sums.data<double>(), knots.data<double>(), K, states, to.data<double>()});
  return true;
}

template <class Module>
void bind_cost_from_gram(Module& m) {
  m.def("cost_from_gram_plain", &cost_from_gram_plain);
  m.def(
      "cost_from_gram",
      [](Address gram, Address times, int64_t K, bool states, Address cost) {
        FK_SELECT(cost_from_gram)({at<double>(gram), at<double>(times), K, states, at<double>(cost)});
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_cost_from_gram_cuda(Module& m) {
  m.def("cost_from_gram",
        [](Address gram, Address times, int64_t K, bool states, Address cost, int device, Address stream) {
          launch(fk::cuda::cost_from_gram, {at<double>(gram), at<double>(times), K, states, at<double>(cost)}, device,
                 stream);
        });
}
