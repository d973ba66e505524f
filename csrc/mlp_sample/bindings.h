#pragma once
#include "bindings.h"
#include "mlp_sample/mlp_sample.h"
#include "tensors.h"

// False as well where a result is not finite: then `out` is nothing.
inline bool mlp_sample_plain(Address prepared, py::handle x, const py::tuple& shape, py::handle out, int threads) {
  const Plain from(x, true), to(out, true);
  if (!from || !to || from.type() != Plain::f32 || to.type() != Plain::f32 || !to.is_like(from)) return false;
  if (from.dims() != 1 + int(shape.size())) return false;
  for (int d = 1; d < from.dims(); d++) {
    if (from.size(d) != shape[size_t(d - 1)].cast<int64_t>()) return false;
  }
  const fk::MlpSampleArgs args = {
      *at<fk::MlpPrepared>(prepared), from.data<float>(), to.data<float>(), from.size(0), nullptr, nullptr, threads};
  py::gil_scoped_release others_run;
  return FK_SELECT_BF16_AMX(mlp_sample)(args) < 0;
}

template <class Module>
void bind_mlp_sample(Module& m) {
  m.def("mlp_sample_plain", &mlp_sample_plain);
  m.def("mlp_pack", [](Address weight, int64_t out, int64_t in, int type, Address packed) {
    return FK_SELECT_BF16_AMX(mlp_pack)({at<float>(weight), out, in, fk::Dtype(type), at(packed)});
  });
  m.def(
      "mlp_sample",
      [](Address prepared, Address x, Address out, int64_t n, Address states, Address velocities, int threads) {
        return FK_SELECT_BF16_AMX(mlp_sample)({*at<fk::MlpPrepared>(prepared), at<float>(x), at<float>(out), n,
                                               at<float>(states), at<float>(velocities), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Module>
void bind_mlp_sample_cuda(Module& m) {
  m.def("mlp_program",
        [](Address prepared, Address to) { return fk::cuda::mlp_program(*at<fk::MlpPrepared>(prepared), at(to)); });
  m.def("mlp_upload", [](Address from, int64_t bytes, Address to, int device, Address stream) {
    launch(fk::cuda::mlp_upload, {at(from), bytes, at(to)}, device, stream);
  });
  m.def("mlp_scratch", [](Address prepared, int64_t n, int device) {
    fk::cuda::DeviceGuard guard(device);
    return fk::cuda::mlp_scratch({*at<fk::MlpPrepared>(prepared), nullptr, nullptr, n, nullptr, nullptr, 0});
  });
  m.def("mlp_sample", [](Address prepared, Address program, Address x, Address out, int64_t n, Address states,
                         Address velocities, Address scratch, int device, Address stream) {
    const fk::MlpSampleArgs a = {
        *at<fk::MlpPrepared>(prepared), at<float>(x), at<float>(out), n, at<float>(states), at<float>(velocities), 0};
    launch(fk::cuda::mlp_sample, {a, at(program), at(scratch)}, device, stream);
  });
}
