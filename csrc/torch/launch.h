// From torch's tensors to a kernel launch: device guard, current stream, errors as exceptions.
//
// LibTorch stable ABI only, and nothing that a CPU-only torch lacks: the library can then be
// loaded, and its checks tested, without CUDA.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../kernels/arguments.cuh"
#include "../kernels/simt.cuh"

namespace dbp_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Unlike STD_TORCH_CHECK's, the message does not begin with the place in the source.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << name_of(t.scalar_type()) << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

// The stream torch currently uses on this device. The function is in libtorch_cuda, which a
// CPU-only torch does not have: looked up in the library that is already loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  require(function != nullptr, "dbp: this PyTorch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// A kernel's tensors by name. The first is there; later ones may be absent.
using Tensors = std::initializer_list<std::pair<const char*, const std::optional<Tensor>>>;

// The library's targets, as the build names them.
constexpr const char* kTargets = DBP_TARGETS;
constexpr const char* kAnyTarget = "that of one of the library's targets";

// "cuda:0 has compute capability 8.0, expected ..." for a device that a kernel has no code for.
inline std::string no_code(int32_t device, const char* expected) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  std::ostringstream text;
  text << "cuda:" << device << " has compute capability " << major << "." << minor << ", expected "
       << expected << "; the library was built for " << kTargets;
  return text.str();
}

// Calls run(stream), which returns a cudaError_t, with the device of `tensors` current. Throws if
// they are not on one CUDA device or the launch fails, naming the kernel and the tensors.
// `capability`: of the devices that the kernel has code for.
template <class Run>
void launch(const char* kernel, Tensors tensors, Run&& run, const char* capability = kAnyTarget) {
  const int32_t device = tensors.begin()->second->get_device_index();
  for (const auto& [name, tensor] : tensors) {
    if (!tensor) continue;
    require(tensor->is_cuda(), "dbp: ", kernel, ": ", name, " is not a CUDA tensor");
    require(tensor->get_device_index() == device, "dbp: ", kernel, ": ", name,
            " is on another device than ", tensors.begin()->first);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  // This library has its own copy of the CUDA runtime, which must agree with torch's.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = run(current_stream(device));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not again by the next launch
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    require(false, "dbp: ", kernel, " has no code for this GPU: ", no_code(device, capability));
  std::ostringstream arguments;
  for (const auto& [name, tensor] : tensors) {
    if (tensor) arguments << " " << name << " " << describe(*tensor);
  }
  require(false, "dbp: ", kernel, " failed: ", cudaGetErrorString(error),
          error == cudaErrorInvalidConfiguration
              ? " (more shared memory or more blocks than this GPU takes):"
              : ":",
          arguments.str());
}

// --- Arguments: tensors and integers to the fields of a kernel's parameters
// ------------------------

// What a kernel's `<name>_problem` found.
inline void require_none(const char* kernel, const dbp::Problem& problem) {
  require(!problem.found, "dbp: ", kernel, ": ", problem.argument, " is ", problem.value,
          ", expected ", problem.expected);
}

// The sizes that a kernel's `<name>_sizes` gives.
template <size_t N>
void require_sizes(const char* kernel, const std::array<dbp::ArraySize, N>& sizes,
                   Tensors tensors) {
  for (const dbp::ArraySize& size : sizes)
    for (const auto& [name, tensor] : tensors)
      if (std::string_view(name) == size.name)
        require(
            tensor->numel() == size.elements || (!size.exact && tensor->numel() > size.elements),
            "dbp: ", kernel, ": ", name, " is ", describe(*tensor), ", expected ",
            size.exact ? "" : "at least ", size.elements, " elements");
}

struct Dimension {
  int64_t size, stride;
};

// Elements from an array's first to its last; the largest number if that is exceeded.
inline int64_t extent(const std::vector<Dimension>& dimensions) {
  int64_t total = 1;
  for (const auto& [size, stride] : dimensions) {
    if (size == 0) return 0;
    if (size == 1) continue;  // of any stride
    if (__builtin_add_overflow(total, dbp::elements({size - 1, stride}), &total))
      return std::numeric_limits<int64_t>::max();
  }
  return total;
}

// That what a kernel takes for these dimensions lies within the tensor.
inline void require_extent(const char* kernel, const char* name, const Tensor& t,
                           const std::vector<Dimension>& dimensions) {
  std::vector<Dimension> own;
  for (int64_t d = 0; d < t.dim(); ++d) own.push_back({t.size(d), t.stride(d)});
  const int64_t there = extent(own), wanted = extent(dimensions);
  require(wanted <= there, "dbp: ", kernel, ": ", name, " is ", describe(t), " over ", there,
          " elements of memory, expected at least ", wanted);
}

inline int32_t int32(const char* kernel, const char* name, int64_t value) {
  require(
      value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(),
      "dbp: ", kernel, ": ", name, " is ", value, ", expected a 32-bit integer");
  return static_cast<int32_t>(value);
}

template <class T, size_t N>
void fill(const char* kernel, const char* name, const std::vector<int64_t>& values, T (&field)[N]) {
  require(values.size() == N, "dbp: ", kernel, ": ", name, " has ", values.size(),
          " entries, expected ", N);
  for (size_t i = 0; i < N; ++i) field[i] = static_cast<T>(values[i]);
}

template <class T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<std::remove_const_t<T>, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<std::remove_const_t<T>, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<std::remove_const_t<T>, int64_t>) return ScalarType::Long;
}

// The data of a contiguous tensor of this type with at least `least` elements.
template <class T>
T* data(const char* kernel, const char* name, const Tensor& t, int64_t least = 0) {
  const ScalarType expected = scalar_type<T>();
  require(t.scalar_type() == expected && t.is_contiguous() && t.numel() >= least, "dbp: ", kernel,
          ": ", name, " is ", describe(t), ", expected a contiguous ", name_of(expected),
          " tensor of at least ", least, " elements");
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(t.const_data_ptr());
  } else {
    return static_cast<T*>(t.mutable_data_ptr());
  }
}

inline void require_aligned(const char* kernel, const char* name, const Tensor& t) {
  require(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, "dbp: ", kernel, ": ", name,
          " does not begin at a multiple of 16 bytes");
}

// A kernel's element type, which the tensor must have.
inline dbp::DType dtype(const char* kernel, const char* name, const Tensor& t, int64_t value) {
  const auto wanted = static_cast<dbp::DType>(value);
  ScalarType expected = ScalarType::Float;
  if (wanted == dbp::DType::fp16) expected = ScalarType::Half;
  if (wanted == dbp::DType::bf16) expected = ScalarType::BFloat16;
  require(value >= 0 && value <= 3 && t.scalar_type() == expected, "dbp: ", kernel, ": ", name,
          " is ", describe(t), ", which does not go with dtype number ", value);
  return wanted;
}

}  // namespace dbp_torch
