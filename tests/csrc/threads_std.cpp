// csrc/common/threads.h on the standard library, for ThreadSanitizer: a thread for every part.
#include <algorithm>
#include <thread>
#include <vector>

#include "common/threads.h"

namespace fk {

void run_parts(int parts, void (*body)(void*, int), void* ctx) {
  std::vector<std::thread> others;
  for (int p = 1; p < parts; p++) others.emplace_back(body, ctx, p);
  if (parts > 0) body(ctx, 0);
  for (std::thread& t : others) t.join();
}

void run_team(int most, void (*body)(void*, int, int), void* ctx) {
  const int parts = std::max(most, 1);
  std::vector<std::thread> others;
  for (int p = 1; p < parts; p++) others.emplace_back(body, ctx, p, parts);
  body(ctx, 0, parts);
  for (std::thread& t : others) t.join();
}

const char* thread_runtime() {
  return "std::thread";
}

}  // namespace fk
