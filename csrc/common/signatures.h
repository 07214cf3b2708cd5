// "name(Tensor, Tensor?, int) -> Tensor", derived from a kernel's C++ type.
//
// Across the stable ABI arguments travel as untyped 64-bit words, so a kernel whose C++ parameters differ from its
// schema does not fail, it reads a pointer as a number. A test holds these lines against the schemas.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace lfm_fast {

template <typename T>
struct SchemaType;  // no definition: a type without a schema word does not compile

template <>
struct SchemaType<torch::stable::Tensor> {
  static std::string name() { return "Tensor"; }
};
template <>
struct SchemaType<int64_t> {
  static std::string name() { return "int"; }
};
template <>
struct SchemaType<double> {
  static std::string name() { return "float"; }
};
template <>
struct SchemaType<void> {
  static std::string name() { return "()"; }
};
template <>
struct SchemaType<bool> {
  static std::string name() { return "bool"; }
};
template <typename T>
struct SchemaType<std::optional<T>> {
  static std::string name() { return SchemaType<T>::name().append("?"); }
};
template <typename T>
struct SchemaType<std::vector<T>> {
  static std::string name() { return SchemaType<T>::name().append("[]"); }
};
template <typename... T>
struct SchemaType<std::tuple<T...>> {
  static std::string name() {
    std::string text;
    ((text.append(text.empty() ? "(" : ", "), text.append(SchemaType<T>::name())), ...);
    return text.append(")");
  }
};

template <typename Result, typename... Arguments>
std::string signature(const char* name, Result (*)(Arguments...)) {
  using Parameters = std::tuple<std::remove_cv_t<std::remove_reference_t<Arguments>>...>;
  std::string text(name);
  return text.append(SchemaType<Parameters>::name()).append(" -> ").append(SchemaType<Result>::name());
}

// One line per registered kernel of this library.
std::string& signature_lines();

struct SignatureLine {
  explicit SignatureLine(const std::string& line) { signature_lines().append(line).append("\n"); }
};

}  // namespace lfm_fast
