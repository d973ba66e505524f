#pragma once
#include "bindings.h"
#include "straighten_loss/straighten_loss.h"
#include "tensors.h"

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

// The losses go to three tensors of the bank's type: `[]`, `[B]` and `[knots - 1]`. gradient: like v, or None.
inline bool straighten_loss_plain(py::handle v, py::handle bank, py::handle step_sizes, py::handle interval,
                                  py::handle sample, py::handle weight, double huber_c, py::handle loss,
                                  py::handle per_sample, py::handle per_interval, py::handle gradient, int threads) {
  const Plain velocities(v), states(bank), h(step_sizes), i(interval), s(sample);
  if (!velocities || !states || !h || !i || !s) return false;
  if (!states.is_state() || states.dims() < 3 || states.size(0) < 2 || !velocities.is_velocity_of(states)) return false;
  if (i.type() != Plain::i64 || s.type() != Plain::i64 || i.dims() != 1 || !s.is_like(i)) return false;
  const int64_t B = i.count(), N = states.size(0) - 1;
  if (velocities.size(0) != B || !velocities.has_sizes(1, states, 2) || !h.is_state() || !h.is(1, N)) return false;
  const Doubles sizes(h);
  std::optional<Doubles> weights;
  if (!weight.is_none()) {
    const Plain t(weight);
    if (!t || !t.is_state() || !t.is(1, B)) return false;
    weights.emplace(t);
  }
  void* slope = nullptr;
  if (!gradient.is_none()) {
    const Plain to(gradient);
    if (!to || to.type() != velocities.type() || !to.is_like(velocities)) return false;
    slope = to.data();
  }
  const Plain to[] = {Plain(loss), Plain(per_sample), Plain(per_interval)};
  const int64_t counts[] = {1, B, N};
  for (int k = 0; k < 3; k++) {
    if (!to[k] || to[k].count() != counts[k] || to[k].type() != states.type()) return false;
  }
  std::vector<double> sums(1 + B + N);
  int64_t bad;
  {
    py::gil_scoped_release others_run;
    bad = FK_SELECT(straighten_loss)(
        {velocities.data(), states.data(), sizes.data(), i.data<int64_t>(), s.data<int64_t>(),
         weights ? weights->data() : nullptr, huber_c, velocities.dtype(), states.dtype(), N + 1, states.size(1), B,
         velocities.count() / B, sums.data(), sums.data() + 1, sums.data() + 1 + B, slope, threads});
  }
  const double* from = sums.data();
  for (int k = 0; k < 3 && bad < 0; from += counts[k++]) {
    if (states.type() == Plain::f64)
      std::copy_n(from, counts[k], to[k].data<double>());
    else
      std::copy_n(from, counts[k], to[k].data<float>());
  }
  return bad < 0;
}

template <class Module>
void bind_straighten_loss(Module& m) {
  m.def("straighten_loss_plain", &straighten_loss_plain);
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
