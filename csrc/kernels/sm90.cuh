// What sm_90a has beyond simt.cuh: mbarriers, tensor copies (TMA), wgmma and register hand-over
// between warpgroups. As in simt.cuh, csrc/emulation/ stands in for all of it on a CPU.
//
// One stage of a producer/consumer pipeline:
//   producer, one thread:  mbarrier_wait(empty, parity); mbarrier_expect(full, bytes);
//                          tma_load(stage, map, full, {x, y...});
//   consumer warpgroup:    mbarrier_wait(full, parity); wgmma_fence(); wgmma(...)...;
//                          wgmma_commit(); wgmma_wait<0>(); lane 0 of every warp:
//                          mbarrier_arrive(empty);
// An mbarrier's phases are numbered from 0; waiting for parity p returns when the phase of that
// parity is complete, so the first wait for an empty stage (nothing to wait for) is with parity 1.
// The kernel's parameters are `const __grid_constant__ Params p`: tensor maps are read in place.
#pragma once

#include "arguments.cuh"
#include "simt.cuh"

#ifdef DBP_EMULATE
#include "../emulation/sm90.h"
#else
#include <cuda.h>
#endif

namespace dbp {

// Rows of a staged tile are 32, 64 or 128 bytes, and 16-byte units of row r are permuted by an xor
// with r, so that neither copies nor wgmma meet bank conflicts. Tiles begin at multiples of 1024.
enum class Swizzle : int32_t { none = 0, bytes32 = 32, bytes64 = 64, bytes128 = 128 };

// The 64-bit descriptor of a wgmma operand in shared memory whose rows run along M or N (one row
// per pixel of channels-last data). `next_columns`: bytes from one swizzled row's width of columns
// to the next; `next_rows`: from 8 rows to the next 8 (8 times the row's bytes if rows are dense).
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t next_columns,
                                                     uint32_t next_rows, Swizzle swizzle) {
  const uint64_t code = swizzle == Swizzle::bytes128  ? 1
                        : swizzle == Swizzle::bytes64 ? 2
                        : swizzle == Swizzle::bytes32 ? 3
                                                      : 0;
  return uint64_t{((shared_window() + address) & 0x3ffffu) >> 4} |
         uint64_t{(next_columns & 0x3ffffu) >> 4} << 16 |
         uint64_t{(next_rows & 0x3ffffu) >> 4} << 32 | code << 62;
}

inline Problem sm90_dtype_problem(DType dtype) {
  return {dtype != DType::bf16 && dtype != DType::fp16, "dtype", static_cast<int64_t>(dtype),
          "2 or 3: float16 or bfloat16"};
}

#ifndef DBP_EMULATE

// In code for other targets these functions trap, which would take the context with it. There a
// kernel also has launch bounds that its blocks pass: not even the driver lets it start.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DBP_SM90(...) asm volatile(__VA_ARGS__)
#else
#define DBP_SM90(...) __trap()
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DBP_SM90_THREADS(threads) 32
#else
#define DBP_SM90_THREADS(threads) threads
#endif

// Host. Whether the current device has sm_90a code of a kernel for blocks of so many threads: that
// of another capability has not, nor any if the library was built for plain sm_90.
template <class Params>
cudaError_t check_sm90_code(void (*kernel)(Params), int threads) {
  thread_local int last_device = -1;  // where the kernel last asked for was found
  thread_local void (*last_kernel)(Params) = nullptr;
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device == last_device && kernel == last_kernel) return cudaSuccess;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  if (major != 9 || minor != 0) return cudaErrorNoKernelImageForDevice;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return cudaGetLastError(), error;
  if (attributes.maxThreadsPerBlock < threads) return cudaErrorNoKernelImageForDevice;
  last_device = device, last_kernel = kernel;
  return cudaSuccess;
}

// --- Tensor maps -----------------------------------------------------------------------------

struct alignas(128) TensorMap {  // CUtensorMap's own alignment differs between CUDA versions
  CUtensorMap map;
};

// Host. A map of a tensor of `rank` (1 to 5) dimensions, the contiguous one first; stride_bytes[d]
// is that of dimension d + 1, a multiple of 16 as is the base. A copy moves a box; what lies
// outside the tensor reads as zero.
inline cudaError_t make_tensor_map(TensorMap& map, DType dtype, const void* base, int rank,
                                   const int64_t* size, const int64_t* stride_bytes,
                                   const int32_t* box, Swizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t sizes[5], strides[4];
  cuuint32_t boxes[5], steps[5] = {1, 1, 1, 1, 1};
  for (int d = 0; d < rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(size[d]);
    boxes[d] = static_cast<cuuint32_t>(box[d]);
    if (d + 1 < rank) strides[d] = static_cast<cuuint64_t>(stride_bytes[d]);
  }
  const auto type = dtype == DType::bf16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                    : dtype == DType::fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const auto mode = swizzle == Swizzle::bytes128  ? CU_TENSOR_MAP_SWIZZLE_128B
                    : swizzle == Swizzle::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
                    : swizzle == Swizzle::bytes32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result = reinterpret_cast<Encode>(function)(
      &map.map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(base), sizes, strides, boxes,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Copies the box at `at` (contiguous dimension first) to shared memory; its bytes count towards the
// current phase of `mbarrier`. Called by one thread.
template <int Rank>
__device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap& map,
                                         uint32_t mbarrier, const int32_t (&at)[Rank]) {
  static_assert(Rank >= 1 && Rank <= 5);
#define DBP_TMA(RANK, COORDINATES, ...)                                                     \
  DBP_SM90("cp.async.bulk.tensor." RANK                                                     \
           "d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" COORDINATES \
           "}], [%2];" ::"r"(shared_window() + destination),                                \
           "l"(&map), "r"(shared_window() + mbarrier), __VA_ARGS__ : "memory")
  if constexpr (Rank == 1) {
    DBP_TMA("1", "%3", "r"(at[0]));
  } else if constexpr (Rank == 2) {
    DBP_TMA("2", "%3, %4", "r"(at[0]), "r"(at[1]));
  } else if constexpr (Rank == 3) {
    DBP_TMA("3", "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  } else if constexpr (Rank == 4) {
    DBP_TMA("4", "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  } else {
    DBP_TMA("5", "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
  }
#undef DBP_TMA
}

// --- mbarriers: 8 bytes of shared memory each ------------------------------------------------

// By one thread; then __syncthreads before anyone uses it. A phase ends after `count` arrivals and
// the bytes they expect.
__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, uint32_t count) {
  DBP_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_window() + mbarrier),
           "r"(count) : "memory");
  DBP_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  DBP_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_window() + mbarrier) : "memory");
}
// Arrives, and adds `bytes` of tensor copies to what the phase waits for.
__device__ __forceinline__ void mbarrier_expect(uint32_t mbarrier, uint32_t bytes) {
  DBP_SM90(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_window() + mbarrier),
      "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
  DBP_SM90(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_window() + mbarrier),
      "r"(parity) : "memory");
}

// Makes this thread's ordinary writes to shared memory visible to wgmma and TMA; a barrier with
// their users must follow.
__device__ __forceinline__ void fence_async_proxy() {
  DBP_SM90("fence.proxy.async.shared::cta;" :: : "memory");
}

// --- Warpgroups ------------------------------------------------------------------------------

// A barrier among `threads` threads (whole warps) that use the same id, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers per thread from here on, for a whole warpgroup: a multiple of 8, 24 to 256. In sum they
// may not exceed what the kernel was compiled for.
template <int Registers>
__device__ __forceinline__ void registers_decrease() {
  DBP_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_increase() {
  DBP_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// --- wgmma: 128 threads, D (64 x N) += A (64 x 16) B (16 x N) --------------------------------

// Before the first wgmma of a group, and after changing accumulators.
__device__ __forceinline__ void wgmma_fence() {
  DBP_SM90("wgmma.fence.sync.aligned;" :: : "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  DBP_SM90("wgmma.commit_group.sync.aligned;" :: : "memory");
}
// Until at most the newest `Pending` groups are unfinished. Only then may their accumulators be
// used and their operands be overwritten.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  DBP_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving other uses of accumulators across the wait before it.
template <int N>
__device__ __forceinline__ void wgmma_pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// T = bf16 or fp16, both operands with rows along M and N ("MN-major", see wgmma_descriptor); d[]
// has N / 2 elements: of warp w, lane 4g + q, d[4i + r] is (16w + g + 8 (r / 2), 8i + 2q + r % 2).
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b);

// The same with A in registers: each warp's 16 rows, as the left operand of mma in simt.cuh. They
// must not change before the wait.
template <class T, int N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4],
                                                uint64_t b);

#define DBP_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define DBP_D16(i) DBP_D8(i), DBP_D8(i + 8)
#define DBP_D32(i) DBP_D16(i), DBP_D16(i + 16)
#define DBP_D64(i) DBP_D32(i), DBP_D32(i + 32)
#define DBP_N16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DBP_N32 \
  DBP_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DBP_N64                                                                      \
  DBP_N32                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DBP_WGMMA(T, NAME, N, REGISTERS, NUMBERS, A, B)                                           \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma<T, N>(float (&d)[N / 2], uint64_t a, uint64_t b) {        \
    DBP_SM90("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" NUMBERS "}, " A \
             ", " B ", 1, 1, 1, 1, 1;" : REGISTERS : "l"(a),                                      \
             "l"(b));                                                                             \
  }
DBP_WGMMA(bf16, "bf16", 32, DBP_D16(0), DBP_N16, "%16", "%17")
DBP_WGMMA(bf16, "bf16", 64, DBP_D32(0), DBP_N32, "%32", "%33")
DBP_WGMMA(bf16, "bf16", 128, DBP_D64(0), DBP_N64, "%64", "%65")
DBP_WGMMA(fp16, "f16", 32, DBP_D16(0), DBP_N16, "%16", "%17")
DBP_WGMMA(fp16, "f16", 64, DBP_D32(0), DBP_N32, "%32", "%33")
DBP_WGMMA(fp16, "f16", 128, DBP_D64(0), DBP_N64, "%64", "%65")
#undef DBP_WGMMA
#define DBP_WGMMA_REGISTERS(T, NAME)                                                             \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma_registers<T, 64>(float (&d)[32], const uint32_t (&a)[4], \
                                                         uint64_t b) {                           \
    DBP_SM90("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" DBP_N32            \
             "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" : DBP_D32(0) : "r"(a[0]),               \
             "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
  }
DBP_WGMMA_REGISTERS(bf16, "bf16")
DBP_WGMMA_REGISTERS(fp16, "f16")
#undef DBP_WGMMA_REGISTERS
#undef DBP_N64
#undef DBP_N32
#undef DBP_N16
#undef DBP_D64
#undef DBP_D32
#undef DBP_D16
#undef DBP_D8
#undef DBP_SM90

#endif  // DBP_EMULATE

}  // namespace dbp
