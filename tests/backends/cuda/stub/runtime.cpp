// A CUDA runtime without a device, linked in place of NVIDIA's: it says of its one device what the
// test wants, counts what would be launched, and fails where the real one would.
#include <cuda.h>
#include <cuda_runtime_api.h>

#define EXPORT __attribute__((visibility("default")))

namespace {

struct {
  int driver, major, minor, threads;  // threads: limit of the sm_90a kernels' blocks
  bool code;                          // whether the library has code for the device
} device;
int launches, looked_up;
cudaError_t last;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}
cudaError_t find_code() {
  return result(device.code ? cudaSuccess : cudaErrorNoKernelImageForDevice);
}
CUresult encode() { return CUDA_SUCCESS; }

}  // namespace

extern "C" {

EXPORT void stub_device(int driver, int major, int minor, int threads, int code) {
  device = {driver, major, minor, threads, code != 0};
  launches = looked_up = 0;
  last = cudaSuccess;
}
EXPORT int stub_launches() { return launches; }
EXPORT int stub_looked_up() { return looked_up; }
EXPORT int stub_last_error() { return last; }

cudaError_t cudaSetDevice(int number) {
  if (device.driver / 1000 < CUDART_VERSION / 1000) return result(cudaErrorInsufficientDriver);
  return result(number == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int* number) { return *number = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = device.driver, cudaSuccess; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  return last = cudaSuccess, error;
}
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? device.major
           : attribute == cudaDevAttrComputeCapabilityMinor ? device.minor
                                                            : 227 * 1024;  // of shared memory
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  ++looked_up;
  *attributes = {};
  attributes->maxThreadsPerBlock = device.threads;
  return find_code();
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return find_code(); }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* found) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, found);
}

// --- What nvcc makes of kernels and <<<>>>
static dim3 grid_, block_;
static size_t shared_;
static void* stream_;
void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return grid_ = grid, block_ = block, shared_ = shared, stream_ = stream, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = grid_, *block = block_, *shared = shared_;
  *static_cast<void**>(stream) = stream_;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return find_code();
}
cudaError_t __cudaLaunchKernel() { return ++launches, find_code(); }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return ++launches, find_code();
}

}  // extern "C"
