// Finds the kernel translated from PTX for one that the host's compiler made: by name.
#include "host_cuda/ptx.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

namespace host_cuda {
namespace ptx {
namespace {

using Kernel = Registration;
std::map<std::string, const Kernel*>& kernels() {  // of one name, the last one loaded
  static std::map<std::string, const Kernel*> all;
  return all;
}
std::atomic<uint64_t> launch_count{0};

struct Range {
  const char* first;
  size_t bytes;
};
std::vector<Range>& variables() {
  static std::vector<Range> all;
  return all;
}
bool limited = false;  // whether a launch may access variables and these only
std::vector<Range> tensors;

// The name as written in C++, with nvcc's names of the 16-bit types, and without unnamed namespaces.
std::string canonical(const char* symbol) {
  int status;
  char* demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : symbol;
  free(demangled);
  name = std::regex_replace(name, std::regex(R"(\(anonymous namespace\)::|_GLOBAL__N__\w+::)"), "");
  name = std::regex_replace(name, std::regex("fk::cuda::bf16"), "__nv_bfloat16");
  return std::regex_replace(name, std::regex("fk::cuda::half"), "__half");
}

// The symbols of the file that this is in, local ones too, by their distance from where it is loaded.
std::map<uint64_t, std::string> symbols(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(stream), {}};
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  std::map<uint64_t, std::string> found;
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* all = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); k++)
      if (ELF64_ST_TYPE(all[k].st_info) == STT_FUNC) found[all[k].st_value] = names + all[k].st_name;
  }
  return found;
}
std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) throw std::runtime_error("a kernel that is in no file");
  static const auto all = symbols(info.dli_fname);
  const auto found = all.find(static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase));
  if (found == all.end()) throw std::runtime_error(std::string("a kernel that has no symbol in ") + info.dli_fname);
  return canonical(found->second.c_str());
}

const Kernel& find(const std::string& name) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::runtime_error("no PTX of the kernel " + name);
  return *found->second;
}
void run(const std::string& name, const Kernel& to, dim3 grid, dim3 block, size_t dynamic_shared, const void* kernel,
         const void* const* arguments, const size_t* sizes, size_t count) {
  if (count != to.layout.size())
    throw std::runtime_error(name + ": " + std::to_string(count) + " arguments for " +
                             std::to_string(to.layout.size()) + " parameters");
  for (size_t i = 0; i < count; i++)
    if (sizes[i] != to.layout[i].size)
      throw std::runtime_error(name + ": parameter " + std::to_string(i) + " has " + std::to_string(to.layout[i].size) +
                               " bytes in PTX and " + std::to_string(sizes[i]) + " on the host");
  const size_t bytes = to.layout.empty() ? 0 : to.layout.back().offset + to.layout.back().size;
  std::vector<max_align_t> parameters(bytes / sizeof(max_align_t) + 1);
  auto* p = reinterpret_cast<char*>(parameters.data());
  for (size_t i = 0; i < to.layout.size(); i++) memcpy(p + to.layout[i].offset, arguments[i], to.layout[i].size);
  auto call = [&] { to.function(p); };
  launch_count++;
  launch(
      name.c_str(), grid, block, dynamic_shared, kernel,
      [](const void* c) { (*static_cast<const decltype(call)*>(c))(); }, &call);
}

const bool redirected =
    (launch_instead = [](const char*, dim3 grid, dim3 block, size_t dynamic_shared, const void* kernel,
                         const void* const* arguments, const size_t* sizes, size_t count) {
      const std::string name = name_of(kernel);
      run(name, find(name), grid, block, dynamic_shared, kernel, arguments, sizes, count);
    },
     true);

}  // namespace

Registration::Registration(const char* name, void (*function)(const char*), std::initializer_list<Parameter> layout)
    : name(canonical(name)), function(function), layout(layout) {
  kernels()[this->name] = this;
}
Variable::Variable(const void* p, size_t bytes) {
  variables().push_back({static_cast<const char*>(p), bytes});
}
void check_global(const void* p, size_t bytes, Loc loc) {
  if (!limited) return;
  const auto* c = static_cast<const char*>(p);
  for (const auto* ranges : {&tensors, &variables()})
    for (const Range& r : *ranges)
      if (c >= r.first && c + bytes <= r.first + r.bytes) return;
  const char* near = nullptr;  // the start of the tensor that lies closest below
  for (const Range& r : tensors)
    if (r.first <= c && r.first > near) near = r.first;
  fail(loc, "access of %zu bytes at %p, in no tensor of the launch; %td bytes from the start of the last one below it",
       bytes, p, near ? c - near : 0);
}
uint64_t launches() {
  return launch_count;
}

// Of the matrix, the other operands of the quads are found by their lane. A row of A and a column of B are spread over
// the four lanes of a quad, a 32-bit word at a time; words whose rows or depths are 8 rows or 4 words apart follow each
// other in a lane. Of an operand in tf32 the unit sees 19 bits. It adds 16 bytes of a row at a time, which are 8
// products of 16-bit floats or 4 of tf32.
struct tf32 {
  uint32_t bits;
};
inline float widen(tf32 v) {
  return __uint_as_float(v.bits & 0xffffe000u);
}
struct Fragments {
  const uint32_t *a, *b;
  float* d;
};
template <class T>
static void multiply(unsigned depth, unsigned row, const void* const (&lanes)[32]) {
  constexpr unsigned each = 4 / sizeof(T), block = 4 * each;
  const auto lane = [&](unsigned i) { return static_cast<const Fragments*>(lanes[i]); };
  const auto element = [](uint32_t word, unsigned k) { return double(widen(read<T>(word >> k % each * width<T>))); };
  const auto sum = [&](unsigned n) { return &lane(row % 8 * 4 + n / 2)->d[row / 8 * 2 + n % 2]; };
  double sums[8], terms[block + 1][8];
  for (unsigned n = 0; n < 8; n++) sums[n] = *sum(n);
  for (unsigned word = 0; word < depth / block; word++) {
    for (unsigned k = 0; k < block; k++) {
      const unsigned quad = k / each;
      const double x = element(lane(row % 8 * 4 + quad)->a[row / 8 + 2 * word], k);
      for (unsigned n = 0; n < 8; n++) terms[k][n] = x * element(lane(n * 4 + quad)->b[word], k);
    }
    memcpy(terms[block], sums, sizeof sums);
    add_and_cut(terms, block + 1, sums);
  }
  for (unsigned n = 0; n < 8; n++) *sum(n) = static_cast<float>(sums[n]);
}
void mma(Element type, unsigned depth, float (&d)[4], std::initializer_list<uint32_t> a,
         std::initializer_list<uint32_t> b, Loc loc) {
  const unsigned words = depth / (type == Element::tf32 ? 4 : 8);
  if (a.size() != 2 * words || b.size() != words) fail(loc, "mma: registers and shape do not agree");
  const Fragments mine{a.begin(), b.begin(), d};
  const void* lanes[32];
  exchange(&mine, lanes, loc);
  if (const unsigned row = current->lane; row < 16)  // a lane for each row
    (type == Element::bf16   ? multiply<bf16>
     : type == Element::half ? multiply<half>
                             : multiply<tf32>)(depth, row, lanes);
  warp_barrier(~0u, loc);  // before registers change, and after the sums are there
}
void mma_m8n8k4(double (&d)[2], double a, double b, Loc loc) {  // a lane has an element of A and one of B
  const double mine[] = {a, b};
  const void* lanes[32];
  exchange(mine, lanes, loc);
  for (unsigned i = 0; i < 2; i++)
    for (unsigned k = 0; k < 4; k++) {
      const auto* x = static_cast<const double*>(lanes[current->lane / 4 * 4 + k]);
      const auto* y = static_cast<const double*>(lanes[(2 * (current->lane % 4) + i) * 4 + k]);
      d[i] = std::fma(x[0], y[1], d[i]);
    }
  warp_barrier(~0u, loc);
}

}  // namespace ptx
}  // namespace host_cuda

// For ctypes.
#define HOST_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

// The kernel of that name that was loaded last, or null.
HOST_CUDA_EXPORT const void* host_cuda_ptx_kernel(const char* name) {
  const auto found = host_cuda::ptx::kernels().find(host_cuda::ptx::canonical(name));
  return found == host_cuda::ptx::kernels().end() ? nullptr : found->second;
}
HOST_CUDA_EXPORT void host_cuda_ptx_options(int order, uint64_t seed, bool async_lazy) {
  host_cuda::options() = {static_cast<host_cuda::Order>(order), seed, async_lazy};
}
// Returns what went wrong, or null. The kernel may access the given tensors.
HOST_CUDA_EXPORT const char* host_cuda_ptx_launch(const void* kernel, const unsigned* grid, const unsigned* block,
                                                  size_t dynamic_shared, const void* const* arguments,
                                                  const size_t* sizes, size_t count, const void* const* tensors,
                                                  const size_t* tensor_bytes, size_t tensor_count) {
  static thread_local std::string error;
  namespace ptx = host_cuda::ptx;
  for (size_t i = 0; i < tensor_count; i++)
    ptx::tensors.push_back({static_cast<const char*>(tensors[i]), tensor_bytes[i]});
  ptx::limited = true;
  const char* result = nullptr;
  try {
    const auto& to = *static_cast<const ptx::Kernel*>(kernel);
    const auto* id = reinterpret_cast<const void*>(to.function);
    host_cuda::allow_shared(id, host_cuda::kSharedLimit);
    ptx::run(to.name, to, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared, id, arguments,
             sizes, count);
  } catch (const std::exception& e) {
    error = e.what();
    result = error.c_str();
  }
  ptx::limited = false;
  ptx::tensors.clear();
  return result;
}
