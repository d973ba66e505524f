#pragma once
#include "bindings.h"
#include "segment_points/segment_points.h"
#include "tensors.h"

inline fk::SegmentPointsArgs segment_points_args(Address bank, Address interval, Address sample, Address u, Address out,
                                                 int bank_type, int out_type, int64_t knots, int64_t samples, int64_t B,
                                                 int64_t D) {
  return {at(bank),
          at<int64_t>(interval),
          at<int64_t>(sample),
          at(u),
          at(out),
          fk::Dtype(bank_type),
          fk::Dtype(out_type),
          knots,
          samples,
          B,
          D,
          0};
}

inline bool segment_points_plain(py::handle bank, py::handle interval, py::handle sample, py::handle u, py::handle out,
                                 int threads) {
  const Plain states(bank), i(interval), s(sample), to(out);
  if (!states || !i || !s || !to || !states.is_state() || states.dims() < 3 || states.size(0) < 2) return false;
  if (i.type() != Plain::i64 || s.type() != Plain::i64 || i.dims() != 1 || !s.is_like(i)) return false;
  std::optional<Doubles> places;
  if (!u.is_none()) {
    const Plain t(u);
    if (!t || !t.is_state() || !t.is_like(i)) return false;
    places.emplace(t);
  }
  py::gil_scoped_release others_run;
  return FK_SELECT(segment_points)({states.data(), i.data<int64_t>(), s.data<int64_t>(),
                                    places ? places->data() : nullptr, to.data(), states.dtype(), to.dtype(),
                                    states.size(0), states.size(1), i.count(), states.count_from(2), threads}) < 0;
}

template <class Module>
void bind_segment_points(Module& m) {
  m.def("segment_points_plain", &segment_points_plain);
  m.def("segment_points", ON_THREADS(segment_points, SegmentPointsArgs), py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_segment_points_cuda(Module& m) {
  m.def("segment_points", on_stream(segment_points_args, fk::cuda::segment_points));
}
