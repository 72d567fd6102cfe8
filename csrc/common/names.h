// What the names that Python passes stand for. An unknown one raises, in Python a ValueError; none
// becomes a default.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/network.h"

namespace fastdni {

template <class Value>
Value named(const std::string& caller, const char* argument, const std::string& name,
            std::initializer_list<std::pair<const char*, Value>> known) {
  std::string names;
  for (const auto& [text, value] : known) {
    if (name == text) return value;
    names += (names.empty() ? "\"" : ", \"") + std::string(text) + "\"";
  }
  throw std::invalid_argument(caller + ": " + argument + " must be one of " + names + ", got \"" +
                              name + "\"");
}

inline Precision precision_named(const std::string& caller, const std::string& name) {
  return named<Precision>(caller, "precision", name,
                          {{"exact", Precision::exact},
                           {"tf32", Precision::tf32},
                           {"tf32x3", Precision::tf32x3},
                           {"bfloat16", Precision::bfloat16}});
}

inline Activation activation_named(const std::string& caller, const std::string& name) {
  return named<Activation>(caller, "activation", name,
                           {{"identity", Activation::identity},
                            {"relu", Activation::relu},
                            {"tanh", Activation::tanh},
                            {"sigmoid", Activation::sigmoid}});
}

inline Criterion criterion_named(const std::string& caller, const std::string& name) {
  return named<Criterion>(caller, "criterion", name,
                          {{"none", Criterion::none},
                           {"cross_entropy", Criterion::cross_entropy},
                           {"mse", Criterion::mse}});
}

}  // namespace fastdni
