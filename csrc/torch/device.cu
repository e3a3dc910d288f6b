// What this library was built for, and whether a device can run it.
#include "../lib/device.h"
#include "launch.h"

#define DBP_TEXT_(x) #x
#define DBP_TEXT(x) DBP_TEXT_(x)

namespace {

// Python finds this text in the file without loading it: "used" keeps it in one piece.
__attribute__((used)) const char kBuild[] = "dbp_cuda build: nvcc " DBP_TEXT(
    __CUDACC_VER_MAJOR__) "." DBP_TEXT(__CUDACC_VER_MINOR__) ", targets " DBP_TARGETS;

std::string build() { return kBuild; }

// Why the kernels cannot run on this device, "" if they can.
std::string device_problem(int64_t device) {
  const cudaError_t error = dbp::device_supported(static_cast<int>(device));
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
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
