#include "common/threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <string>

// Linking with -fopenmp would bind to whichever libgomp the loader finds, and torch wheels bring a copy of their own
// under another name. Two runtimes in one process mean two teams of spinning threads. So: look for the one that is
// mapped already, and call the entry point that the compiler's `#pragma omp parallel` calls.
namespace fk {
namespace {

struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*thread_num)() = nullptr;
  int (*team_size)() = nullptr;
  std::string path = "none (serial)";
};

std::atomic<bool> forked{false};

// From when the module is loaded: the team that does not survive may be torch's, and no kernel may have run before.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

bool bind(Runtime& r, const char* path, int flags) {
  void* lib = dlopen(path, RTLD_LAZY | flags);
  if (!lib) return false;
  r.parallel = reinterpret_cast<decltype(r.parallel)>(dlsym(lib, "GOMP_parallel"));
  r.thread_num = reinterpret_cast<decltype(r.thread_num)>(dlsym(lib, "omp_get_thread_num"));
  r.team_size = reinterpret_cast<decltype(r.team_size)>(dlsym(lib, "omp_get_num_threads"));
  if (!r.parallel || !r.thread_num || !r.team_size) {
    r.parallel = nullptr;
    return false;
  }
  r.path = path;
  return true;
}

Runtime find() {
  Runtime r;
  std::string mapped;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const char* base = std::strrchr(info->dlpi_name, '/');
        base = base ? base + 1 : info->dlpi_name;
        for (const char* stem : {"libgomp", "libiomp5", "libomp"})
          if (!std::strncmp(base, stem, std::strlen(stem))) {
            *static_cast<std::string*>(out) = info->dlpi_name;
            return 1;
          }
        return 0;
      },
      &mapped);
  if (mapped.empty() || !bind(r, mapped.c_str(), RTLD_NOLOAD)) bind(r, "libgomp.so.1", 0);
  return r;
}

const Runtime& runtime() {
  static const Runtime r = find();
  return r;
}

struct Job {
  void (*body)(void*, int);
  void* ctx;
  int parts;
};
struct TeamJob {
  void (*body)(void*, int, int);
  void* ctx;
};

}  // namespace

void run_parts(int parts, void (*body)(void*, int), void* ctx) {
  if (parts <= 1 || forked || !runtime().parallel) {
    for (int p = 0; p < parts; p++) body(ctx, p);
    return;
  }
  Job job{body, ctx, parts};
  runtime().parallel(
      [](void* j) {
        const Job& job = *static_cast<Job*>(j);
        const int step = runtime().team_size();  // the team may be smaller than asked for
        for (int p = runtime().thread_num(); p < job.parts; p += step) job.body(job.ctx, p);
      },
      &job, unsigned(parts), 0);
}

void run_team(int most, void (*body)(void*, int, int), void* ctx) {
  if (most <= 1 || forked || !runtime().parallel) return body(ctx, 0, 1);
  TeamJob job{body, ctx};
  runtime().parallel(
      [](void* j) {
        const TeamJob& job = *static_cast<TeamJob*>(j);
        job.body(job.ctx, runtime().thread_num(), runtime().team_size());
      },
      &job, unsigned(most), 0);
}

const char* thread_runtime() {
  return runtime().path.c_str();
}

}  // namespace fk
