// pybind11: addresses and sizes in, then the device's number and the address of a stream; nothing is allocated and
// nothing waits. Callers are flowkernels/ops/<op>/__init__.py.
#include <stdexcept>

#include "bellman/bellman.h"
#include "bellman_pairs/bellman_pairs.h"
#include "bindings.h"
#include "common/cuda_runtime.h"
#include "cost_from_gram/cost_from_gram.h"
#include "mlp_sample/mlp_sample.h"
#include "velocity_gram/velocity_gram.h"

// Runs a launcher on a device that need not be the current one.
template <class Args>
static void launch(int (*launcher)(const Args&, void*), const Args& args, int device, Address stream) {
  fk::cuda::DeviceGuard guard(device);
  int status = guard.status();
  if (!status) {
    py::gil_scoped_release others_run;  // a launch waits where the device's queue is full
    status = launcher(args, at(stream));
  }
  if (status) throw std::runtime_error(fk::cuda::error_text(status));
}

template <class Args, class... A>
static auto on_stream(Args (*make)(A...), int (*launcher)(const Args&, void*)) {
  return [=](A... a, int device, Address stream) { launch(launcher, make(a...), device, stream); };
}

void bind_cuda(py::module_& m) {
  m.def("device_problem", &fk::cuda::device_problem, "Why there is no device to run on; empty where there is one.");

  m.def("cost_from_gram",
        [](Address gram, Address times, int64_t K, bool states, Address cost, int device, Address stream) {
          launch(fk::cuda::cost_from_gram, {at<double>(gram), at<double>(times), K, states, at<double>(cost)}, device,
                 stream);
        });

  m.def("bellman", [](Address cost, int64_t n, int64_t steps, double carry, Address value, Address parent, Address bad,
                      int device, Address stream) {
    launch(fk::cuda::bellman,
           {at<double>(cost), n, steps, carry, at<double>(value), at<int64_t>(parent), at<int64_t>(bad)}, device,
           stream);
  });

  m.def("bellman_pairs", [](Address first, Address cost, int64_t n, int64_t steps, Address value, Address parent,
                            Address bad, int device, Address stream) {
    launch(fk::cuda::bellman_pairs,
           {at<double>(first), at<double>(cost), n, steps, at<double>(value), at<int64_t>(parent), at<int64_t>(bad)},
           device, stream);
  });

  m.def("euler_step", on_stream(euler_step_args, fk::cuda::euler_step));

  m.def("segment_points", on_stream(segment_points_args, fk::cuda::segment_points));

  m.def("straighten_loss_partials", &fk::cuda::straighten_loss_partials, py::arg("B"), py::arg("D"),
        "Elements of the bank's type that straighten_loss takes for its sums.");
  m.def("straighten_loss", on_stream(straighten_loss_args, fk::cuda::straighten_loss));

  using Gram = std::tuple<Address, int, int64_t, int64_t, int64_t, Address, int64_t, Address>;  // what is read
  auto gram_args = [](const Gram& g, Address gram, Address workspace) -> fk::VelocityGramArgs {
    const auto [v, v_type, K, M, v_stride, x, x_stride, times] = g;
    return {at(v), fk::Dtype(v_type), K, M, v_stride, at(x), x_stride, at<double>(times), at<double>(gram),
            0,     at(workspace)};
  };
  m.def("velocity_gram_workspace", [=](const Gram& g, int device) {
    fk::cuda::DeviceGuard guard(device);
    return fk::cuda::velocity_gram_workspace(gram_args(g, 0, 0));
  });
  m.def("velocity_gram", [=](const Gram& g, Address gram, Address workspace, int device, Address stream) {
    launch(fk::cuda::velocity_gram, gram_args(g, gram, workspace), device, stream);
  });

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

  m.def("linear_euler", on_stream(linear_euler_args, fk::cuda::linear_euler));

  m.def("linear_update", on_stream(linear_update_args, fk::cuda::linear_update));
}
