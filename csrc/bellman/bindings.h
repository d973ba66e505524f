#pragma once
#include "bellman/bellman.h"
#include "bindings.h"

template <class Module>
void bind_bellman(Module& m) {
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
