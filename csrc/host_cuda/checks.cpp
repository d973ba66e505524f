// Bounds, races, uninitialised reads, coalescing and bank conflicts of every kernel load and store.
// Races: FastTrack-style vector clocks inside a block (joined by barriers and __syncwarp), and
// fence-ordered release/acquire between blocks.  Compile this file without -fsanitize.
#include "host_cuda/checks.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

namespace host_cuda {
namespace check {
namespace {
struct Acc {
  uint32_t clk = 0, blk = 0;
  uint16_t tid = 0;
  uint8_t kind = 0;
  void* pc = nullptr;
};  // kind 0: none
struct Rec {
  Acc w, r[2];
};
enum : uint8_t { NONE, PLAIN, ATOM };
struct Buf {
  char* p;
  size_t bytes;
  unsigned elem;
  bool init;
  std::string name;
  std::vector<Rec> rec;
  std::vector<bool> written;
};
struct Site {                         // one load or store instruction
  uint64_t req = 0, sectors = 0, ideal = 0, lanes = 0;
  unsigned bytes = 0;
  bool write = false, shared = false, atomic = false;
};
struct Pend {
  unsigned bytes;
  int flags;
  bool shared;
  std::vector<uintptr_t> lane[32];
};

std::map<uintptr_t, std::unique_ptr<Buf>> g_bufs;
std::vector<std::pair<uintptr_t, uintptr_t>> g_modules;      // readable data of loaded objects
uintptr_t g_host_lo, g_host_hi;
std::string g_name, g_report;
std::vector<std::string> g_errors;
std::set<std::pair<void*, void*>> g_seen;
std::map<std::pair<void*, int>, Site> g_sites;

unsigned T, g_blk;
char* g_arena;
size_t g_arena_bytes;
std::vector<std::pair<char*, size_t>> g_vars;
std::vector<Rec> g_shadow;             // shared memory, one per byte, indexed from the arena base
std::vector<uint32_t> g_vc;            // T x T vector clocks
std::vector<char> g_fenced;            // this thread is ordered after a fence of its own block
std::vector<std::vector<uint32_t>> g_released;   // per finished block: clocks a fence published
std::vector<std::map<std::pair<void*, int>, Pend>> g_pend;   // per warp, by instruction and kind

std::string where(void* pc) {
  Dl_info di;
  char b[512];
  if (!dladdr(pc, &di) || !di.dli_fname) {
    snprintf(b, sizeof b, "%p", pc);
    return b;
  }
  char cmd[1024];
  snprintf(cmd, sizeof cmd, "addr2line -i -e '%s' 0x%zx 2>/dev/null", di.dli_fname,
           size_t(static_cast<char*>(pc) - 1 - static_cast<char*>(di.dli_fbase)));
  std::string r;                          // the innermost frame that is the kernel's own
  if (FILE* f = popen(cmd, "r")) {
    while (fgets(b, sizeof b, f)) {
      std::string l = b;
      while (!l.empty() && l.back() == '\n') l.pop_back();
      size_t d = l.find(" (");
      if (d != std::string::npos) l.resize(d);
      d = l.rfind('/');
      if (d != std::string::npos) l = l.substr(d + 1);
      r = l;
      if (l.compare(0, 8, "host_cuda.h:") && l.compare(0, 9, "device.h:")) break;
    }
    pclose(f);
  }
  return r;
}
std::map<void*, std::string> g_where;
const std::string& where_c(void* pc) {
  auto it = g_where.find(pc);
  if (it == g_where.end()) it = g_where.emplace(pc, where(pc)).first;
  return it->second;
}
void flush_warp(unsigned w) {
  for (auto& kv : g_pend[w]) {
    Pend& p = kv.second;
    Site& s = g_sites[kv.first];
    s.bytes = p.bytes;
    s.shared = p.shared;
    s.write = p.flags & WRITE;
    s.atomic = p.flags & ATOMIC;
    size_t most = 0;
    for (auto& l : p.lane) most = std::max(most, l.size());
    for (size_t i = 0; i < most; i++) {
      uintptr_t a[32];
      unsigned n = 0;
      for (auto& l : p.lane)
        if (i < l.size()) a[n++] = l[i];
      s.req++;
      s.lanes += n;
      if (!p.shared) {                                       // 32-byte sectors touched
        std::vector<uintptr_t> sec;
        for (unsigned k = 0; k < n; k++)
          for (uintptr_t x = a[k] / 32; x <= (a[k] + p.bytes - 1) / 32; x++) sec.push_back(x);
        std::sort(sec.begin(), sec.end());
        s.sectors += size_t(std::unique(sec.begin(), sec.end()) - sec.begin());
        s.ideal += std::max<uint64_t>(1, (uint64_t(n) * p.bytes + 31) / 32);
      } else {                                               // wavefronts: 32 banks x 4 bytes
        unsigned per = p.bytes <= 4 ? 32 : p.bytes == 8 ? 16 : 8;
        for (unsigned k0 = 0; k0 < n; k0 += per) {
          std::vector<uintptr_t> words;
          for (unsigned k = k0; k < std::min(n, k0 + per); k++)
            for (unsigned b = 0; b < std::max(1u, p.bytes / 4); b++) words.push_back(a[k] / 4 + b);
          std::sort(words.begin(), words.end());
          words.erase(std::unique(words.begin(), words.end()), words.end());
          unsigned bank[32] = {}, worst = 1;
          for (auto x : words) worst = std::max(worst, ++bank[x % 32]);
          s.sectors += worst;
          s.ideal++;
        }
      }
    }
  }
  g_pend[w].clear();
}
bool before(const Acc& a, unsigned me) {     // does the recorded access happen before thread `me` now?
  if (a.blk == g_blk) return g_vc[size_t(me) * T + a.tid] >= a.clk;
  return g_fenced[me] && a.blk < g_released.size() && !g_released[a.blk].empty() && g_released[a.blk][a.tid] >= a.clk;
}
// Two threads may store the same value to one place (Triton does so with replicated layouts): the
// hook runs before the store, so the verdict waits for the next event.
struct Waw {
  const char* p;
  unsigned n;
  char old[16];
  std::string text;
};
std::vector<Waw> g_waw;
uint64_t g_same_value;
void settle() {
  for (auto& w : g_waw) {
    if (memcmp(w.old, w.p, w.n))
      g_errors.push_back(w.text);
    else
      g_same_value++;
  }
  g_waw.clear();
}
void race(const char* space, const char* what, const Acc& a, const void* p, void* pc, const std::string& name,
          unsigned elem) {
  bool waw = !strcmp(what, "write after write");
  if (g_errors.size() > 20 || g_waw.size() > 64) return;
  if (!waw && !g_seen.insert({a.pc, pc}).second) return;
  char b[1024];
  const uint3& t = cur->tid;
  snprintf(b, sizeof b,
           "race (%s) in %s memory%s%s at %p: block %u thread (%u,%u,%u) at %s conflicts with block %u thread %u at %s",
           what, space, name.empty() ? "" : " ", name.c_str(), p, g_blk, t.x, t.y, t.z, where_c(pc).c_str(), a.blk,
           a.tid, where_c(a.pc).c_str());
  if (!waw) {
    g_errors.push_back(b);
    return;
  }
  Waw w{static_cast<const char*>(p), elem, {}, b};
  memcpy(w.old, p, elem);
  g_waw.push_back(w);
}
void note(Rec& r, unsigned me, int flags, void* pc, const void* p, const char* space, const std::string& name,
          unsigned elem) {
  uint8_t kind = flags & ATOMIC ? ATOM : PLAIN;
  Acc now{g_vc[size_t(me) * T + me], g_blk, uint16_t(me), kind, pc};
  auto clash = [&](const Acc& a) {
    return a.kind && !(a.blk == g_blk && a.tid == me) && !(a.kind == ATOM && kind == ATOM) && !before(a, me);
  };
  if (clash(r.w)) race(space, flags & WRITE ? "write after write" : "read after write", r.w, p, pc, name, elem);
  if (flags & WRITE) {
    for (auto& x : r.r)
      if (clash(x)) race(space, "write after read", x, p, pc, name, elem);
    r.w = now;
    r.r[0] = r.r[1] = Acc{};
  } else {
    Acc& a = r.r[0];
    Acc& b = r.r[1];
    if (!a.kind || (a.tid == me && a.blk == g_blk) || before(a, me))
      a = now;
    else
      b = now;
  }
}
void uninit(const char* space, const std::string& name, const void* p, void* pc) {
  if (!g_seen.insert({nullptr, pc}).second || g_errors.size() > 20) return;
  g_errors.push_back(std::string("uninitialised read of ") + space + " memory " + name + " at " + where_c(pc) +
                     " (offset address " + std::to_string(reinterpret_cast<uintptr_t>(p)) + ")");
}
}  // namespace

void launch_begin(const char* name, void (*)(void*)) {
  g_name = name;
  g_errors.clear();
  g_seen.clear();
  g_sites.clear();
  g_released.clear();
  for (auto& kv : g_bufs) {
    auto& b = *kv.second;
    b.rec.assign((b.bytes + b.elem - 1) / b.elem, Rec{});
  }
  g_modules.clear();
  dl_iterate_phdr(
      [](dl_phdr_info* i, size_t, void*) {
        for (int k = 0; k < i->dlpi_phnum; k++)
          if (i->dlpi_phdr[k].p_type == PT_LOAD)
            g_modules.push_back({i->dlpi_addr + i->dlpi_phdr[k].p_vaddr,
                                 i->dlpi_addr + i->dlpi_phdr[k].p_vaddr + i->dlpi_phdr[k].p_memsz});
        return 0;
      },
      nullptr);
  pthread_attr_t at;
  void* lo;
  size_t n;
  pthread_getattr_np(pthread_self(), &at);
  pthread_attr_getstack(&at, &lo, &n);
  pthread_attr_destroy(&at);
  g_host_lo = uintptr_t(lo);
  g_host_hi = g_host_lo + n;
}
std::string launch_end() {
  settle();
  g_report.clear();
  std::map<std::string, Site> lines;      // several instructions of one line, size and kind make one row
  for (auto& kv : g_sites) {
    const Site& s = kv.second;
    char key[600];
    snprintf(key, sizeof key, "%-28s %-6s %-6s %2uB", where_c(kv.first.first).c_str(), s.shared ? "shared" : "global",
             s.atomic  ? "atomic"
             : s.write ? "store"
                       : "load",
             s.bytes);
    Site& d = lines[key];
    d.req += s.req;
    d.sectors += s.sectors;
    d.ideal += s.ideal;
    d.lanes += s.lanes;
    d.shared = s.shared;
  }
  for (auto& kv : lines) {
    const Site& s = kv.second;
    char b[800];
    snprintf(b, sizeof b, "%s  requests %8llu  lanes %4.1f  %s/request %5.2f  ideal %5.2f\n", kv.first.c_str(),
             (unsigned long long)s.req, double(s.lanes) / s.req, s.shared ? "wavefronts" : "sectors   ",
             double(s.sectors) / s.req, double(s.ideal) / s.req);
    g_report += b;
  }
  std::string e;
  for (auto& x : g_errors) e += x + "\n";
  return e;
}
void block_begin(uint3 bid, dim3 g, unsigned n, char* arena, size_t bytes) {
  T = n;
  g_blk = bid.x + g.x * (bid.y + g.y * bid.z);
  g_arena = arena;
  g_arena_bytes = bytes;
  g_vars.clear();
  if (g_shadow.size() < bytes) g_shadow.resize(bytes);
  g_vc.assign(size_t(n) * n, 0);
  for (unsigned i = 0; i < n; i++) g_vc[size_t(i) * n + i] = 1;
  g_fenced.assign(n, 0);
  if (g_released.size() <= g_blk) g_released.resize(g_blk + 1);
  g_pend.resize((n + 31) / 32);
}
void block_end() {
  for (unsigned w = 0; w < (T + 31) / 32; w++) flush_warp(w);
}
void shared_var(char* p, size_t n) {
  g_vars.push_back({p, n});
  std::fill(g_shadow.begin() + (p - g_arena), g_shadow.begin() + (p - g_arena) + long(n), Rec{});
}
void join(const unsigned* who, unsigned n) {
  static std::vector<uint32_t> m;
  m.assign(T, 0);
  char f = 0;
  if (n == T)
    for (unsigned i = 0; i < T; i++) m[i] = g_vc[size_t(i) * T + i];
  else
    for (unsigned k = 0; k < n; k++) {
      const uint32_t* v = &g_vc[size_t(who[k]) * T];
      for (unsigned i = 0; i < T; i++) m[i] = std::max(m[i], v[i]);
    }
  for (unsigned k = 0; k < n; k++) f |= g_fenced[who[k]];
  for (unsigned k = 0; k < n; k++) {
    uint32_t* v = &g_vc[size_t(who[k]) * T];
    std::copy(m.begin(), m.end(), v);
    v[who[k]]++;
    g_fenced[who[k]] = f;
  }
}
void fence() {
  unsigned me = cur->linear;
  auto& r = g_released[g_blk];
  r.resize(T, 0);
  const uint32_t* v = &g_vc[size_t(me) * T];
  for (unsigned i = 0; i < T; i++) r[i] = std::max(r[i], v[i]);
  g_vc[size_t(me) * T + me]++;
  g_fenced[me] = 1;
}
void access(const void* ptr, unsigned bytes, int flags, void* pc) {
  if (!cur) return;
  if (!g_waw.empty()) settle();
  uintptr_t a = uintptr_t(ptr);
  const char* c = static_cast<const char*>(ptr);
  unsigned me = cur->linear;
  bool shared = false;
  if (c >= g_arena && c < g_arena + g_arena_bytes) {
    shared = true;
    bool in = false;
    for (auto& v : g_vars)
      if (c >= v.first && c + bytes <= v.first + v.second) {
        in = true;
        break;
      }
    if (!in)
      fail({where_c(pc).c_str(), 0}, "%s of %u bytes outside every shared array", flags & WRITE ? "write" : "read",
           bytes);
    static const std::string none;
    for (unsigned i = 0; i < bytes; i++) {
      Rec& r = g_shadow[size_t(c - g_arena) + i];
      if (!(flags & WRITE) && !r.w.kind) uninit("shared", none, ptr, pc);
      note(r, me, flags, pc, c + i, "shared", none, 1);
    }
  } else {
    if (is_internal(ptr) || (a >= g_host_lo && a < g_host_hi)) return;
    auto it = g_bufs.upper_bound(a);
    Buf* b = it == g_bufs.begin() ? nullptr : std::prev(it)->second.get();
    if (!b || c + bytes > b->p + b->bytes) {
      for (auto& m : g_modules)
        if (a >= m.first && a < m.second) return;
      if (a >= uintptr_t(&cur) && a < uintptr_t(&cur + 1)) return;
      if (g_bufs.empty()) return;
      std::string near =
          b ? b->name + " + " + std::to_string(a - uintptr_t(b->p)) + " of " + std::to_string(b->bytes) + " bytes"
            : "nothing";
      fail({where_c(pc).c_str(), 0}, "%s of %u bytes out of bounds: nearest buffer below is %s",
           flags & WRITE ? "write" : "read", bytes, near.c_str());
    }
    size_t i0 = size_t(c - b->p) / b->elem, i1 = (size_t(c - b->p) + bytes - 1) / b->elem;
    for (size_t i = i0; i <= i1; i++) {
      if (flags & WRITE)
        b->written[i] = true;
      else if (!b->init && !b->written[i])
        uninit("global", b->name, ptr, pc);
      note(b->rec[i], me, flags, pc, b->p + i * b->elem, "global", b->name, b->elem > 16 ? 16 : b->elem);
    }
  }
  if (bytes > 1 && bytes <= 16 && a % bytes)
    fail({where_c(pc).c_str(), 0}, "misaligned %u-byte access at %p", bytes, ptr);
  Pend& p = g_pend[cur->warp][{pc, flags}];
  p.bytes = bytes;
  p.flags = flags;
  p.shared = shared;
  p.lane[cur->lane].push_back(a);
}
}  // namespace check
}  // namespace host_cuda

using namespace host_cuda::check;
extern "C" {
void host_cuda_buffer(void* p, size_t bytes, unsigned elem, int init, const char* name) {
  auto b = std::make_unique<Buf>();
  b->p = static_cast<char*>(p);
  b->bytes = bytes;
  b->elem = elem ? elem : 1;
  b->init = init;
  b->name = name ? name : "";
  b->written.assign((bytes + b->elem - 1) / b->elem, false);
  g_bufs[uintptr_t(p)] = std::move(b);
}
void host_cuda_ptx_access(const void* p, unsigned bytes, int flags) {
  access(p, bytes, flags, __builtin_return_address(0));
}
void host_cuda_clear() {
  g_bufs.clear();
}
size_t host_cuda_unwritten(void* p) {
  auto it = g_bufs.find(uintptr_t(p));
  return it == g_bufs.end() ? 0 : size_t(std::count(it->second->written.begin(), it->second->written.end(), false));
}
const char* host_cuda_report() {
  return g_report.c_str();
}

// ---- the hooks that -fsanitize=thread calls ---------------------------------------------------
#define PC __builtin_return_address(0)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
#define RW(N)                               \
  void __tsan_read##N(void* p) {            \
    access(p, N, 0, PC);                    \
  }                                         \
  void __tsan_write##N(void* p) {           \
    access(p, N, WRITE, PC);                \
  }                                         \
  void __tsan_unaligned_read##N(void* p) {  \
    access(p, N, 0, PC);                    \
  }                                         \
  void __tsan_unaligned_write##N(void* p) { \
    access(p, N, WRITE, PC);                \
  }                                         \
  void __tsan_volatile_read##N(void* p) {   \
    access(p, N, 0, PC);                    \
  }                                         \
  void __tsan_volatile_write##N(void* p) {  \
    access(p, N, WRITE, PC);                \
  }
RW(1)
RW(2) RW(4) RW(8) RW(16)
    // clang calls these for struct copies and fills
    void* __tsan_memcpy(void* d, const void* s, size_t n) {
  access(s, unsigned(n), 0, PC);
  access(d, unsigned(n), WRITE, PC);
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  access(s, unsigned(n), 0, PC);
  access(d, unsigned(n), WRITE, PC);
  return memmove(d, s, n);
}
void* __tsan_memset(void* d, int c, size_t n) {
  access(d, unsigned(n), WRITE, PC);
  return memset(d, c, n);
}
void __tsan_read_range(void* p, size_t n) {
  access(p, unsigned(n), 0, PC);
}
void __tsan_write_range(void* p, size_t n) {
  access(p, unsigned(n), WRITE, PC);
}
#define ATOMICS(B, TY)                                                                    \
  TY __tsan_atomic##B##_load(const volatile TY* p, int) {                                 \
    access((void*)p, B / 8, ATOMIC, PC);                                                  \
    return __atomic_load_n(p, 5);                                                         \
  }                                                                                       \
  void __tsan_atomic##B##_store(volatile TY* p, TY v, int) {                              \
    access((void*)p, B / 8, WRITE | ATOMIC, PC);                                          \
    __atomic_store_n(p, v, 5);                                                            \
  }                                                                                       \
  TY __tsan_atomic##B##_exchange(volatile TY* p, TY v, int) {                             \
    access((void*)p, B / 8, WRITE | ATOMIC, PC);                                          \
    return __atomic_exchange_n(p, v, 5);                                                  \
  }                                                                                       \
  TY __tsan_atomic##B##_fetch_add(volatile TY* p, TY v, int) {                            \
    access((void*)p, B / 8, WRITE | ATOMIC, PC);                                          \
    return __atomic_fetch_add(p, v, 5);                                                   \
  }                                                                                       \
  int __tsan_atomic##B##_compare_exchange_weak(volatile TY* p, TY* e, TY v, int, int) {   \
    access((void*)p, B / 8, WRITE | ATOMIC, PC);                                          \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                             \
  }                                                                                       \
  int __tsan_atomic##B##_compare_exchange_strong(volatile TY* p, TY* e, TY v, int, int) { \
    access((void*)p, B / 8, WRITE | ATOMIC, PC);                                          \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                             \
  }
#define ATOMICS_CLANG(B, TY)                                                         \
  TY __tsan_atomic##B##_compare_exchange_val(volatile TY* p, TY e, TY v, int, int) { \
    access((void*)p, B / 8, WRITE | ATOMIC, PC);                                     \
    __atomic_compare_exchange_n(p, &e, v, false, 5, 5);                              \
    return e;                                                                        \
  }
ATOMICS_CLANG(8, uint8_t)
ATOMICS_CLANG(16, uint16_t) ATOMICS_CLANG(32, uint32_t) ATOMICS_CLANG(64, uint64_t) ATOMICS(8, uint8_t)
    ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t) void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
}
