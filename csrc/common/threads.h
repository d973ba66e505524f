// Threads: the OpenMP team that torch already runs, never a second runtime.
#pragma once

namespace fk {

// Calls body(ctx, part) for part = 0..parts-1, each exactly once, on at most `parts` threads.
// Which thread takes a part does not matter to the result as long as parts write apart.
// Runs serially for parts <= 1, in a forked child (OpenMP teams do not survive fork), and where no runtime is found.
void run_parts(int parts, void (*body)(void* ctx, int part), void* ctx);

// Where the team comes from: the path of the OpenMP library, or "none (serial)".
const char* thread_runtime();

template <class F>
void parallel(int parts, F&& f) {
  run_parts(parts, [](void* c, int part) { (*static_cast<F*>(c))(part); }, &f);
}

}  // namespace fk
