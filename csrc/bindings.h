// What the bindings of the CPU's and the CUDA kernels share: pybind11, addresses and sizes in. Each op's arguments are
// put together here once; the CPU's functions take a number of threads after them, CUDA's a device and a stream.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "euler_step/euler_step.h"
#include "linear_euler/linear_euler.h"
#include "linear_update/linear_update.h"
#include "segment_points/segment_points.h"
#include "straighten_loss/straighten_loss.h"

namespace py = pybind11;
using Address = uintptr_t;

// The CUDA kernels, for flowkernels._C.cuda and for the host emulation of the tests.
void bind_cuda(py::module_& m);

template <class T = void>
static T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

static inline fk::EulerStepArgs euler_step_args(Address x, Address v, Address v_uncond, Address out, Address low,
                                                int x_type, int v_type, int low_type, int64_t n, double h,
                                                double guidance) {
  return {at(x), at(v), at(v_uncond), at(out), at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type),
          n,     h,     guidance,     0};
}

static inline const void* const* pointers(const std::vector<Address>& a) {
  return reinterpret_cast<const void* const*>(a.data());
}

using Operand = std::tuple<Address, int, int64_t>;  // of rows: address, type, stride
static inline fk::Rows rows(const Operand& t) {
  return {at(std::get<0>(t)), fk::Dtype(std::get<1>(t)), std::get<2>(t)};
}

static inline fk::LinearEulerArgs linear_euler_args(
    Address x, const Operand& z, int64_t z_token, const Operand& weight, const Operand& bias,
    const Operand& norm_weight, const Operand& norm_bias, const Operand& scale, const Operand& shift,
    const std::vector<Address>& history, const std::vector<double>& b, Address out, Address low, Address velocity,
    int x_type, int history_type, int low_type, int velocity_type, std::array<int64_t, 4> sizes,
    std::array<int64_t, 4> patches, bool channels_first, std::optional<double> eps, double h,
    std::optional<double> guidance) {
  auto [n, T, d, outputs] = sizes;
  auto [patch, C, H, W] = patches;
  return {at(x),
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
          0};
}

static inline fk::LinearUpdateArgs linear_update_args(Address x, const std::vector<Address>& v,
                                                      const std::vector<double>& b, Address out, Address low,
                                                      int x_type, int v_type, int low_type, int64_t n) {
  return {at(x),   pointers(v),       b.data(),          int64_t(v.size()),   at(out),
          at(low), fk::Dtype(x_type), fk::Dtype(v_type), fk::Dtype(low_type), n,
          0};
}

static inline fk::SegmentPointsArgs segment_points_args(Address bank, Address interval, Address sample, Address u,
                                                        Address out, int bank_type, int out_type, int64_t knots,
                                                        int64_t samples, int64_t B, int64_t D) {
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

static inline fk::StraightenLossArgs straighten_loss_args(Address v, Address bank, Address step_sizes, Address interval,
                                                          Address sample, Address weight, double huber_c, int v_type,
                                                          int bank_type, int64_t knots, int64_t samples, int64_t B,
                                                          int64_t D, Address loss, Address per_sample,
                                                          Address per_interval, Address gradient, Address partial) {
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
