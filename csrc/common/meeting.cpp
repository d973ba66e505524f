#include <sched.h>

#include <climits>
#include <cstdlib>
#include <cstring>

#include "common/threads.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fk {
namespace {

constexpr int kSpins = 2000;  // 20 to 100 us, as long as a processor's pause takes

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return INT_MAX;
}

int spins(int parts) {
  static const char* const policy = std::getenv("OMP_WAIT_POLICY");
  static const bool passive = policy && !strcasecmp(policy, "passive");
  static const int most = processors();
  return passive || parts > most ? 0 : kSpins;
}

// Until `word` is no longer `seen`, or for no reason
void sleep_on(std::atomic<unsigned>& word, unsigned seen) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
  (void)word, (void)seen;
  sched_yield();
#endif
}

}  // namespace

void Meeting::wait(int parts, unsigned* round) {
  const unsigned all = *round += unsigned(parts);  // it wraps
  if (arrived_.fetch_add(1) + 1 == all) {
#if defined(__linux__)
    if (asleep_.load() > 0) syscall(SYS_futex, &arrived_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
    return;
  }
  auto come = [&](unsigned now) { return int(now - all) >= 0; };
  for (int i = spins(parts); i > 0; i--) {
    if (come(arrived_.load(std::memory_order_acquire))) return;
    pause();
  }
  asleep_.fetch_add(1);
  for (unsigned now = arrived_.load(); !come(now); now = arrived_.load()) sleep_on(arrived_, now);
  asleep_.fetch_sub(1);
}

}  // namespace fk
