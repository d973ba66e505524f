#pragma once
#include "bindings.h"
#include "cost_from_gram/cost_from_gram.h"

template <class Module>
void bind_cost_from_gram(Module& m) {
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
