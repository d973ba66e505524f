// host_cuda runtime: fibers, barriers, warp collectives, shared memory, cp.async.
// Build with the same -fsanitize=address as the kernels, but never with -fsanitize=thread:
// in a TSan build (-DHOST_CUDA_TSAN) this file describes the CUDA happens-before edges to TSan
// itself, one TSan fiber per CUDA thread.
#include "host_cuda/emulation.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>
#if !defined(__x86_64__) || defined(HOST_CUDA_UCONTEXT)
#include <ucontext.h>
#define HOST_CUDA_USE_UCONTEXT 1
#endif

#if defined(__SANITIZE_ADDRESS__)
#define HOST_CUDA_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HOST_CUDA_ASAN 1
#endif
#endif
#ifdef HOST_CUDA_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif
#ifdef HOST_CUDA_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_set_fiber_name(void*, const char*);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
struct Quiet {                     // the runtime's own allocations are not the kernel's accesses
  Quiet() { __tsan_ignore_thread_begin(); }
  ~Quiet() { __tsan_ignore_thread_end(); }
};
#define HB_RELEASE(p) __tsan_release(p)
#define HB_ACQUIRE(p) __tsan_acquire(p)
#else
struct Quiet {
  Quiet() {}
};
#define HB_RELEASE(p) ((void)(p))
#define HB_ACQUIRE(p) ((void)(p))
#endif
#ifdef HOST_CUDA_CHECK
#include "host_cuda/checks.h"
#define CHECK(...) __VA_ARGS__
#else
#define CHECK(...)
#endif

namespace host_cuda {
thread_local ThreadCtx* cur = nullptr;

namespace {
constexpr size_t kStack = 64 * 1024, kPage = 4096, kArena = 1 << 20;
constexpr int kBarriers = 16;
// Happens-before objects live at the head of the block's arena, so they are new in every block.
constexpr size_t kHbBytes = 8 * (2 * kBarriers + 32 * 64);

enum State : unsigned char { READY, BLOCKED, DONE };
struct Copy {
  void* dst;
  const void* src;
  unsigned bytes, src_bytes;
  void* pc;
};

struct Op {                        // one warp collective in flight
  bool open = false;               // still collecting arrivals
  unsigned mask = 0, arrived = 0, unread = 0;
  Kind kind{};
  Loc loc{};
  uint32_t slots[32 * kSlotWords];
};
struct Engine;
struct Fiber {
  ThreadCtx ctx;
  void* sp = nullptr;
#ifdef HOST_CUDA_USE_UCONTEXT
  ucontext_t uc;
#endif
  char* stack = nullptr;
  State state = DONE;
  Loc wait{};                      // where it is blocked
  const char* what = "";
  void* tsan = nullptr;
  void* fake = nullptr;            // ASan fake stack
  int bar = -1;                    // the barrier it waits at
  std::vector<std::vector<Copy>> groups;   // committed cp.async groups
  std::vector<Copy> open;                  // not yet committed
};
struct Barrier {
  int arrived = 0, need = -1, votes = 0, result[2] = {0, 0};
  unsigned phase = 0;
  Loc loc{};
};
// Allocated before any fiber runs: TSan would take a fiber's own malloc for a write of that CUDA thread.
struct Warp {
  std::unique_ptr<Op[]> ops{new Op[64]};
  unsigned flip[32] = {};
};
struct Var {
  char* p;
  size_t bytes;
};

struct Engine {
  std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<unsigned> order;
  std::vector<Warp> warps;
  Barrier bars[kBarriers];
  Fiber* running = nullptr;
  void* main_sp = nullptr;
#ifdef HOST_CUDA_USE_UCONTEXT
  ucontext_t main_uc;
#endif
  void* main_fake = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  void* main_tsan = nullptr;
  unsigned n = 0, live = 0;
  void (*fn)(void*) = nullptr;
  void* arg = nullptr;
  char* arena = nullptr;
  size_t used = 0, dyn_bytes = 0, smem_bytes = 0;
  char* dyn = nullptr;
  std::unordered_map<const void*, Var> vars;
  std::string error;
  uint64_t rng = 1;
  Stats st{};
  ~Engine() {
    for (auto& f : pool) munmap(f->stack - kPage, kStack + kPage);
    if (arena) {
      ASAN_UNPOISON_MEMORY_REGION(arena, kArena);
      munmap(arena, kArena);
    }
  }
  uint64_t rand() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
  }
};
thread_local Engine* tl_eng = nullptr;
std::mutex g_mu;
std::vector<std::unique_ptr<Engine>> g_idle;
Stats g_stats{};
char g_launch_hb, g_fence_hb;

#ifndef HOST_CUDA_USE_UCONTEXT
extern "C" void host_cuda_switch(void** save, void* load);
asm(R"(
.text
.globl host_cuda_switch
.hidden host_cuda_switch
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
#endif

void to_main(Engine* e, Fiber* f, [[maybe_unused]] bool dying) {
#ifdef HOST_CUDA_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &f->fake, e->main_stack, e->main_stack_size);
#endif
#ifdef HOST_CUDA_TSAN
  __tsan_switch_to_fiber(e->main_tsan, 1);   // 1: no happens-before
#endif
#ifdef HOST_CUDA_USE_UCONTEXT
  swapcontext(&f->uc, &e->main_uc);
#else
  host_cuda_switch(&f->sp, e->main_sp);
#endif
#ifdef HOST_CUDA_ASAN
  __sanitizer_finish_switch_fiber(f->fake, &e->main_stack, &e->main_stack_size);
#endif
}
void resume(Engine* e, Fiber* f) {
  e->running = f;
  cur = &f->ctx;
  e->st.switches++;
#ifdef HOST_CUDA_ASAN
  __sanitizer_start_switch_fiber(&e->main_fake, f->stack, kStack);
#endif
#ifdef HOST_CUDA_TSAN
  __tsan_switch_to_fiber(f->tsan, 1);
#endif
#ifdef HOST_CUDA_USE_UCONTEXT
  swapcontext(&e->main_uc, &f->uc);
#else
  host_cuda_switch(&e->main_sp, f->sp);
#endif
#ifdef HOST_CUDA_ASAN
  __sanitizer_finish_switch_fiber(e->main_fake, nullptr, nullptr);
#endif
  cur = nullptr;
  e->running = nullptr;
}
std::string describe(const Fiber* f) {
  char b[256];
  snprintf(b, sizeof b, "  block (%u,%u,%u) thread (%u,%u,%u) lane %u: %s", f->ctx.bid.x, f->ctx.bid.y, f->ctx.bid.z,
           f->ctx.tid.x, f->ctx.tid.y, f->ctx.tid.z, f->ctx.lane,
           f->state == DONE    ? "exited"
           : f->state == READY ? "running"
                               : f->what);
  std::string s = b;
  if (f->state == BLOCKED) {
    snprintf(b, sizeof b, " at %s:%d", f->wait.file, f->wait.line);
    s += b;
  }
  return s + "\n";
}
void finish_copies(Fiber* f) {
  {
    Quiet quiet;
    f->groups.push_back(std::move(f->open));
    f->open.clear();
  }
  cp_async_wait(0);
}
extern "C" void host_cuda_fiber_main() {
  Engine* e = tl_eng;
  Fiber* f = e->running;
#ifdef HOST_CUDA_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &e->main_stack, &e->main_stack_size);
#endif
  e->fn(e->arg);
  if (!f->groups.empty() || !f->open.empty()) finish_copies(f);
  f->state = DONE;
  e->live--;
  // an exit can complete a barrier the others wait at
  for (int i = 0; i < kBarriers; i++) {
    Barrier& b = e->bars[i];
    if (b.arrived && b.need < 0 && options().strict_exit) {
      e->error =
          "divergent barrier: a thread exits while others of its block wait at a __syncthreads()\n" + describe(f);
      for (unsigned k = 0; k < e->n; k++)
        if (e->pool[k]->state == BLOCKED) {
          e->error += describe(e->pool[k].get());
          break;
        }
    } else if (b.arrived && b.need < 0 && b.arrived == int(e->live)) {
      b.result[b.phase & 1] = b.votes;
      b.arrived = b.votes = 0;
      b.phase++;
      for (unsigned k = 0; k < e->n; k++)
        if (e->pool[k]->state == BLOCKED && e->pool[k]->bar == i) e->pool[k]->state = READY;
    }
  }
  HB_RELEASE(&g_launch_hb);
  to_main(e, f, true);
  abort();
}
void prepare(Engine* e, Fiber* f) {
  Quiet quiet;
  f->state = READY;
  f->groups.clear();
  f->open.clear();
  f->bar = -1;
#ifdef HOST_CUDA_TSAN
  // A new mapping for the stack too: it served another CUDA thread in the block before.
  mmap(f->stack, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  f->tsan = __tsan_create_fiber(0);
  char nm[64];
  snprintf(nm, sizeof nm, "block(%u,%u,%u) thread(%u,%u,%u)", f->ctx.bid.x, f->ctx.bid.y, f->ctx.bid.z, f->ctx.tid.x,
           f->ctx.tid.y, f->ctx.tid.z);
  __tsan_set_fiber_name(f->tsan, nm);
#endif
#ifdef HOST_CUDA_USE_UCONTEXT
  getcontext(&f->uc);
  f->uc.uc_stack.ss_sp = f->stack;
  f->uc.uc_stack.ss_size = kStack;
  f->uc.uc_link = nullptr;
  makecontext(&f->uc, host_cuda_fiber_main, 0);
#else
  ASAN_UNPOISON_MEMORY_REGION(f->stack, kStack);
  void** s = reinterpret_cast<void**>(f->stack + kStack);
  *--s = nullptr;                                   // fake return address, keeps 16-byte alignment
  *--s = reinterpret_cast<void*>(host_cuda_fiber_main);
  for (int i = 0; i < 6; i++) *--s = nullptr;
  f->sp = s;
#endif
}
[[maybe_unused]] void* hb_barrier(Engine* e, int id, unsigned phase) {
  return e->arena + 8 * (2 * id + (phase & 1));
}
[[maybe_unused]] void* hb_op(Engine* e, unsigned warp, unsigned op) {
  return e->arena + 8 * (2 * kBarriers + warp * 64 + op);
}
void block_on(const char* what, Loc loc) {
  Fiber* f = tl_eng->running;
  f->state = BLOCKED;
  f->what = what;
  f->wait = loc;
  to_main(tl_eng, f, false);
}
void fresh_arena(Engine* e) {
#ifdef HOST_CUDA_TSAN
  if (e->arena) munmap(e->arena, kArena);   // a new mapping per block: TSan forgets the last block's accesses
  e->arena = nullptr;
#endif
  if (!e->arena) {
    void* m = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) abort();
    e->arena = static_cast<char*>(m);
  }
  ASAN_POISON_MEMORY_REGION(e->arena, kArena);
  e->used = kHbBytes;
  e->smem_bytes = 0;
  e->vars.clear();
  e->dyn = nullptr;
}
char* carve(Engine* e, size_t bytes, size_t align, Loc loc) {
  e->smem_bytes += bytes;
  if (e->smem_bytes > options().max_smem)
    fail(loc, "block uses %zu bytes of shared memory; the limit is %zu", e->smem_bytes, options().max_smem);
  if (align < 128) align = 128;                     // red zone and no false sharing of shadow
  size_t at = (e->used + align - 1) / align * align;
  if (at + bytes + 128 > kArena) fail(loc, "shared memory arena exhausted");
  e->used = at + bytes + 64;
  char* p = e->arena + at;
  ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#ifndef HOST_CUDA_TSAN
  memset(p, 0xff, bytes);                           // NaN / -1: uninitialised reads show
#else
  for (size_t i = 0; i < bytes; i++) reinterpret_cast<volatile char*>(p)[i] = char(0xff);
#endif
  return p;
}
void run_block(Engine* e, dim3 g, dim3 b, size_t dyn, uint3 bid) {
  Quiet quiet;
  const Options& o = options();
  e->n = e->live = b.x * b.y * b.z;
  e->dyn_bytes = dyn;
  while (e->pool.size() < e->n) {
    auto f = std::make_unique<Fiber>();
    void* m = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) {
      e->error = "host_cuda: no memory for fiber stacks";
      return;
    }
    mprotect(m, kPage, PROT_NONE);
    f->stack = static_cast<char*>(m) + kPage;
    e->pool.push_back(std::move(f));
  }
  if (e->warps.size() < (e->n + 31) / 32) e->warps.resize((e->n + 31) / 32);
  for (unsigned w = 0; w < (e->n + 31) / 32; w++)
    for (int i = 0; i < 64; i++) e->warps[w].ops[i].open = false;
  for (auto& bar : e->bars) bar = Barrier{};
  fresh_arena(e);
  CHECK(check::block_begin(bid, g, e->n, e->arena, kArena);)
  e->order.resize(e->n);
  for (unsigned i = 0; i < e->n; i++) {
    Fiber* f = e->pool[i].get();
    f->ctx = ThreadCtx{{i % b.x, i / b.x % b.y, i / (b.x * b.y)}, bid, b, g, i, i % 32, i / 32};
    prepare(e, f);
    e->order[i] = o.sched == 1 ? e->n - 1 - i : i;
  }
  while (e->live) {
    bool progressed = false;
    if (o.sched == 2)
      for (unsigned i = e->n; i > 1; i--) std::swap(e->order[i - 1], e->order[e->rand() % i]);
    for (unsigned k = 0; k < e->n; k++) {
      Fiber* f = e->pool[e->order[k]].get();
      if (f->state != READY) continue;
      progressed = true;
      resume(e, f);
      if (!e->error.empty()) goto out;
    }
    if (!progressed) {
      e->error = "deadlock: every thread of the block that has not exited is blocked\n";
      const char* what = nullptr;
      int line = -1, shown = 0;
      bool done_shown = false;
      for (unsigned i = 0; i < e->n && shown < 8; i++) {
        Fiber* f = e->pool[i].get();
        bool nw = f->state == DONE ? !done_shown : (f->what != what || f->wait.line != line);
        if (!nw) continue;
        if (f->state == DONE)
          done_shown = true;
        else {
          what = f->what;
          line = f->wait.line;
        }
        e->error += describe(f);
        shown++;
      }
      break;
    }
  }
out:
  CHECK(check::block_end();)
  e->st.blocks++;
  if (e->smem_bytes > e->st.max_smem) e->st.max_smem = e->smem_bytes;
#ifdef HOST_CUDA_TSAN
  for (unsigned i = 0; i < e->n; i++) __tsan_destroy_fiber(e->pool[i]->tsan);
#endif
}
}  // namespace

Options& options() {
  static Options o = [] {
    Options r;
    if (const char* s = getenv("HOST_CUDA_THREADS")) r.workers = atoi(s);
    if (const char* s = getenv("HOST_CUDA_SCHED")) r.sched = !strcmp(s, "reverse") ? 1 : !strcmp(s, "random") ? 2 : 0;
    if (const char* s = getenv("HOST_CUDA_SEED")) r.seed = strtoull(s, nullptr, 10);
    if (const char* s = getenv("HOST_CUDA_ASYNC")) r.async_lazy = strcmp(s, "eager") != 0;
    if (const char* s = getenv("HOST_CUDA_MAX_SMEM")) r.max_smem = strtoull(s, nullptr, 10);
    return r;
  }();
  return o;
}
Stats stats(bool reset) {
  std::lock_guard<std::mutex> l(g_mu);
  Stats s = g_stats;
  if (reset) g_stats = Stats{};
  return s;
}
void fail(Loc loc, const char* fmt, ...) {
  char b[512], head[256];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  snprintf(head, sizeof head, "%s:%d: ", loc.file, loc.line);
  Engine* e = tl_eng;
  e->error = std::string(head) + b + "\n" + describe(e->running);
  to_main(e, e->running, true);      // never resumed; its stack is dropped
  abort();
}
static int barrier_impl(int id, int nthreads, int vote, Loc loc) {
  Engine* e = tl_eng;
  Fiber* f = e->running;
  Barrier& b = e->bars[id];
  if (b.arrived && (b.loc.line != loc.line || b.loc.file != loc.file) && id == 0)
    fail(loc, "divergent barrier: other threads of this block wait at %s:%d", b.loc.file, b.loc.line);
  if (b.arrived && b.need != nthreads) fail(loc, "barrier %d: thread counts differ (%d, %d)", id, b.need, nthreads);
  if (nthreads > 0 && nthreads % 32) fail(loc, "barrier %d: %d is not a multiple of 32", id, nthreads);
  if (nthreads < 0 && e->live < e->n && options().strict_exit)
    fail(loc, "divergent barrier: %u threads of this block have already exited", e->n - e->live);
  unsigned phase = b.phase;
  HB_RELEASE(hb_barrier(e, id, phase));
  b.loc = loc;
  b.need = nthreads;
  b.votes += vote;
  int need = nthreads < 0 ? int(e->live) : nthreads;
  if (++b.arrived == need) {
    b.result[phase & 1] = b.votes;
    b.votes = 0;
    b.arrived = 0;
    b.phase++;
    CHECK({
      std::vector<unsigned> who;
      for (unsigned k = 0; k < e->n; k++) {
        Fiber* o = e->pool[k].get();
        if (o == f || (o->state == BLOCKED && o->bar == id)) who.push_back(k);
      }
      check::join(who.data(), unsigned(who.size()));
    })
    for (unsigned k = 0; k < e->n; k++) {
      Fiber* o = e->pool[k].get();
      if (o->state == BLOCKED && o->bar == id) o->state = READY;
    }
    e->st.barriers++;
  } else {
    f->bar = id;
    while (b.phase == phase) block_on("blocked at a barrier", loc);
    f->bar = -1;
  }
  HB_ACQUIRE(hb_barrier(e, id, phase));
  return b.result[phase & 1];
}
void barrier(int id, int n, Loc loc) {
  barrier_impl(id, n, 0, loc);
}
int barrier_reduce(int pred, int op, Loc loc) {
  int n = int(tl_eng->live), c = barrier_impl(0, -1, pred != 0, loc);
  return op == 0 ? c : op == 1 ? c == n : c != 0;
}
CollView coll_begin(unsigned mask, Kind kind, const void* in, unsigned bytes, Loc loc) {
  Engine* e = tl_eng;
  Fiber* f = e->running;
  unsigned lane = f->ctx.lane;
  if (!in_warp(mask, lane))
    fail(loc, "lane %u calls a warp collective with mask 0x%08x, which leaves it out", lane, mask);
  unsigned lo = unsigned(__builtin_ctz(mask));
  Warp& w = e->warps[f->ctx.warp];
  unsigned oi = 2 * lo + (w.flip[lo] & 1);
  Op* op = &w.ops[oi];
  if (!op->open) {
    op->open = true;
    op->mask = mask;
    op->arrived = 0;
    op->kind = kind;
    op->loc = loc;
  } else if (op->mask != mask || op->kind != kind || op->loc.line != loc.line || op->loc.file != loc.file) {
    fail(
        loc,
        "warp divergence: lanes of this warp wait at %s:%d (mask 0x%08x) for this lane, which is here with mask 0x%08x",
        op->loc.file, op->loc.line, op->mask, mask);
  }
  const char* s = static_cast<const char*>(in);
  volatile char* d = reinterpret_cast<volatile char*>(op->slots + lane * kSlotWords);
  for (unsigned i = 0; i < bytes; i++) d[i] = s[i];
  if (kind == SYNCWARP) HB_RELEASE(hb_op(e, f->ctx.warp, oi));
  op->arrived |= 1u << lane;
  if (op->arrived == mask) {
    op->open = false;
    op->unread = mask;
    w.flip[lo]++;
    unsigned base = f->ctx.warp * 32;
    CHECK(if (kind == SYNCWARP) {
      unsigned who[32], m = 0;
      for (unsigned i = 0; i < 32; i++)
        if (in_warp(mask, i)) who[m++] = base + i;
      check::join(who, m);
    })
    for (unsigned i = 0; i < 32 && base + i < e->n; i++)
      if (in_warp(mask, i) && i != lane) e->pool[base + i]->state = READY;
    e->st.collectives++;
  } else {
    block_on("waiting in a warp collective", loc);
  }
  if (kind == SYNCWARP) HB_ACQUIRE(hb_op(e, f->ctx.warp, oi));
  return {op->slots, op};
}
void coll_end(CollView c) {
  Op* op = static_cast<Op*>(c.op);
  op->unread &= ~(1u << tl_eng->running->ctx.lane);
}
void* shared_alloc(const void* key, size_t bytes, size_t align, Loc loc) {
  Quiet quiet;
  Engine* e = tl_eng;
  auto it = e->vars.find(key);
  if (it != e->vars.end()) return it->second.p;
  char* p = carve(e, bytes, align, loc);
  CHECK(check::shared_var(p, bytes);)
  e->vars.emplace(key, Var{p, bytes});
  return p;
}
void* dyn_shared(Loc loc) {
  Quiet quiet;
  Engine* e = tl_eng;
  if (!e->dyn_bytes) fail(loc, "kernel uses dynamic shared memory but was launched with none");
  if (!e->dyn) {
    e->dyn = carve(e, e->dyn_bytes, 1024, loc);
    CHECK(check::shared_var(e->dyn, e->dyn_bytes);)
  }
  return e->dyn;
}
char* shared_base() {
  return tl_eng->arena;
}
bool is_internal(const void* p) {      // fiber stacks, contexts, collective slots: not kernel memory
  Engine* e = tl_eng;
  auto* c = static_cast<const char*>(p);
  const Fiber* f = e->running;
  if (c >= f->stack && c < f->stack + kStack) return true;
  if (c >= reinterpret_cast<const char*>(f) && c < reinterpret_cast<const char*>(f + 1)) return true;
  const char* ops = reinterpret_cast<const char*>(e->warps[f->ctx.warp].ops.get());
  return c >= ops && c < ops + 64 * sizeof(Op);
}
bool is_shared(const void* p, size_t bytes) {
  Engine* e = tl_eng;
  auto* c = static_cast<const char*>(p);
  return e && c >= e->arena && c + bytes <= e->arena + kArena;
}
static void do_copy(const Copy& c) {
  CHECK(if (c.src_bytes) check::access(c.src, c.src_bytes, 0, c.pc); check::access(c.dst, c.bytes, check::WRITE, c.pc);)
  if (c.src_bytes) memcpy(c.dst, c.src, c.src_bytes);
  if (c.src_bytes < c.bytes) memset(static_cast<char*>(c.dst) + c.src_bytes, 0, c.bytes - c.src_bytes);
}
void cp_async(void* dst, const void* src, unsigned bytes, unsigned src_bytes, Loc loc) {
  if (reinterpret_cast<uintptr_t>(dst) % bytes || (src_bytes && reinterpret_cast<uintptr_t>(src) % bytes))
    fail(loc, "cp.async of %u bytes is misaligned (dst %p, src %p)", bytes, dst, src);
  if (!is_shared(dst, bytes)) fail(loc, "cp.async destination %p is not in shared memory", dst);
  Copy c{dst, src, bytes, src_bytes, __builtin_return_address(0)};
  if (!options().async_lazy) return do_copy(c);
  Quiet quiet;
  tl_eng->running->open.push_back(c);
}
void cp_async_commit() {
  Quiet quiet;
  Fiber* f = tl_eng->running;
  f->groups.push_back(std::move(f->open));
  f->open.clear();
}
void cp_async_wait(int keep) {
  Fiber* f = tl_eng->running;
  size_t n = f->groups.size();
  if (n <= size_t(keep)) return;
  for (size_t i = 0; i + size_t(keep) < n; i++)
    for (auto& c : f->groups[i]) do_copy(c);
  Quiet quiet;
  f->groups.erase(f->groups.begin(), f->groups.end() - keep);
}
void fence() {
  CHECK(check::fence();) HB_ACQUIRE(&g_fence_hb);
  HB_RELEASE(&g_fence_hb);
}
void yield() {
  to_main(tl_eng, tl_eng->running, false);
}

void launch_raw(const char* name, dim3 g, dim3 b, size_t smem, void (*fn)(void*), void* arg) {
  const Options& o = options();
  uint64_t nt = uint64_t(b.x) * b.y * b.z, nb = uint64_t(g.x) * g.y * g.z;
  auto bad = [&](const std::string& why) { throw std::runtime_error(std::string("host_cuda: ") + name + ": " + why); };
  if (tl_eng) bad("launch from inside a kernel");
  if (!nt || nt > 1024 || b.z > 64) bad("invalid block size " + std::to_string(nt));
  if (!nb || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) bad("invalid grid");
  if (smem > o.max_smem)
    bad("dynamic shared memory " + std::to_string(smem) + " over the limit " + std::to_string(o.max_smem));
  std::atomic<uint64_t> next{0};
  std::mutex mu;
  std::string error;
  std::atomic<bool> stop{false};
  std::vector<uint64_t> perm;
  if (o.sched == 2) {
    perm.resize(nb);
    uint64_t r = o.seed * 0x9E3779B97F4A7C15ull | 1;
    for (uint64_t i = 0; i < nb; i++) perm[i] = i;
    for (uint64_t i = nb; i > 1; i--) {
      r ^= r << 13;
      r ^= r >> 7;
      r ^= r << 17;
      std::swap(perm[i - 1], perm[r % i]);
    }
  }
  HB_RELEASE(&g_launch_hb);
  CHECK(check::launch_begin(name, fn);)
  auto work = [&] {
    std::unique_ptr<Engine> e;
    {
      std::lock_guard<std::mutex> l(g_mu);
      if (!g_idle.empty()) {
        e = std::move(g_idle.back());
        g_idle.pop_back();
      }
    }
    if (!e) e = std::make_unique<Engine>();
    e->fn = fn;
    e->arg = arg;
    e->error.clear();
    e->st = Stats{};
    e->rng = o.seed * 0x2545F4914F6CDD1Dull | 1;
    tl_eng = e.get();
#ifdef HOST_CUDA_TSAN
    e->main_tsan = __tsan_get_current_fiber();
#endif
    for (uint64_t i; !stop && (i = next++) < nb;) {
      uint64_t k = o.sched == 1 ? nb - 1 - i : o.sched == 2 ? perm[i] : i;
      run_block(e.get(), g, b, smem, {unsigned(k % g.x), unsigned(k / g.x % g.y), unsigned(k / (uint64_t(g.x) * g.y))});
      if (!e->error.empty()) {
        std::lock_guard<std::mutex> l(mu);
        if (error.empty()) error = e->error;
        stop = true;
      }
    }
    tl_eng = nullptr;
    std::lock_guard<std::mutex> l(g_mu);
    g_stats.blocks += e->st.blocks;
    g_stats.switches += e->st.switches;
    g_stats.barriers += e->st.barriers;
    g_stats.collectives += e->st.collectives;
    if (e->st.max_smem > g_stats.max_smem) g_stats.max_smem = e->st.max_smem;
    if (e->error.empty()) g_idle.push_back(std::move(e));   // a failed engine has live frames: drop it
  };
  unsigned nw = o.workers > 0 ? unsigned(o.workers) : std::thread::hardware_concurrency();
#if defined(HOST_CUDA_TSAN) || defined(HOST_CUDA_CHECK)
  nw = 1;
#endif
  if (nw > nb) nw = unsigned(nb);
  std::vector<std::thread> ts;
  for (unsigned i = 1; i < nw; i++) ts.emplace_back(work);
  work();
  for (auto& t : ts) t.join();
  {
    std::lock_guard<std::mutex> l(g_mu);
    g_stats.launches++;
  }
  HB_ACQUIRE(&g_launch_hb);
  CHECK(error += check::launch_end();)
  if (!error.empty()) bad(error);
}
}  // namespace host_cuda
