#pragma once
#include "bellman_pairs/bellman_pairs.h"
#include "bindings.h"

template <class Module>
void bind_bellman_pairs(Module& m) {
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
