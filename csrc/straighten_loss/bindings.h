#pragma once
#include "bindings.h"
#include "straighten_loss/straighten_loss.h"

inline fk::StraightenLossArgs straighten_loss_args(Address v, Address bank, Address step_sizes, Address interval,
                                                   Address sample, Address weight, double huber_c, int v_type,
                                                   int bank_type, int64_t knots, int64_t samples, int64_t B, int64_t D,
                                                   Address loss, Address per_sample, Address per_interval,
                                                   Address gradient, Address partial) {
  return {at(v),
          at(bank),
          at(step_sizes),
          at<int64_t>(interval),
          at<int64_t>(sample),
          at(weight),
          huber_c,
          fk::Dtype(v_type),
          fk::Dtype(bank_type),
          knots,
          samples,
          B,
          D,
          at(loss),
          at(per_sample),
          at(per_interval),
          at(gradient),
          0,
          at(partial)};
}

template <class Module>
void bind_straighten_loss(Module& m) {
  m.def("straighten_loss", ON_THREADS(straighten_loss, StraightenLossArgs), py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_straighten_loss_cuda(Module& m) {
  m.def("straighten_loss_partials", &fk::cuda::straighten_loss_partials, py::arg("B"), py::arg("D"), py::arg("knots"),
        "Elements of the bank's type that straighten_loss takes for its sums.");
  m.def("straighten_loss", on_stream(straighten_loss_args, fk::cuda::straighten_loss));
  m.def("straighten_loss_scale",
        [](Address gradient, Address factor, int v_type, int bank_type, int64_t n, int device, Address stream) {
          launch(fk::cuda::straighten_loss_scale,
                 {at(gradient), at(factor), fk::Dtype(v_type), fk::Dtype(bank_type), n}, device, stream);
        });
}
