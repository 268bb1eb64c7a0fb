// Which instruction set's kernels run. Compiled for the oldest CPU.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace idm::cpu {

namespace {

const Launchers& choose() {
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
  const char* wanted = std::getenv("IDM_FAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(wanted) == available[i]->name) return *available[i];
    names += std::string(i ? ", " : "") + available[i]->name;
  }
  throw std::runtime_error("environment variable IDM_FAST_CPU_ISA=" + std::string(wanted) + ": this machine runs " + names);
}

}  // namespace

const Launchers& launchers() {
  static const Launchers& chosen = choose();
  return chosen;
}

}  // namespace idm::cpu
