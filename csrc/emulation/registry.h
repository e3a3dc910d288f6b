// How kernels become callable from Python: a name, and a function from arguments to a launch.
//
//   static dbp::emulation::Register pack("pack", [](dbp::emulation::Arguments& a) {
//     dbp::PackParams p{};
//     a("x", p.x)("out", p.out)("n", p.n);
//     return dbp::launch_pack(p, nullptr);
//   });
#pragma once

#include <functional>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "../kernels/arguments.cuh"
#include "../kernels/simt.cuh"

namespace dbp::emulation {

// A numpy array; `format` is its dtype: "float32", "float16", "uint16" (also stands for bf16)...
struct HostArray {
  void* data;
  size_t bytes;
  int64_t elements;
  std::string format;
};
using Value = std::variant<std::nullptr_t, int64_t, double, std::vector<int64_t>, HostArray>;

template <class T>
bool format_fits(const std::string& format) {
  using U = std::remove_const_t<T>;
  if constexpr (std::is_void_v<U>) return true;
  if constexpr (std::is_same_v<U, float>) return format == "float32";
  if constexpr (std::is_same_v<U, double>) return format == "float64";
  if constexpr (std::is_same_v<U, fp16>) return format == "float16";
  if constexpr (std::is_same_v<U, bf16>) return format == "uint16";
  if constexpr (std::is_same_v<U, int32_t>) return format == "int32";
  if constexpr (std::is_same_v<U, int64_t>) return format == "int64";
  return false;
}

// The keyword arguments of a call from Python, each to be taken exactly once.
class Arguments {
 public:
  explicit Arguments(std::map<std::string, Value> values) : values_(std::move(values)) {}

  // Integers (range-checked), enums and floats.
  template <class T>
  std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>, Arguments&> operator()(
      const char* name, T& out) {
    const Value value = take(name);
    if constexpr (std::is_floating_point_v<T>) {
      if (auto* i = std::get_if<int64_t>(&value)) return out = static_cast<T>(*i), *this;
      if (auto* d = std::get_if<double>(&value)) return out = static_cast<T>(*d), *this;
      throw std::invalid_argument(std::string(name) + ": expected a number");
    } else {
      auto* i = std::get_if<int64_t>(&value);
      if (!i) throw std::invalid_argument(std::string(name) + ": expected an integer");
      out = static_cast<T>(*i);
      if (static_cast<int64_t>(out) != *i)
        throw std::invalid_argument(std::string(name) + ": does not fit its C++ type");
      return *this;
    }
  }

  // Arrays of integers in a struct.
  template <class T, size_t N>
  Arguments& operator()(const char* name, T (&out)[N]) {
    const Value value = take(name);
    auto* list = std::get_if<std::vector<int64_t>>(&value);
    if (!list || list->size() != N)
      throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(N) +
                                  " integers");
    for (size_t i = 0; i < N; ++i) out[i] = static_cast<T>((*list)[i]);
    return *this;
  }

  // Pointers: an array (copied to the device, and back after the launch), None, or an address.
  template <class T>
  Arguments& operator()(const char* name, Global<T>& out) {
    const Value value = take(name);
    out = nullptr;
    if (std::holds_alternative<std::nullptr_t>(value)) return *this;
    if (auto* address = std::get_if<int64_t>(&value)) {
      out.raw = reinterpret_cast<T*>(*address);
      return *this;
    }
    auto* array = std::get_if<HostArray>(&value);
    if (!array || !format_fits<T>(array->format))
      throw std::invalid_argument(std::string(name) + ": expected an array of another dtype" +
                                  (array ? ", not " + array->format : ""));
    elements_[name] = array->elements;
    void* device = machine.allocate(name, array->data, array->bytes);
    out.raw = static_cast<T*>(device);
    if constexpr (!std::is_const_v<T>) copies_.push_back({array->data, device, array->bytes});
    return *this;
  }

  // Refuses arrays of other sizes than the kernel's; of an address the size is not known.
  template <size_t N>
  Arguments& operator()(const std::array<ArraySize, N>& sizes) {
    for (const ArraySize& size : sizes) {
      const auto found = elements_.find(size.name);
      if (found == elements_.end()) continue;
      if (found->second < size.elements || (size.exact && found->second > size.elements))
        throw std::invalid_argument(std::string(size.name) + ": expected " +
                                    std::to_string(size.elements) + " elements, not " +
                                    std::to_string(found->second));
    }
    return *this;
  }

  // After the launch: results go back, and nothing may be left over.
  void finish() const {
    for (const auto& copy : copies_) std::memcpy(copy.host, copy.device, copy.bytes);
  }
  void check_all_taken() const {
    for (const auto& [name, value] : values_)
      throw std::invalid_argument(name + ": the kernel has no such argument");
  }

 private:
  struct Copy {
    void *host, *device;
    size_t bytes;
  };

  Value take(const char* name) {
    auto found = values_.find(name);
    if (found == values_.end()) throw std::invalid_argument(std::string(name) + ": missing");
    Value value = std::move(found->second);
    values_.erase(found);
    return value;
  }

  std::map<std::string, Value> values_;
  std::map<std::string, int64_t> elements_;
  std::vector<Copy> copies_;
};

using Launcher = std::function<cudaError_t(Arguments&)>;
std::map<std::string, Launcher>& registry();

struct Register {
  Register(const char* name, Launcher launcher) { registry()[name] = std::move(launcher); }
};

}  // namespace dbp::emulation
