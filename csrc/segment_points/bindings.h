#pragma once
#include "bindings.h"
#include "segment_points/segment_points.h"

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

template <class Module>
void bind_segment_points(Module& m) {
  m.def("segment_points", ON_THREADS(segment_points, SegmentPointsArgs), py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_segment_points_cuda(Module& m) {
  m.def("segment_points", on_stream(segment_points_args, fk::cuda::segment_points));
}
