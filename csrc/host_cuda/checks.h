// The checked build: every load and store of a kernel is watched. It finds accesses out of bounds, races within and
// between blocks, reads of what nobody wrote and misaligned vectors, and counts sectors and bank conflicts by line.
#pragma once

#include <string>
#include <vector>

#include "host_cuda/emulation.h"

namespace host_cuda {
namespace check {

// ---- what the emulation tells ----
enum class Kind : uint8_t { load, store, atomic };
struct Block {
  uint3 index;
  dim3 grid;
  unsigned threads;
  const char *arena, *arena_end;      // shared memory
  const void *contexts, *contexts_end;  // where threadIdx and the like are
};
extern const char* stack_end;  // of the thread that runs
constexpr size_t kStack = 64 << 10;

void begin_launch();
std::string end_launch();                       // errors, a line each
Loc kernel_line(void* code, Loc otherwise);     // if the code is a cuda.cu's
void begin_block(const Block&);
void end_block();
void shared_array(const char* p, size_t bytes);
void join(const std::vector<unsigned>& threads);  // these have met at a barrier
void fence();
void access(const void* p, size_t bytes, Kind, void* code);

// ---- what tests ask ----
// Memory that kernels may touch. `element` bytes are written and read by one thread at a time.
void buffer(const void* p, size_t bytes, size_t element, bool initialised, const std::string& name);
void clear();                      // forgets buffers and accesses
size_t unwritten(const void* p);  // elements of this buffer, not initialised, that no kernel has written
struct Line {
  std::string where;  // <op>/cuda.cu:<line>
  bool shared;
  Kind kind;
  size_t bytes;        // that a lane accesses
  uint64_t requests;   // of a warp
  uint64_t lanes;      // of all requests
  uint64_t parts;      // sectors of 32 bytes of global memory, or passes through the banks of shared memory
  uint64_t least;      // what parts would be if lanes accessed neighbours, from the start of a sector
};
std::vector<Line> lines();  // since clear()

}  // namespace check
}  // namespace host_cuda
