// Threads: the OpenMP team that torch already runs, never a second runtime.
#pragma once

#include <atomic>

namespace fk {

// Calls body(ctx, part) for part = 0..parts-1, each exactly once, on at most `parts` threads.
// Which thread takes a part does not matter to the result as long as parts write apart.
// Runs serially for parts <= 1, in a forked child (OpenMP teams do not survive fork), and where no runtime is found.
void run_parts(int parts, void (*body)(void* ctx, int part), void* ctx);

// Calls body(ctx, part, parts) once on each thread of one team of `parts` <= `most`, all at the same time: they may
// wait for one another. One thread where run_parts would run serially, and inside another team's work.
void run_team(int most, void (*body)(void* ctx, int part, int parts), void* ctx);

// Where the threads of a team wait until all have come, again and again. `round` is a thread's own, zero at first. A
// thread that waits spins for some microseconds, and sleeps after that: at once where OMP_WAIT_POLICY is passive, or
// the team has more threads than this process has processors.
class Meeting {
 public:
  void wait(int parts, unsigned* round);

 private:
  alignas(64) std::atomic<unsigned> arrived_{0};
  alignas(64) std::atomic<int> asleep_{0};
};

// Where the team comes from: the path of the OpenMP library, or "none (serial)".
const char* thread_runtime();

template <class F>
void parallel(int parts, F&& f) {
  run_parts(parts, [](void* c, int part) { (*static_cast<F*>(c))(part); }, &f);
}

template <class F>
void team(int most, F&& f) {
  run_team(most, [](void* c, int part, int parts) { (*static_cast<F*>(c))(part, parts); }, &f);
}

}  // namespace fk
