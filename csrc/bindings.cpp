// The compiled module: the kernels of the CPU, one submodule with those of CUDA, and what Python asks besides.
#include "bindings.h"

#include "common/memory.h"
#include "common/threads.h"
#include "ops.h"
#include "tensors.h"
#include "watch/watch.h"

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return fk::isa_name(fk::isa()); });
#if defined(FK_CUDA_ARCHS)
  auto cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
  cuda.attr("architectures") = FK_CUDA_ARCHS;
#endif
  m.def("thread_runtime", &fk::thread_runtime);
  m.def("watch_changed", [](const py::tuple& entries) { return fk::watch_changed(entries.ptr()); });
  m.def("state_holds",
        [](const py::tuple& marks, const py::tuple& roots) { return fk::state_holds(marks.ptr(), roots.ptr()); });
  m.attr("state_form") = fk::kStateForm;
  m.def("advise_large_pages", [](Address p, size_t bytes) { fk::advise_large_pages(at(p), bytes); });
  m.def("read_tensors_of", &read_tensors_of);
  m.def("is_finite", &is_finite);
  m.def("is_one", &is_one);
#define BIND(op) bind_##op(m);
  FK_EACH_OP(BIND)
}
