// From torch's tensors to a kernel launch: device guard, current stream, errors as exceptions.
//
// LibTorch stable ABI only, and nothing that a CPU-only torch lacks: the library can then be loaded,
// and its checks tested, without CUDA.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <string>
#include <utility>

namespace dbp_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << name_of(t.scalar_type()) << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

// The stream torch currently uses on this device. The function is in libtorch_cuda, which a CPU-only
// torch does not have: looked up in the library that is already loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function != nullptr, "dbp: this PyTorch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls run(stream), which returns a cudaError_t, with the device of `tensors` current. Throws if
// they are not on one CUDA device or the launch fails, naming the kernel and the tensors.
template <class Run>
void launch(const char* kernel, std::initializer_list<std::pair<const char*, const Tensor&>> tensors,
            Run&& run) {
  const Tensor& first = tensors.begin()->second;
  for (const auto& [name, tensor] : tensors) {
    STD_TORCH_CHECK(tensor.is_cuda(), "dbp: ", kernel, ": ", name, " is not a CUDA tensor");
    STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index(), "dbp: ", kernel, ": ",
                    name, " is on another device than ", tensors.begin()->first);
  }
  const int32_t device = first.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  // This library has its own copy of the CUDA runtime, which must agree with torch's.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = run(current_stream(device));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not again by the next launch
  std::ostringstream arguments;
  for (const auto& [name, tensor] : tensors) {
    arguments << (&tensor == &first ? "" : ", ") << name << " " << describe(tensor);
  }
  STD_TORCH_CHECK(false, "dbp: ", kernel, " failed: ", cudaGetErrorString(error), " (",
                  arguments.str(), ")");
}

inline void check_dtype(const char* kernel, const char* name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, "dbp: ", kernel, ": ", name, " is ", describe(t),
                  ", expected ", name_of(expected));
}

inline void check_contiguous(const char* kernel, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "dbp: ", kernel, ": ", name, " is not contiguous");
}

inline void check_numel(const char* kernel, const char* name, const Tensor& t, int64_t least) {
  STD_TORCH_CHECK(t.numel() >= least, "dbp: ", kernel, ": ", name, " has ", t.numel(),
                  " elements, expected at least ", least);
}

}  // namespace dbp_torch
