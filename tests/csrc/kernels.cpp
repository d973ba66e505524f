// Runs the tests of the CPU kernels, for a build with sanitizers (CMakeLists.txt: FLOWKERNELS_SANITIZE).
#include <exception>

#include "common/test.h"
#include "common/threads.h"

// What the sanitizers ask of a program. Fresh memory is NaN, so that a sum that starts from it shows.
#define HOOK extern "C" __attribute__((visibility("default")))
HOOK const char* __asan_default_options() {
  return "malloc_fill_byte=255:max_malloc_fill_size=1000000000";
}
HOOK const char* __tsan_default_options() {
  return "halt_on_error=1";
}
HOOK void __ubsan_on_report();
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*)());  // null without the sanitizer

void __ubsan_on_report() {
  fprintf(stderr, "FAILED %s\n", g_case);
}

int main(int argc, char** argv) {  // the names of ops: only these
  setenv("OMP_WAIT_POLICY", "passive", 0);
  try {
    fk::isa();
  } catch (const std::exception& e) {
    printf("skipped: %s\n", e.what());
    const char* name = std::getenv("FLOWKERNELS_ISA");
    for (const char* known : {"avx2", "avx512", "avx512_bf16", "amx"})
      if (!std::strcmp(name, known)) return 0;
    return 1;
  }
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(__ubsan_on_report);
  printf("%s, threads of %s%s\n", fk::isa_name(fk::isa()), fk::thread_runtime(), kRacesOnly ? ", races only" : "");
  for (const auto& [name, run_test] : tests()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; i++) wanted |= !std::strcmp(argv[i], name);
    if (!wanted) continue;
    run_test();
    printf("%-16s %6d cases", name, g_cases);
    kRacesOnly ? printf("\n") : printf(", largest error %.3f of the allowed\n", g_worst);
    fflush(stdout);
    g_cases = 0, g_worst = 0;
  }
}
