// What this library was built for, and whether a device can run it.
#include "../lib/device.h"
#include "launch.h"

#define DBP_TEXT_(x) #x
#define DBP_TEXT(x) DBP_TEXT_(x)

namespace {

using namespace dbp_torch;

// Python finds this text in the file without loading it: "used" keeps it in one piece.
__attribute__((used)) const char kBuild[] = "dbp_cuda build: nvcc " DBP_TEXT(
    __CUDACC_VER_MAJOR__) "." DBP_TEXT(__CUDACC_VER_MINOR__) ", targets " DBP_TARGETS;

std::string build() { return kBuild; }

// "12.2" of 12020
std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// The oldest Linux driver that runs machine code of this major version of CUDA ("minor version
// compatibility"); PTX needs one as new as the compiler.
constexpr const char* kDriver = CUDART_VERSION / 1000 == 12   ? "driver 525 or later"
                                : CUDART_VERSION / 1000 == 13 ? "driver 580 or later"
                                                              : "a newer driver";

std::string driver_text() {
  int driver = 0;  // without a driver
  cudaDriverGetVersion(&driver);
  return driver ? "the driver supports CUDA " + version(driver) : "there is no NVIDIA driver";
}

// Why the kernels cannot run on this device, "" if they can.
std::string device_problem(int64_t device) {
  const auto number = static_cast<int>(device);
  const cudaError_t error = dbp::device_supported(number);
  switch (error) {
    case cudaSuccess:
      return "";
    case cudaErrorInsufficientDriver:
      return driver_text() + ", the library was built by CUDA " + version(CUDART_VERSION) +
             " and needs " + kDriver;
    case cudaErrorUnsupportedPtxVersion:
      return driver_text() + ", for this GPU the library has only PTX of CUDA " +
             version(CUDART_VERSION);
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return no_code(number, kAnyTarget);
    default:
      return cudaGetErrorString(error);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbp_cuda, m) {
  m.def("build() -> str");
  m.def("device_problem(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dbp_cuda, CompositeExplicitAutograd, m) {
  m.impl("build", TORCH_BOX(&build));
  m.impl("device_problem", TORCH_BOX(&device_problem));
}
