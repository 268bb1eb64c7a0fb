// Which instruction set's kernels run. Compiled for the oldest CPU.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace idm::cpu {

namespace {

// By name, or the newest for an empty one.
const Launchers& find(const std::string& name, const std::string& asked_by) {
  const Launchers* available[3];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    available[count++] = &avx512::launchers;
  if (avx2) available[count++] = &avx2::launchers;
#endif
  available[count++] = &portable::launchers;
  if (name.empty()) return *available[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (name == available[i]->name) return *available[i];
    names += std::string(i ? ", " : "") + available[i]->name;
  }
  throw std::runtime_error(asked_by + name + ": this machine runs " + names);
}

std::atomic<const Launchers*>& in_use() {
  const char* wanted = std::getenv("IDM_FAST_CPU_ISA");
  static std::atomic<const Launchers*> chosen{&find(wanted ? wanted : "", "environment variable IDM_FAST_CPU_ISA=")};
  return chosen;
}

}  // namespace

const Launchers& launchers() { return *in_use(); }

void use_instruction_set(const char* name) { in_use() = &find(name, "instruction set "); }

}  // namespace idm::cpu
