#pragma once
#include "bindings.h"
#include "ceilings/ceilings.h"

template <class Module>
void bind_ceilings(Module& m) {
  m.def(
      "multiply_adds",
      [](int64_t rounds, int threads) {
        float sink;
        return FK_SELECT(multiply_adds)(rounds, threads, &sink);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "read_again",
      [](Address a, int64_t n, int64_t rounds, int threads) {
        float sink;
        FK_SELECT(read_again)(at<float>(a), n, rounds, threads, &sink);
        return sink;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "triad",
      [](Address a, Address b, float s, Address out, int64_t n, int threads) {
        FK_SELECT(triad)(at<float>(a), at<float>(b), s, at<float>(out), n, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}
