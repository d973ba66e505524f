#include "host_cuda/checks.h"

#include <dlfcn.h>
#include <string.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));  // this module, from the linker
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace host_cuda {
namespace check {

const char* stack_end;

namespace {

// A load or store instruction.
struct Site {
  void* code;
  Kind kind;
  bool shared;
  size_t bytes;
  uint64_t requests, lanes, parts, least;
};
std::vector<Site> sites;
std::unordered_map<uintptr_t, unsigned> site_numbers;

// Accesses to one place in memory: the last store, and of the loads since then two that are not ordered.
struct Access {
  uint32_t time = 0;  // 0: none
  uint32_t block;
  uint16_t thread, site;
};
struct Record {
  Access store, loads[2];
};
struct Buffer {
  const char* p;
  size_t bytes, element;
  std::string name;
  std::vector<uint8_t> written;  // or initialised
  std::vector<Record> records;
};
std::map<const char*, Buffer> buffers;
Buffer* last_buffer = nullptr;

struct Array {
  const char *p, *end;
};
Block block;
unsigned block_number;
std::vector<Array> arrays;
constexpr size_t kGrain = 2;  // of shared memory: no two threads use one 16-bit word
std::vector<Record> shared_records;

struct Error {
  std::string text;
  unsigned site, other;  // other: sites.size() if there is none
};
std::vector<Error> errors;

// ---- what happens before what ----
// Threads run one at a time, so there is one clock, which ticks whenever threads meet. A thread knows of another's
// accesses up to some time: up to the last barrier of the whole block, or by its row, which lasts until then.
uint32_t now = 1, launch_start, block_start, block_met;
std::vector<uint32_t> rows, row_met;
std::vector<char> fenced;                      // threads that have executed a fence or met one that has
std::vector<std::vector<uint32_t>> published;  // by a fence: for each block and thread of it, up to when

uint32_t* row(unsigned thread) {
  uint32_t* r = &rows[size_t(thread) * block.threads];
  if (row_met[thread] != block_met) {
    std::fill_n(r, block.threads, block_met);
    row_met[thread] = block_met;
  }
  return r;
}

bool ordered(const Access& a, unsigned thread) {
  if (a.time <= launch_start) return true;
  if (a.time <= block_start)
    return fenced[thread] && !published[a.block].empty() && published[a.block][a.thread] >= a.time;
  if (a.thread == thread || a.time <= block_met) return true;
  return row_met[thread] == block_met && row(thread)[a.thread] >= a.time;
}

// ---- source lines ----

std::map<void*, Loc> located;
std::set<std::string> file_names;

// By addr2line, for all of these at once. Of the functions inlined at an address, the kernel's own line counts: the
// innermost one in a cuda.cu, or else outside of common/cuda.h and of the emulation.
void locate(std::vector<void*> codes) {
  codes.erase(std::remove_if(codes.begin(), codes.end(), [](void* c) { return located.count(c); }), codes.end());
  Dl_info module;
  if (codes.empty() || !dladdr(__ehdr_start, &module)) return;
  std::string command = std::string("addr2line -a -i -e '") + module.dli_fname + "'";
  for (void* c : codes) {
    char address[32];
    snprintf(address, sizeof address, " 0x%zx", size_t(static_cast<char*>(c) - 1 - __ehdr_start));
    command += address;
  }
  FILE* out = popen(command.c_str(), "r");
  if (!out) return;
  char text[4096];
  int best = 0;
  for (size_t i = size_t(-1); fgets(text, sizeof text, out);) {
    if (text[0] == '0' && text[1] == 'x') {
      i++;
      best = 0;
      continue;
    }
    std::string frame(text);
    const size_t colon = frame.rfind(':');
    if (i >= codes.size() || colon == std::string::npos) continue;
    std::string file = frame.substr(0, colon);
    const auto has = [&](const char* part) { return file.find(part) != std::string::npos; };
    const int rank = has(".cu") ? 3 : has("csrc/host_cuda/") || has("common/cuda.h") ? 1 : 2;
    if (rank <= best) continue;
    best = rank;
    const size_t slash = file.rfind('/'), folder = slash == std::string::npos ? slash : file.rfind('/', slash - 1);
    if (folder != std::string::npos) file = file.substr(folder + 1);
    located[codes[i]] = {file_names.insert(file).first->c_str(), atoi(frame.c_str() + colon + 1)};
  }
  pclose(out);
}

Loc where(void* code) {
  locate({code});
  const auto found = located.find(code);
  return found == located.end() ? Loc{"unknown", 0} : found->second;
}

std::string text(Loc l) {
  return std::string(l.file) + ":" + std::to_string(l.line);
}

// ---- errors ----

void report(unsigned site, unsigned other, const std::string& text) {  // once for each pair of instructions
  for (const Error& e : errors)
    if (e.site == site && e.other == other) return;
  if (errors.size() < 8) errors.push_back({text, site, other});
}

std::string thread_name(unsigned block, unsigned thread) {
  return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

const char* verb(Kind k) {
  return k == Kind::load ? "load" : k == Kind::store ? "store" : "atomic";
}

void race(const Access& other, const Access& mine, const char* name) {
  report(mine.site, other.site,
         std::string("race in ") + name + ": " + verb(sites[mine.site].kind) + " by " +
             thread_name(mine.block, mine.thread) + ", after a " + verb(sites[other.site].kind) + " by " +
             thread_name(other.block, other.thread) + " that nothing orders before it");
}

// One load or store of one element.
void note(Record& r, const Access& mine, const char* name) {
  const Kind kind = sites[mine.site].kind;
  const auto clash = [&](const Access& a) {
    return a.time && !(kind == Kind::atomic && sites[a.site].kind == Kind::atomic) && !ordered(a, mine.thread);
  };
  if (clash(r.store)) race(r.store, mine, name);
  if (kind == Kind::load) {
    const bool first = !r.loads[0].time || ordered(r.loads[0], mine.thread);
    r.loads[first ? 0 : 1] = mine;
    return;
  }
  for (const Access& a : r.loads)
    if (clash(a)) race(a, mine, name);
  r = {mine, {}};
}

// ---- sectors and banks ----
// The k-th time that lanes of a warp execute an instruction since they last met counts as one request.
struct Request {
  uint32_t mask = 0;
  uintptr_t address[32];
};
struct Pending {
  uint32_t times[32] = {};
  std::vector<Request> requests;
};
struct Warp {
  std::vector<Pending> pending;  // for each site
  std::vector<unsigned> used;
};
std::vector<Warp> warps;

unsigned distinct(uintptr_t* first, uintptr_t* last) {
  std::sort(first, last);
  return unsigned(std::unique(first, last) - first);
}

void count_sectors(const Request& q, Site& s) {
  uintptr_t sectors[32 * 2];
  unsigned n = 0;
  for (int lane = 0; lane < 32; lane++)
    if (q.mask >> lane & 1) {
      const uintptr_t first = q.address[lane] / 32, last = (q.address[lane] + s.bytes - 1) / 32;
      sectors[n++] = first;
      if (last != first) sectors[n++] = last;
    }
  s.parts += distinct(sectors, sectors + n);
  s.least += (uint64_t(__builtin_popcount(q.mask)) * s.bytes + 31) / 32;
}

// 32 banks of 4 bytes serve 128 bytes of neighbouring lanes at a time, unless two words of one bank are among them.
void count_passes(const Request& q, Site& s) {
  const int words = int(std::max<size_t>(s.bytes / 4, 1)), lanes = 32 / words;
  for (int first = 0; first < 32; first += lanes) {
    uintptr_t touched[32];
    unsigned n = 0, in_bank[32] = {}, worst = 0;
    for (int lane = first; lane < first + lanes; lane++)
      if (q.mask >> lane & 1)
        for (int w = 0; w < words; w++) touched[n++] = q.address[lane] / 4 + unsigned(w);
    n = distinct(touched, touched + n);
    for (unsigned i = 0; i < n; i++) worst = std::max(worst, ++in_bank[touched[i] % 32]);
    s.parts += worst;
    s.least += n > 0;
  }
}

void flush(Warp& w) {
  for (unsigned number : w.used) {
    Site& s = sites[number];
    Pending& p = w.pending[number];
    for (const Request& q : p.requests) {
      s.requests++;
      s.lanes += unsigned(__builtin_popcount(q.mask));
      s.shared ? count_passes(q, s) : count_sectors(q, s);
    }
    p.requests.clear();
    memset(p.times, 0, sizeof p.times);
  }
  w.used.clear();
}

void add_request(unsigned site, const void* address) {
  Warp& w = warps[current->warp];
  if (w.pending.size() <= site) w.pending.resize(site + 16);
  Pending& p = w.pending[site];
  if (p.requests.empty()) w.used.push_back(site);
  const uint32_t time = p.times[current->lane]++;
  if (p.requests.size() <= time) p.requests.emplace_back();
  p.requests[time].mask |= 1u << current->lane;
  p.requests[time].address[current->lane] = reinterpret_cast<uintptr_t>(address);
}

unsigned site_number(void* code, Kind kind, bool shared, size_t bytes) {
  const uintptr_t key = reinterpret_cast<uintptr_t>(code) * 8 + uintptr_t(kind) * 2 + shared;
  const auto [found, is_new] = site_numbers.try_emplace(key, unsigned(sites.size()));
  if (is_new) sites.push_back({code, kind, shared, bytes, 0, 0, 0, 0});
  return found->second;
}

// ---- accesses ----

void access_shared(const char* p, size_t bytes, Kind kind, void* code) {
  const bool inside =
      std::any_of(arrays.begin(), arrays.end(), [&](const Array& a) { return p >= a.p && p + bytes <= a.end; });
  if (!inside) fail(where(code), "%s of %zu bytes outside of every shared array", verb(kind), bytes);
  const unsigned site = site_number(code, kind, true, bytes);
  const Access mine{now, block_number, uint16_t(current->number), uint16_t(site)};
  const size_t first = size_t(p - block.arena) / kGrain, last = (size_t(p - block.arena) + bytes - 1) / kGrain;
  for (size_t i = first; i <= last; i++) {
    Record& r = shared_records[i];
    if (kind != Kind::store && !r.store.time)
      report(site, unsigned(-1), "uninitialised shared memory: read by " + thread_name(block_number, current->number));
    note(r, mine, "shared memory");
  }
  add_request(site, p);
}

Buffer* find_buffer(const char* p) {
  if (last_buffer && p >= last_buffer->p && p < last_buffer->p + last_buffer->bytes) return last_buffer;
  auto after = buffers.upper_bound(p);
  if (after == buffers.begin()) return nullptr;
  return last_buffer = &std::prev(after)->second;
}

void access_global(const char* p, size_t bytes, Kind kind, void* code) {
  Buffer* b = find_buffer(p);
  if (!b || p + bytes > b->p + b->bytes) {
    if (kind == Kind::load && p >= __ehdr_start && p < _end) return;  // a table among the kernel's constants
    if (!b) fail(where(code), "%s of %zu bytes out of bounds, below every buffer", verb(kind), bytes);
    fail(where(code), "%s of %zu bytes out of bounds: at byte %td of %s, which has %zu", verb(kind), bytes, p - b->p,
         b->name.c_str(), b->bytes);
  }
  const unsigned site = site_number(code, kind, false, bytes);
  const Access mine{now, block_number, uint16_t(current->number), uint16_t(site)};
  const size_t first = size_t(p - b->p) / b->element, last = (size_t(p - b->p) + bytes - 1) / b->element;
  for (size_t i = first; i <= last; i++) {
    if (kind != Kind::store && !b->written[i])
      report(site, unsigned(-1),
             "uninitialised " + b->name + ": element " + std::to_string(i) + " read by " +
                 thread_name(block_number, current->number));
    if (kind != Kind::load) b->written[i] = 1;
    note(b->records[i], mine, b->name.c_str());
  }
  add_request(site, p);
}

}  // namespace

void access(const void* address, size_t bytes, Kind kind, void* code) {
  const auto* p = static_cast<const char*>(address);
  if (!current || (p < stack_end && p >= stack_end - kStack)) return;
  const bool in_shared = p >= block.arena && p < block.arena_end;
  if (!in_shared && ((p >= block.contexts && p < block.contexts_end) || address == &current)) return;
  if (bytes <= 16 && reinterpret_cast<uintptr_t>(p) % bytes)
    fail(where(code), "misaligned %s of %zu bytes at %p", verb(kind), bytes, address);
  in_shared ? access_shared(p, bytes, kind, code) : access_global(p, bytes, kind, code);
}

// ---- what the emulation tells ----

Loc kernel_line(void* code, Loc otherwise) {
  const Loc found = where(code);
  return strstr(found.file, ".cu") ? found : otherwise;
}

void begin_launch() {
  errors.clear();
  published.clear();
  launch_start = now++;
}

std::string end_launch() {
  std::vector<void*> codes;
  for (const Error& e : errors)
    for (unsigned s : {e.site, e.other})
      if (s < sites.size()) codes.push_back(sites[s].code);
  locate(codes);
  std::string all;
  for (const Error& e : errors) {
    all += text(where(sites[e.site].code)) + ": " + e.text;
    if (e.other < sites.size()) all += " at " + text(where(sites[e.other].code));
    all += "\n";
  }
  return all;
}

void begin_block(const Block& b) {
  block = b;
  block_number = b.index.x + b.grid.x * (b.index.y + b.grid.y * b.index.z);
  block_start = block_met = now++;
  arrays.clear();
  shared_records.resize(size_t(b.arena_end - b.arena) / kGrain);
  if (rows.size() < size_t(b.threads) * b.threads) rows.resize(size_t(b.threads) * b.threads);
  row_met.assign(b.threads, 0);
  fenced.assign(b.threads, 0);
  if (published.size() <= block_number) published.resize(block_number + 1);
  warps.resize(std::max<size_t>(warps.size(), (b.threads + 31) / 32));
}

void end_block() {
  for (Warp& w : warps) flush(w);
}

void shared_array(const char* p, size_t bytes) {
  arrays.push_back({p, p + bytes});
  std::fill_n(shared_records.begin() + (p - block.arena) / ptrdiff_t(kGrain), (bytes + kGrain - 1) / kGrain, Record{});
}

void join(const std::vector<unsigned>& threads) {
  const bool all = threads.size() == block.threads;
  char any_fenced = 0;
  for (unsigned t : threads) any_fenced |= fenced[t];
  for (unsigned t : threads) fenced[t] = any_fenced;
  if (all) {
    block_met = now;
  } else {
    std::vector<uint32_t> merged(block.threads, block_met);
    for (unsigned t : threads) {
      uint32_t* r = row(t);
      r[t] = now;
      for (unsigned i = 0; i < block.threads; i++) merged[i] = std::max(merged[i], r[i]);
    }
    for (unsigned t : threads) std::copy(merged.begin(), merged.end(), row(t));
  }
  now++;
  unsigned met[32] = {};
  for (unsigned t : threads) met[t / 32]++;
  for (unsigned w = 0; w < (block.threads + 31) / 32; w++)
    if (met[w] == std::min(32u, block.threads - 32 * w)) flush(warps[w]);
}

void fence() {
  const unsigned me = current->number;
  auto& times = published[block_number];
  times.resize(block.threads);
  const uint32_t* r = row(me);
  for (unsigned i = 0; i < block.threads; i++) times[i] = std::max(times[i], i == me ? now : r[i]);
  fenced[me] = 1;
  now++;
}

// ---- what tests ask ----

void buffer(const void* p, size_t bytes, size_t element, bool initialised, const std::string& name) {
  if (!bytes) return;
  const auto* c = static_cast<const char*>(p);
  const size_t n = (bytes + element - 1) / element;
  last_buffer = nullptr;
  buffers[c] = {c, bytes, element, name, std::vector<uint8_t>(n, initialised), std::vector<Record>(n)};
}

void clear() {
  last_buffer = nullptr;
  buffers.clear();
  sites.clear();
  site_numbers.clear();
  warps.clear();
}

size_t unwritten(const void* p) {
  const auto found = buffers.find(static_cast<const char*>(p));
  if (found == buffers.end()) return 0;
  const auto& written = found->second.written;
  return size_t(std::count(written.begin(), written.end(), 0));
}

std::vector<Line> lines() {
  std::vector<void*> codes;
  for (const Site& s : sites) codes.push_back(s.code);
  locate(codes);
  std::map<std::tuple<std::string, int, bool, Kind, size_t>, Line> merged;  // instructions of one line are one
  for (const Site& s : sites) {
    const Loc l = where(s.code);
    Line& m = merged[{l.file, l.line, s.shared, s.kind, s.bytes}];
    m = {text(l),           s.shared,          s.kind,           s.bytes, m.requests + s.requests,
         m.lanes + s.lanes, m.parts + s.parts, m.least + s.least};
  }
  std::vector<Line> all;
  for (const auto& [key, line] : merged) all.push_back(line);
  return all;
}

}  // namespace check
}  // namespace host_cuda

// ---- what the compiler calls with -fsanitize=thread, in place of its runtime library ----
using host_cuda::check::access;
using host_cuda::check::Kind;
#define CODE __builtin_return_address(0)
#define HOOKS(N)                            \
  void __tsan_read##N(void* p) {            \
    access(p, N, Kind::load, CODE);         \
  }                                         \
  void __tsan_write##N(void* p) {           \
    access(p, N, Kind::store, CODE);        \
  }                                         \
  void __tsan_unaligned_read##N(void* p) {  \
    access(p, N, Kind::load, CODE);         \
  }                                         \
  void __tsan_unaligned_write##N(void* p) { \
    access(p, N, Kind::store, CODE);        \
  }
// An atomic operation is a load and then tries to exchange, of which the first succeeds.
#define ATOMIC_HOOKS(N, T)                                                                         \
  T __tsan_atomic##N##_load(const T* p, int) {                                                     \
    return __atomic_load_n(p, __ATOMIC_RELAXED);                                                   \
  }                                                                                                \
  int __tsan_atomic##N##_compare_exchange_weak(T* p, T* expected, T v, int, int) {                 \
    access(p, sizeof(T), Kind::atomic, CODE);                                                      \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
  }
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  access(p, n, Kind::load, CODE);
}
void __tsan_write_range(void* p, size_t n) {
  access(p, n, Kind::store, CODE);
}
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)
uint8_t __tsan_atomic8_load(const uint8_t* p, int) {  // whether a static variable of a launcher has been made
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}
