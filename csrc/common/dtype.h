// Element types, as the Python side names them (flowkernels/ops/library.py: DTYPE_CODES).
#pragma once

namespace fk {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

}  // namespace fk
