// CPU kernels are compiled once per instruction set, from one source, and picked at run time.
//
// A kernel is a function template over Isa, declared in csrc/cpu/kernels/<op>.h and instantiated in
// csrc/cpu/kernels/<op>.cpp for FASTDNI_ISA, the set that file is being compiled for. No torch
// header is included there: an inline function of torch compiled for AVX-512 could be linked into
// code that must run without it.
#pragma once

namespace fastdni::cpu {

enum class Isa { base, avx2, avx512 };

// The best set of this processor, or the one the environment variable FASTDNI_ISA names. It is read
// once. Throws std::runtime_error when that set is unknown or not supported here.
Isa active_isa();
const char* isa_name(Isa isa);

// Calls kernel(std::integral_constant-like tag): `with_isa([&](auto isa) { f<isa.value>(...); })`.
template <Isa isa>
struct IsaTag {
  static constexpr Isa value = isa;
};

template <class Kernel>
void with_isa(const Kernel& kernel) {
#if defined(FASTDNI_BASE_ISA_ONLY)
  kernel(IsaTag<Isa::base>{});
#else
  switch (active_isa()) {
    case Isa::base:
      return kernel(IsaTag<Isa::base>{});
    case Isa::avx2:
      return kernel(IsaTag<Isa::avx2>{});
    case Isa::avx512:
      return kernel(IsaTag<Isa::avx512>{});
  }
#endif
}

}  // namespace fastdni::cpu
