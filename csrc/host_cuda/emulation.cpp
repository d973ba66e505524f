#include "host_cuda/emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef HOST_CUDA_CHECK
#include "host_cuda/checks.h"
#define CHECK(...) __VA_ARGS__
#else
#define CHECK(...)
#endif

namespace host_cuda {

__thread Thread* current = nullptr;

namespace {

constexpr size_t kPage = 4096, kStack = 64 << 10;
constexpr size_t kArena = 256 << 10;  // shared memory, and gaps between its arrays
constexpr int kBarriers = 16;

enum class State : unsigned char { fresh, ready, waiting, done };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, from_bytes;
  size_t group;
  void* code;  // where the kernel asked for it
};

struct Fiber {
  Thread thread;
  State state;
  int barrier;  // that it waits at, or -1
  const char* what;
  Loc where;
  char* stack = nullptr;  // the end of it, while the thread has begun and is not done
  void* top;              // saved stack pointer
  std::vector<Copy> copies;  // not landed yet, oldest first
  size_t groups;             // committed
};

struct Barrier {
  int arrived = 0, expected = 0, votes = 0, result = 0;
  Loc where{};
};

// A warp collective that some lanes of its mask have come to. The last one to come does the work for all.
struct Collective {
  struct Lane {
    const void* in;
    void* out;
    int bytes, source;
  };
  using Work = void (*)(Collective&);
  unsigned mask = 0, arrived = 0;
  Work work = nullptr;
  Loc where{};
  Lane lanes[32];
};

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u | 1) {}
  uint64_t below(uint64_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % n;
  }
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[below(i)]);
  }
};

struct Variable {
  const void* key;
  char* p;
};

// Runs one block at a time.
struct Engine {
  std::vector<Fiber> fibers;
  std::vector<unsigned> order;
  std::vector<char*> stacks;       // as mapped
  std::vector<char*> free_stacks;  // the ends
  std::vector<std::vector<std::unique_ptr<Collective>>> warps;  // the collectives of each
  Barrier barriers[kBarriers];
  Fiber* running = nullptr;
  void* scheduler = nullptr;  // saved stack pointer
  unsigned threads = 0, alive = 0;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  char* arena = nullptr;
  size_t arena_used = 0, shared_bytes = 0, dynamic_bytes = 0;
  std::vector<Variable> variables;
  std::string error;
  Random random{1};

  ~Engine() {
    for (char* s : stacks) munmap(s, kPage + kStack + kPage);
    if (arena) munmap(arena, kArena);
  }
};
__thread Engine* engine __attribute__((tls_model("initial-exec"))) = nullptr;

std::mutex lock;  // of these three
std::vector<std::unique_ptr<Engine>> idle_engines;
std::map<const void*, size_t> allowed_shared;
std::vector<std::pair<const void*, size_t>> asked_shared;  // of launches that need to be allowed it

// ---- fibers ----

extern "C" void host_cuda_switch(void** save, void* to);
asm(R"(
.text
.hidden host_cuda_switch
.globl host_cuda_switch
.type host_cuda_switch,@function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch,.-host_cuda_switch
)");

void to_scheduler(Fiber* f) {
  host_cuda_switch(&f->top, engine->scheduler);
}

char* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

// A thread that never waits leaves its stack to the next, which finds it in the cache.
char* take_stack(Engine* e) {
  if (e->free_stacks.empty()) {
    char* p = map_memory(kPage + kStack + kPage);
    mprotect(p, kPage, PROT_NONE);
    const size_t shift =
        e->stacks.size() % 32 * (kPage / 32);  // else all would compete for the same lines of the cache
    e->stacks.push_back(p);
    e->free_stacks.push_back(p + kPage + kStack + shift);
  }
  char* stack = e->free_stacks.back();
  e->free_stacks.pop_back();
  return stack;
}

std::string describe(const Fiber& f) {
  const uint3 b = f.thread.block, t = f.thread.index;
  char text[512];
  int n = snprintf(text, sizeof text, "  block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  if (f.state == State::waiting)
    snprintf(text + n, sizeof text - n, "%s at %s:%d\n", f.what, f.where.file, f.where.line);
  else
    snprintf(text + n, sizeof text - n, "%s\n", f.state == State::done ? "done" : "running");
  return text;
}

void land(Fiber* f, size_t groups) {  // the copies of the first so many groups
  size_t n = 0;
  for (; n < f->copies.size() && f->copies[n].group < groups; n++) {
    const Copy& c = f->copies[n];
    CHECK(if (c.from_bytes) check::access(c.from, c.from_bytes, check::Kind::load, c.code);
          check::access(c.to, c.bytes, check::Kind::store, c.code);)
    memcpy(c.to, c.from, c.from_bytes);
    memset(static_cast<char*>(c.to) + c.from_bytes, 0, c.bytes - c.from_bytes);
  }
  f->copies.erase(f->copies.begin(), f->copies.begin() + ptrdiff_t(n));
}

extern "C" void host_cuda_fiber() {
  Fiber* f = engine->running;
  engine->body(engine->arguments);
  if (!f->copies.empty()) land(f, SIZE_MAX);
  if (engine->barriers[0].arrived)
    fail(engine->barriers[0].where, "divergent barrier: a thread is done while others of its block wait here");
  f->state = State::done;
  engine->alive--;
  to_scheduler(f);
  abort();
}

void resume(Engine* e, Fiber* f) {
  if (f->state == State::fresh) {
    f->state = State::ready;
    f->stack = take_stack(e);
    void** top = reinterpret_cast<void**>(f->stack);
    *--top = nullptr;  // where a caller's address would be; keeps the alignment of calls
    *--top = reinterpret_cast<void*>(host_cuda_fiber);
    for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers that a switch restores
    f->top = top;
  }
  e->running = f;
  current = &f->thread;
  CHECK(check::stack_end = f->stack;)
  host_cuda_switch(&e->scheduler, f->top);
  current = nullptr;
  if (f->state == State::done) e->free_stacks.push_back(f->stack);
}

void wait(const char* what, Loc where) {
  Fiber* f = engine->running;
  f->state = State::waiting;
  f->what = what;
  f->where = where;
  to_scheduler(f);
}

// ---- blocks ----

std::string deadlock(const Engine* e) {
  std::string text = "deadlock: every thread of the block is done or waits; of each kind the first:\n";
  std::vector<std::pair<State, int>> shown;
  for (unsigned i = 0; i < e->threads; i++) {
    const Fiber& f = e->fibers[i];
    const std::pair<State, int> kind{f.state, f.state == State::waiting ? f.where.line : 0};
    if (std::find(shown.begin(), shown.end(), kind) != shown.end()) continue;
    shown.push_back(kind);
    text += describe(f);
  }
  return text;
}

bool run_ready(Engine* e, unsigned first, unsigned last) {  // each thread once; false: none is ready
  bool any = false;
  for (unsigned i = first; i < last && e->error.empty(); i++) {
    Fiber* f = &e->fibers[e->order[i]];
    if (f->state != State::fresh && f->state != State::ready) continue;
    any = true;
    resume(e, f);
  }
  return any;
}

void run_block(Engine* e, dim3 grid, dim3 block, uint3 index) {
  e->threads = e->alive = block.x * block.y * block.z;
  if (e->fibers.size() < e->threads) e->fibers.resize(e->threads);
  e->order.resize(e->threads);
  for (unsigned i = 0; i < e->threads; i++) {
    const uint3 in_block{i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    Fiber& f = e->fibers[i];
    f.thread = {in_block, index, block, grid, i, i / 32, i % 32};
    f.state = State::fresh;
    f.barrier = -1;
    f.groups = 0;
    e->order[i] = options().order == Order::reverse ? e->threads - 1 - i : i;
  }
  const unsigned warps = (e->threads + 31) / 32;
  if (e->warps.size() < warps) e->warps.resize(warps);
  e->variables.clear();
  e->arena_used = e->shared_bytes = 0;
  if (!e->arena) e->arena = map_memory(kArena);
  CHECK(check::begin_block(
            {index, grid, e->threads, e->arena, e->arena + kArena, e->fibers.data(), e->fibers.data() + e->threads});)

  // In a fixed order each warp goes as far as it can before the next one: 32 stacks stay in the cache.
  const bool random = options().order == Order::random;
  const unsigned together = random ? e->threads : 32;
  while (e->alive && e->error.empty()) {
    bool progress = false;
    if (random) e->random.shuffle(e->order);
    for (unsigned first = 0; first < e->threads; first += together) {
      bool any;
      do {
        any = run_ready(e, first, std::min(first + together, e->threads));
        progress |= any;
      } while (any && !random);
    }
    if (!progress) e->error = deadlock(e);
  }
  CHECK(check::end_block();)
}

// Arrays start at multiples of 1,024 bytes, as far as bank conflicts go like those of a GPU, and lie apart.
char* carve(size_t bytes, Loc where) {
  Engine* e = engine;
  e->shared_bytes += bytes;
  if (e->shared_bytes > kSharedLimit)
    fail(where, "the block has %zu bytes of shared memory; the limit is %zu", e->shared_bytes, kSharedLimit);
  char* p = e->arena + e->arena_used;
  e->arena_used += (bytes + 127) / 1024 * 1024 + 1024;
  if (e->arena_used > kArena) fail(where, "too many shared arrays");
  memset(p, 0xff, bytes);
  CHECK(check::shared_array(p, bytes);)
  return p;
}

// ---- collectives of a warp ----

bool in(unsigned mask, unsigned lane) {
  return mask >> lane & 1;
}

void collective(unsigned mask, Collective::Work work, Collective::Lane mine, Loc where) {
  const Thread& t = engine->running->thread;
  if (!in(mask, t.lane)) fail(where, "lane %u calls a warp collective whose mask 0x%08x leaves it out", t.lane, mask);
  auto& collectives = engine->warps[t.warp];
  Collective* c = nullptr;
  for (auto& other : collectives)
    if (other->arrived && other->mask & mask) {
      c = other.get();
      if (c->mask != mask || c->work != work || c->where.line != where.line || c->where.file != where.file)
        fail(where, "warp divergence: lanes of this warp wait at %s:%d with mask 0x%08x; this one comes with 0x%08x",
             c->where.file, c->where.line, c->mask, mask);
    }
  if (!c) {
    for (auto& other : collectives)
      if (!other->arrived) c = other.get();
    if (!c) c = collectives.emplace_back(new Collective).get();
    c->mask = mask;
    c->work = work;
    c->where = where;
  }
  c->lanes[t.lane] = mine;
  c->arrived |= 1u << t.lane;
  if (c->arrived != mask) return wait("waits in a warp collective", where);
  c->work(*c);
  c->arrived = 0;
  const unsigned first = t.warp * 32;
  for (unsigned i = 0; i < 32; i++)
    if (in(mask, i) && i != t.lane) engine->fibers[first + i].state = State::ready;
}

struct Fragments {  // PTX: of A, the registers are rows g and g + 8 of columns 2 t, then of columns 2 t + 8
  uint32_t a[4], b[2];
  float* d;
};

template <Low low>
double element(uint32_t two, int which) {
  const uint16_t bits = uint16_t(two >> 16 * which);
  if constexpr (low == Low::bf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &wide, sizeof v);
    return v;
  }
  _Float16 v;
  memcpy(&v, &bits, sizeof v);
  return double(v);
}

template <Low low>
void multiply(Collective& c) {
  double a[16][16], b[16][8], d[16][8];
  const auto lane = [&](int i) { return static_cast<const Fragments*>(c.lanes[i].in); };
  for (int i = 0; i < 32; i++) {
    const Fragments& f = *lane(i);
    const int g = i / 4, t = i % 4;
    for (int r = 0; r < 4; r++)
      for (int j = 0; j < 2; j++) a[g + r % 2 * 8][2 * t + j + r / 2 * 8] = element<low>(f.a[r], j);
    for (int r = 0; r < 2; r++)
      for (int j = 0; j < 2; j++) b[2 * t + j + r * 8][g] = element<low>(f.b[r], j);
    for (int r = 0; r < 4; r++) d[g + r / 2 * 8][2 * t + r % 2] = f.d[r];
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k += 8) {
      double terms[9][8];
      for (int j = 0; j < 8; j++)
        for (int n = 0; n < 8; n++) terms[j][n] = a[m][k + j] * b[k + j][n];
      memcpy(terms[8], d[m], sizeof d[m]);
      add_and_cut(terms, 9, d[m]);
    }
  for (int i = 0; i < 32; i++)
    for (int r = 0; r < 4; r++) lane(i)->d[r] = float(d[i / 4 + r / 2 * 8][2 * (i % 4) + r % 2]);
}

}  // namespace

Options& options() {
  static Options o;
  return o;
}

void fail(Loc where, const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  CHECK(where = check::kernel_line(__builtin_return_address(0), where);)
  Fiber* f = engine->running;
  engine->error = std::string(where.file) + ":" + std::to_string(where.line) + ": " + text + "\n" + describe(*f);
  to_scheduler(f);  // for good
  abort();
}

// ---- barriers ----

// `expected` 0: all threads of the block.
static int arrive(int id, int expected, bool vote, Loc where) {
  Engine* e = engine;
  Barrier& b = e->barriers[id];
  if (b.arrived && b.expected != expected)
    fail(where, "barrier %d is for %d threads here and for %d at %s:%d", id, expected, b.expected, b.where.file,
         b.where.line);
  if (!expected) {
    if (b.arrived && (b.where.line != where.line || b.where.file != where.file))
      fail(where, "divergent barrier: other threads of this block wait at %s:%d", b.where.file, b.where.line);
    if (e->alive < e->threads)
      fail(where, "divergent barrier: %u threads of this block are done already", e->threads - e->alive);
  }
  b.where = where;
  b.expected = expected;
  b.votes += vote;
  if (++b.arrived < (expected ? expected : int(e->threads))) {
    e->running->barrier = id;
    wait("waits at a barrier", where);
    e->running->barrier = -1;
    return b.result;  // of the last time: nobody can complete the barrier again before this thread has come
  }
  b.result = b.votes;
  b.arrived = b.votes = 0;
  CHECK(std::vector<unsigned> joined{e->running->thread.number};)
  for (unsigned i = 0; i < e->threads; i++) {
    Fiber& f = e->fibers[i];
    if (f.state != State::waiting || f.barrier != id) continue;
    f.state = State::ready;
    CHECK(joined.push_back(i);)
  }
  CHECK(check::join(joined);)
  return b.result;
}

int barrier(bool vote, Loc where) {
  return arrive(0, 0, vote, where);
}

void named_barrier(int id, int threads, Loc where) {
  if (id < 1 || id >= kBarriers) fail(where, "barrier %d: named ones are 1 to %d", id, kBarriers - 1);
  if (threads < 32 || threads % 32 || threads > int(engine->threads))
    fail(where, "barrier %d is for %d threads: not a multiple of 32, or more than the block has", id, threads);
  arrive(id, threads, false, where);
}

// ---- collectives of a warp ----

void warp_barrier(unsigned mask, Loc where) {
  collective(
      mask,
      [](Collective& c) {
        CHECK(std::vector<unsigned> joined; const unsigned first = current->warp * 32;
              for (unsigned i = 0; i < 32; i++) if (in(c.mask, i)) joined.push_back(first + i); check::join(joined);)
        (void)c;
      },
      {}, where);
}

void shuffle(unsigned mask, const void* in, void* out, int bytes, int source, Loc where) {
  if (source >= 0 && !host_cuda::in(mask, unsigned(source)))
    fail(where, "shuffle from lane %d, which is not in the mask 0x%08x", source, mask);
  collective(
      mask,
      [](Collective& c) {
        for (int i = 0; i < 32; i++) {
          const Collective::Lane& to = c.lanes[i];
          if (host_cuda::in(c.mask, unsigned(i)))
            memcpy(to.out, c.lanes[to.source < 0 ? i : to.source].in, size_t(to.bytes));
        }
      },
      {in, out, bytes, source}, where);
}

unsigned ballot(unsigned mask, bool vote, Loc where) {
  unsigned votes;
  collective(
      mask,
      [](Collective& c) {
        unsigned votes = 0;
        for (unsigned i = 0; i < 32; i++)
          if (in(c.mask, i) && c.lanes[i].source) votes |= 1u << i;
        for (unsigned i = 0; i < 32; i++)
          if (in(c.mask, i)) *static_cast<unsigned*>(c.lanes[i].out) = votes;
      },
      {nullptr, &votes, 0, vote}, where);
  return votes;
}

void exchange(const void* row, const void* (&rows)[32], Loc where) {
  collective(
      ~0u,
      [](Collective& c) {
        for (const auto& to : c.lanes)
          for (int i = 0; i < 32; i++) static_cast<const void**>(to.out)[i] = c.lanes[i].in;
      },
      {row, rows, 0, 0}, where);
}

// Sums of products and the accumulator as the matrix unit of an A100 forms them, by what has been measured (PeerJ CS
// 7:e330 and arXiv 2512.07004): the terms are exact, cut off towards zero one bit below the last one that a float as
// large as the largest of them has, added without error, and the sum cut off to a float. Later GPUs keep more bits.
// Loops over the columns are innermost, for the compiler to vectorise.
void add_and_cut(const double (*terms)[8], int count, double (&sums)[8]) {
  constexpr uint64_t kBelowFloat = (uint64_t(1) << 29) - 1;
  double largest[8] = {}, plain[8] = {}, sum[8] = {}, unit[8], inverse[8];
  uint64_t bits[8];
  for (int i = 0; i < count; i++)
    for (int n = 0; n < 8; n++) {
      const double size = std::fabs(terms[i][n]);
      largest[n] = largest[n] < size ? size : largest[n];
      plain[n] += terms[i][n];
    }
  memcpy(bits, largest, sizeof bits);
  for (auto& b : bits) b = ((b >> 52) - 24) << 52;
  memcpy(unit, bits, sizeof bits);
  for (auto& b : bits) b = (uint64_t(2046) << 52) - b;
  memcpy(inverse, bits, sizeof bits);
  for (int i = 0; i < count; i++)
    for (int n = 0; n < 8; n++) sum[n] += std::trunc(terms[i][n] * inverse[n]);
  for (int n = 0; n < 8; n++) sum[n] *= unit[n];
  memcpy(bits, sum, sizeof bits);
  for (auto& b : bits) b &= ~kBelowFloat;
  memcpy(sum, bits, sizeof bits);
  for (int n = 0; n < 8; n++)  // else zero, infinite or not a number: products of finite floats are within these
    sums[n] = largest[n] > 1e-100 && plain[n] - plain[n] == 0 ? sum[n] : plain[n];
}

void mma_m16n8k16(Low low, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Loc where) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, d};
  collective(~0u, low == Low::bf16 ? multiply<Low::bf16> : multiply<Low::half>, {&mine, nullptr, 0, 0}, where);
}

// ---- memory ----

void* shared(const void* key, size_t bytes, Loc where) {
  for (const Variable& v : engine->variables)
    if (v.key == key) return v.p;
  char* p = carve(bytes, where);
  engine->variables.push_back({key, p});
  return p;
}

void* dynamic_shared(Loc where) {
  if (!engine->dynamic_bytes) fail(where, "the launch gives no dynamic shared memory");
  return shared(nullptr, engine->dynamic_bytes, where);
}

char* shared_space() {
  return engine->arena;
}

bool is_shared(const void* p, size_t bytes) {
  const auto* c = static_cast<const char*>(p);
  return c >= engine->arena && c + bytes <= engine->arena + kArena;
}

bool allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kSharedLimit) return false;
  {
    std::lock_guard<std::mutex> hold(lock);
    allowed_shared[kernel] = bytes;
  }
  if (options().pause) std::this_thread::sleep_for(std::chrono::milliseconds(options().pause));
  return true;
}

std::vector<std::pair<const void*, size_t>> large_launches() {
  std::lock_guard<std::mutex> hold(lock);
  return std::exchange(asked_shared, {});
}

void cp_async(void* to, const void* from, unsigned bytes, unsigned from_bytes, Loc where) {
  if (from_bytes > bytes) fail(where, "cp.async of %u bytes to %u", from_bytes, bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes || (from_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    fail(where, "cp.async from %p to %p: not aligned to %u bytes", from, to, bytes);
  if (!is_shared(to, bytes)) fail(where, "cp.async to %p, which is not in shared memory", to);
  Fiber* f = engine->running;
  f->copies.push_back({to, from, bytes, from_bytes, f->groups, __builtin_return_address(0)});
  if (!options().async_lazy) land(f, SIZE_MAX);
}

void cp_async_commit() {
  engine->running->groups++;
}

void cp_async_wait(size_t pending) {
  Fiber* f = engine->running;
  if (f->groups > pending) land(f, f->groups - pending);
}

void fence() {
  CHECK(check::fence();)
}

// ---- launches ----

void (*launch_instead)(const char*, dim3, dim3, size_t, const void*, const void* const*, const size_t*, size_t);

void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, const void* kernel,
            void (*body)(const void*), const void* arguments) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  auto refuse = [&](const std::string& why) { throw std::runtime_error(std::string(name) + ": " + why); };
  if (!threads || threads > 1024 || block.z > 64) refuse("a block of " + std::to_string(threads) + " threads");
  if (!blocks || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) refuse("invalid grid");
  if (dynamic_shared > kSharedUnasked) {
    std::lock_guard<std::mutex> hold(lock);
    if (dynamic_shared > kSharedLimit || allowed_shared[kernel] < dynamic_shared)
      refuse(std::to_string(dynamic_shared) + " bytes of dynamic shared memory, over the limit or not asked for");
    asked_shared.push_back({kernel, dynamic_shared});
  }
  const Options o = options();
  std::vector<uint64_t> order;
  if (o.order == Order::random) {
    for (uint64_t i = 0; i < blocks; i++) order.push_back(i);
    Random(o.seed).shuffle(order);
  }
  std::atomic<uint64_t> next{0};
  std::string error;  // the first
  CHECK(check::begin_launch();)

  auto work = [&] {
    std::unique_ptr<Engine> e;
    {
      std::lock_guard<std::mutex> hold(lock);
      if (!idle_engines.empty()) {
        e = std::move(idle_engines.back());
        idle_engines.pop_back();
      }
    }
    if (!e) e = std::make_unique<Engine>();
    e->body = body;
    e->arguments = arguments;
    e->dynamic_bytes = dynamic_shared;
    e->random = Random(o.seed);
    engine = e.get();
    for (uint64_t i; e->error.empty() && (i = next++) < blocks;) {
      const uint64_t b = o.order == Order::forward ? i : o.order == Order::reverse ? blocks - 1 - i : order[i];
      run_block(e.get(), grid, block,
                {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)});
    }
    engine = nullptr;
    std::lock_guard<std::mutex> hold(lock);
    if (e->error.empty()) {
      idle_engines.push_back(std::move(e));
    } else {  // an engine that failed has threads in the middle of the kernel: it goes
      if (error.empty()) error = e->error;
      next = blocks;
    }
  };
  // A second thread pays from some tens of microseconds on. The checks see one thread at a time.
  unsigned workers =
      threads * blocks >= 8192 ? unsigned(std::min<uint64_t>(blocks, std::thread::hardware_concurrency())) : 1;
  CHECK(workers = 1;)
  std::vector<std::thread> others;
  for (unsigned i = 1; i < workers; i++) others.emplace_back(work);
  work();
  for (auto& t : others) t.join();
  CHECK(error += check::end_launch();)
  if (!error.empty()) refuse(error);
}

}  // namespace host_cuda
