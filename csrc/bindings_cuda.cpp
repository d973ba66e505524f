// The submodule of CUDA kernels.
#include "bindings.h"
#include "ops.h"

void bind_cuda(py::module_& m) {
  m.def("device_problem", &fk::cuda::device_problem, "Why there is no device to run on; empty where there is one.");
#define BIND(op) bind_##op##_cuda(m);
  FK_EACH_CUDA_OP(BIND)
}
