// One case per kernel: it reads parameters and arrays, calls the kernel's launcher and hands back
// what the kernel wrote. A case registers itself, so a new kernel is a new file here, no more:
//
//   const simt::Register kCase("name", [](simt::Case& io) { ... });
#pragma once
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <list>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/scalar.h"

namespace simt {

struct BadArguments : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Case {
 public:
  explicit Case(std::map<std::string, std::string> parameters)
      : parameters_(std::move(parameters)) {}

  std::string text(const std::string& key) {
    const auto found = parameters_.find(key);
    if (found == parameters_.end()) throw BadArguments("missing " + key + "=");
    used_.insert(key);
    return found->second;
  }
  int64_t integer(const std::string& key) { return number<int64_t>(key); }
  int64_t integer(const std::string& key, int64_t otherwise) {
    return parameters_.contains(key) ? integer(key) : otherwise;
  }
  double real(const std::string& key) { return number<double>(key); }

  // The next `count` elements of standard input. `offset` elements lie before the first: 1 makes it
  // unaligned for vector loads. No memory is allocated past the last, for the address sanitizer.
  template <class T>
  const T* input(int64_t count, int64_t offset = 0) {
    T* data = allocate<T>(count, offset);
    if (count > 0 && std::fread(data, sizeof(T) * count, 1, stdin) != 1) {
      throw BadArguments("standard input ended early");
    }
    return data;
  }

  // Memory for the kernel alone, filled with NaN.
  template <class T>
  T* scratch(int64_t count) {
    return allocate<T>(count, 0);
  }

  // Filled with NaN, and sent to standard output after the case, in the order of these calls.
  template <class T>
  T* output(int64_t count, int64_t offset = 0) {
    T* data = allocate<T>(count, offset);
    outputs_.push_back({data, count * sizeof(T)});
    return data;
  }

  void check_all_used() const {
    for (const auto& [key, value] : parameters_) {
      if (!used_.contains(key)) throw BadArguments("unknown " + key + "=");
    }
  }
  void write_outputs() const {
    for (const auto& [data, bytes] : outputs_) {
      if (bytes > 0) std::fwrite(data, bytes, 1, stdout);
    }
  }

 private:
  template <class Number>
  Number number(const std::string& key) {
    const std::string value = text(key);
    Number result{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
    if (error != std::errc{} || end != value.data() + value.size()) {
      throw BadArguments(key + "=" + value + " is not a number");
    }
    return result;
  }

  template <class T>
  T* allocate(int64_t count, int64_t offset) {
    if (count < 0 || offset < 0) throw BadArguments("a size is negative");
    auto& memory = memory_.emplace_back((count + offset) * sizeof(T), std::byte{0xff});
    return reinterpret_cast<T*>(memory.data()) + offset;
  }

  struct Output {
    const void* data;
    size_t bytes;
  };
  std::map<std::string, std::string> parameters_;
  std::set<std::string> used_;
  std::list<std::vector<std::byte>> memory_;
  std::vector<Output> outputs_;
};

template <class T>
constexpr const char* kName = nullptr;
template <>
constexpr const char* kName<fastdni::bfloat16> = "bfloat16";
template <>
constexpr const char* kName<float> = "float32";
template <>
constexpr const char* kName<double> = "float64";

// Calls run(T{}) for the one of these dtypes that has the name. Planted faults are compiled for
// float64 alone, which is met with the same instructions.
template <class... Ts, class Run>
void for_dtype(const std::string& dtype, const Run& run) {
  bool found = false;
  const auto try_one = [&](auto zero) {
    using T = decltype(zero);
#ifdef SIMT_FLOAT64_ALONE
    if constexpr (std::is_same_v<T, double>)
#endif
      if (dtype == kName<T>) {
        found = true;
        run(zero);
      }
  };
  (try_one(Ts{}), ...);
  if (!found) throw BadArguments("unknown dtype=" + dtype);
}

using CaseFunction = void (*)(Case&);

inline std::map<std::string, CaseFunction>& cases() {
  static std::map<std::string, CaseFunction> all;
  return all;
}

struct Register {
  Register(const char* kernel, CaseFunction function) { cases()[kernel] = function; }
};

}  // namespace simt
