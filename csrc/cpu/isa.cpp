#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastdni::cpu {
namespace {

bool supported(Isa isa) {
#if defined(FASTDNI_BASE_ISA_ONLY)
  return isa == Isa::base;
#else
  __builtin_cpu_init();
  switch (isa) {
    case Isa::base:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#endif
}

Isa choose() {
  Isa best = Isa::base;
  std::string names;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (!supported(isa)) continue;
    best = isa;
    names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  const char* wanted = std::getenv("FASTDNI_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (supported(isa) && std::string(wanted) == isa_name(isa)) return isa;
  }
  throw std::runtime_error("fastdni: FASTDNI_ISA must be one of " + names +
                           " on this processor, got " + wanted);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::base:
      return "base";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fastdni::cpu
