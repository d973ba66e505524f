// pybind11: addresses and sizes in, nothing owned, nothing checked twice. Callers are flowkernels/ops/<op>/__init__.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bellman/bellman.h"
#include "bindings_cuda.h"
#include "ceilings/ceilings.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/threads.h"
#include "cost_from_gram/cost_from_gram.h"
#include "euler_step/euler_step.h"
#include "linear_euler/linear_euler.h"
#include "linear_update/linear_update.h"
#include "mlp_sample/mlp_sample.h"
#include "segment_points/segment_points.h"
#include "straighten_loss/straighten_loss.h"
#include "velocity_gram/velocity_gram.h"

namespace py = pybind11;
using Address = uintptr_t;

template <class T = void>
static T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

using Operand = std::tuple<Address, int, int64_t>;  // of rows: address, type, stride
static fk::Rows rows(const Operand& t) {
  return {at(std::get<0>(t)), fk::Dtype(std::get<1>(t)), std::get<2>(t)};
}
static const void* const* pointers(const std::vector<Address>& a) {
  return reinterpret_cast<const void* const*>(a.data());
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("isa", [] { return fk::isa_name(fk::isa()); });
#if defined(FK_CUDA_ARCHS)
  auto cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
  cuda.attr("architectures") = FK_CUDA_ARCHS;
#endif
  m.def("thread_runtime", &fk::thread_runtime);
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
      [](Address cost, int64_t n, int64_t steps, Address value, Address parent) {
        return FK_SELECT(bellman)({at<double>(cost), n, steps, at<double>(value), at<int64_t>(parent)});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "euler_step",
      [](Address x, Address v, Address v_uncond, Address out, Address low, int x_type, int v_type, int low_type,
         int64_t n, double h, double guidance, int threads) {
        FK_SELECT(euler_step)
        ({at(x), at(v), at(v_uncond), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type), n, h,
          guidance, threads});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "linear_euler",
      [](Address x, const Operand& z, int64_t z_token, const Operand& weight, const Operand& bias,
         const Operand& norm_weight, const Operand& norm_bias, const Operand& scale, const Operand& shift,
         const std::vector<Address>& history, const std::vector<double>& b, Address out, Address low, Address velocity,
         int x_type, int history_type, int low_type, int velocity_type, std::array<int64_t, 4> sizes,
         std::array<int64_t, 4> patches, bool channels_first, std::optional<double> eps, double h,
         std::optional<double> guidance, int threads) {
        auto [n, T, d, outputs] = sizes;
        auto [patch, C, H, W] = patches;
        FK_SELECT(linear_euler)
        ({at(x),
          rows(z),
          z_token,
          rows(weight),
          rows(bias),
          rows(norm_weight),
          rows(norm_bias),
          rows(scale),
          rows(shift),
          pointers(history),
          b.data(),
          int64_t(history.size()),
          at(out),
          at(low),
          at(velocity),
          fk::Dtype(x_type),
          fk::Dtype(history_type),
          fk::Dtype(low_type),
          fk::Dtype(velocity_type),
          n,
          T,
          d,
          outputs,
          patch,
          C,
          H,
          W,
          channels_first,
          eps.has_value(),
          guidance.has_value(),
          eps.value_or(0),
          h,
          guidance.value_or(1),
          threads});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "linear_update",
      [](Address x, const std::vector<Address>& v, const std::vector<double>& b, Address out, Address low, int x_type,
         int v_type, int low_type, int64_t n, int threads) {
        FK_SELECT(linear_update)
        ({at(x), pointers(v), b.data(), int64_t(v.size()), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type),
          fk::Dtype(low_type), n, threads});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "segment_points",
      [](Address bank, Address interval, Address sample, Address u, Address out, int bank_type, int out_type,
         int64_t knots, int64_t samples, int64_t B, int64_t D, int threads) {
        return FK_SELECT(segment_points)({at(bank), at<int64_t>(interval), at<int64_t>(sample), at<double>(u), at(out),
                                          fk::Dtype(bank_type), fk::Dtype(out_type), knots, samples, B, D, threads});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "straighten_loss",
      [](Address v, Address bank, Address step_sizes, Address interval, Address sample, Address weight, double huber_c,
         int v_type, int bank_type, int64_t knots, int64_t samples, int64_t B, int64_t D, Address loss,
         Address per_sample, Address per_interval, Address gradient, int threads) {
        return FK_SELECT(straighten_loss)({at(v), at(bank), at<double>(step_sizes), at<int64_t>(interval),
                                           at<int64_t>(sample), at<double>(weight), huber_c, fk::Dtype(v_type),
                                           fk::Dtype(bank_type), knots, samples, B, D, at<double>(loss),
                                           at<double>(per_sample), at<double>(per_interval), at(gradient), threads});
      },
      py::call_guard<py::gil_scoped_release>());

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
