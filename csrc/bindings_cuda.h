// The CUDA kernels' part of the Python module, for flowkernels._C.cuda and for the host emulation of the tests.
#pragma once
#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& m);
