// pybind11: addresses and sizes in, nothing owned, nothing checked twice. Callers are flowkernels/ops/<op>/__init__.py.
#include "bindings.h"

#include "bellman/bellman.h"
#include "bellman_pairs/bellman_pairs.h"
#include "ceilings/ceilings.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/threads.h"
#include "cost_from_gram/cost_from_gram.h"
#include "mlp_sample/mlp_sample.h"
#include "velocity_gram/velocity_gram.h"
#include "watch/watch.h"

// The arguments that `make` puts together, and a number of threads, to `run`.
template <class Args, class... A, class Run>
static auto on_threads(Args (*make)(A...), Run run) {
  return [=](A... a, int threads) {
    Args args = make(a...);
    args.threads = threads;
    return run(args);
  };
}
#define ON_THREADS(op, Args) on_threads(op##_args, [](const fk::Args& a) { return FK_SELECT(op)(a); })

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return fk::isa_name(fk::isa()); });
#if defined(FK_CUDA_ARCHS)
  auto cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
  cuda.attr("architectures") = FK_CUDA_ARCHS;
#endif
  m.def("thread_runtime", &fk::thread_runtime);
  m.def("watch_changed", [](const py::tuple& entries) { return fk::watch_changed(entries.ptr()); });
  m.def("advise_large_pages", [](Address p, size_t bytes) { fk::advise_large_pages(at(p), bytes); });

  m.def(
      "velocity_gram",
      [](Address v, int v_type, int64_t K, int64_t M, int64_t v_stride, Address x, int64_t x_stride, Address times,
         Address gram, int threads) {
        FK_SELECT_AMX(velocity_gram)
        ({at(v), fk::Dtype(v_type), K, M, v_stride, at(x), x_stride, at<double>(times), at<double>(gram), threads});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "cost_from_gram",
      [](Address gram, Address times, int64_t K, bool states, Address cost) {
        FK_SELECT(cost_from_gram)({at<double>(gram), at<double>(times), K, states, at<double>(cost)});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "bellman",
      [](Address cost, int64_t n, int64_t steps, double carry, Address value, Address parent) {
        return FK_SELECT(bellman)({at<double>(cost), n, steps, carry, at<double>(value), at<int64_t>(parent)});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "bellman_pairs",
      [](Address first, Address cost, int64_t n, int64_t steps, Address value, Address parent) {
        return FK_SELECT(bellman_pairs)(
            {at<double>(first), at<double>(cost), n, steps, at<double>(value), at<int64_t>(parent)});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def("euler_step", ON_THREADS(euler_step, EulerStepArgs), py::call_guard<py::gil_scoped_release>());

  m.def("linear_euler", ON_THREADS(linear_euler, LinearEulerArgs), py::call_guard<py::gil_scoped_release>());

  m.def("linear_update", ON_THREADS(linear_update, LinearUpdateArgs), py::call_guard<py::gil_scoped_release>());

  m.def("segment_points", ON_THREADS(segment_points, SegmentPointsArgs), py::call_guard<py::gil_scoped_release>());

  m.def("straighten_loss", ON_THREADS(straighten_loss, StraightenLossArgs), py::call_guard<py::gil_scoped_release>());

  m.def("mlp_pack", [](Address weight, int64_t out, int64_t in, int type, Address packed) {
    return FK_SELECT_AMX(mlp_pack)({at<float>(weight), out, in, fk::Dtype(type), at(packed)});
  });

  m.def(
      "mlp_sample",
      [](Address prepared, Address x, Address out, int64_t n, Address states, Address velocities, int threads) {
        return FK_SELECT_AMX(mlp_sample)({*at<fk::MlpPrepared>(prepared), at<float>(x), at<float>(out), n,
                                          at<float>(states), at<float>(velocities), threads});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "multiply_adds",
      [](int64_t rounds, int threads) {
        float sink;
        return FK_SELECT(multiply_adds)(rounds, threads, &sink);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "triad",
      [](Address a, Address b, float s, Address out, int64_t n, int threads) {
        FK_SELECT(triad)(at<float>(a), at<float>(b), s, at<float>(out), n, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}
