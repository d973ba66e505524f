#include "axpy/axpy.h"
#include "common/cuda.h"

namespace fk {
namespace cuda {

constexpr int kAxpyThreads = 256;

__global__ void __launch_bounds__(kAxpyThreads)
    axpy_kernel(const float* x, const float* y, float a, float* out, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * kAxpyThreads + threadIdx.x;
  if (i < n) out[i] = x[i] + a * y[i];
}

int axpy(const AxpyArgs& g, void* stream) {
  if (g.n == 0) return launched();
  const dim3 grid(static_cast<unsigned>((g.n + kAxpyThreads - 1) / kAxpyThreads));
  FK_LAUNCH(axpy_kernel, grid, dim3(kAxpyThreads), 0, stream, g.x, g.y, g.a, g.out, g.n);
  return launched();
}

}  // namespace cuda
}  // namespace fk
