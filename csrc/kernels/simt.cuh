// What device code uses beyond plain CUDA C++: checked pointers, 16-byte vectors, cp.async,
// ldmatrix, mma.sync and the launch. The same kernel source compiles with nvcc and, with
// DBP_EMULATE defined, with the host compiler: csrc/emulation/ then stands in for everything below
// and for the CUDA built-ins (threadIdx, __syncthreads, __shfl_*_sync, __syncwarp...).
//
// Rules that make a kernel run in both worlds:
//   - pointers to global memory are Global<T>, to shared memory Shared<T> (plain pointers on the
//     device, bounds-checked ones under emulation); write `T v = p[i];`, never `auto v = p[i];`
//   - shared memory is dynamic, cut up with shared_array; inline assembly lives here only
//   - warp-level functions are called by all 32 lanes; blocks are whole warps.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef DBP_EMULATE
#include "../emulation/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace dbp {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// fp32 is ieee (FFMA); tf32 is fp32 data multiplied by tensor cores with 10-bit mantissas.
enum class DType : int32_t { fp32 = 0, tf32 = 1, fp16 = 2, bf16 = 3 };

__host__ __device__ constexpr int size_of(DType t) {
  return t == DType::fp32 || t == DType::tf32 ? 4 : 2;
}

template <class T>
struct Type {
  using type = T;
};
// Host: f(Type<T>{}) with the C++ type of t (tf32 is stored as float); f returns cudaError_t.
template <class F>
cudaError_t with_dtype(DType t, F f) {
  switch (t) {
    case DType::fp32:
    case DType::tf32:
      return f(Type<float>{});
    case DType::fp16:
      return f(Type<fp16>{});
    case DType::bf16:
      return f(Type<bf16>{});
  }
  return cudaErrorInvalidValue;
}

constexpr int kWarp = 32;

template <class I, class J>
__host__ __device__ constexpr auto ceil_div(I a, J b) {
  return (a + b - 1) / b;
}

#ifndef DBP_EMULATE

// --- Memory ----------------------------------------------------------------------------------

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

// Global<const void> -> Global<const T> and the like.
template <class T, class U>
__host__ __device__ __forceinline__ Global<T> cast(U* p) {
  return static_cast<T*>(p);
}

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// `count` elements of the block's dynamic shared memory from `byte_offset`. Under emulation this
// pair of numbers is the array's bound.
template <class T>
__device__ __forceinline__ Shared<T> shared_array(uint32_t byte_offset, uint32_t count) {
  (void)count;
  return reinterpret_cast<T*>(dynamic_shared_memory + byte_offset);
}

// Where the dynamic shared memory begins in the hardware's shared window: 0 up to sm_89, but not on
// later targets.
__device__ __forceinline__ uint32_t shared_window() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// What ldmatrix, cp.async, shared_load and the like take: a byte offset in the block's dynamic
// shared memory.
template <class T>
__device__ __forceinline__ uint32_t shared_address(Shared<T> p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p)) - shared_window();
}

// T of 2, 4, 8 or 16 bytes at a shared address, which must be a multiple of its size.
template <class T>
__device__ __forceinline__ T shared_load(uint32_t address) {
  return *reinterpret_cast<const T*>(dynamic_shared_memory + address);
}
template <class T>
__device__ __forceinline__ void shared_store(uint32_t address, T value) {
  *reinterpret_cast<T*>(dynamic_shared_memory + address) = value;
}

// 16 bytes at a global address that is a multiple of 16.
template <class T>
__device__ __forceinline__ uint4 load16(Global<T> p) {
  return *reinterpret_cast<const uint4*>(p);
}
template <class T>
__device__ __forceinline__ void store16(Global<T> p, uint4 value) {
  *reinterpret_cast<uint4*>(p) = value;
}

// Host: whether load16 and store16 may be used from here on.
template <class T>
bool aligned16(T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// --- Conversions -----------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

// Two 16-bit elements in one word, `low` first in memory.
__device__ __forceinline__ uint32_t pack_pair(bf16 low, bf16 high) {
  return __bfloat16_as_ushort(low) | uint32_t{__bfloat16_as_ushort(high)} << 16;
}
__device__ __forceinline__ uint32_t pack_pair(fp16 low, fp16 high) {
  return __half_as_ushort(low) | uint32_t{__half_as_ushort(high)} << 16;
}

// The bits of x rounded to tf32 (nearest, ties away). mma.sync truncates operands not rounded
// before.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }

// --- cp.async --------------------------------------------------------------------------------

// Copies Bytes (4, 8 or 16) from global to shared memory behind the thread's back; both addresses
// are multiples of Bytes. Not valid: writes zeros and reads nothing. Done after the matching
// cp_async_wait, and only for the thread that issued it: others need a barrier as well.
template <int Bytes, class T>
__device__ __forceinline__ void cp_async(uint32_t destination, Global<const T> source, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const int read = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_window() + destination),
        "l"(source), "r"(read)
        : "memory");
  } else {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_window() + destination),
        "l"(source), "n"(Bytes), "r"(read)
        : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the newest `Pending` of this thread's groups are unfinished.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// --- Tensor cores ----------------------------------------------------------------------------

// Loads 8x8 matrices of 16-bit elements; lane 8m + r holds the address of row r (16 bytes) of
// matrix m. Lane l receives row l/4, columns 2(l%4) and +1 of each matrix; transposed: of its
// transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window() + address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window() + address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window() + address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window() + address)
               : "memory");
}

// C += A B on one warp, fp32 accumulators. T = bf16, fp16: m16n8k16; T = float: m16n8k8 in tf32.
// Fragments as in the PTX manual, with g = lane / 4 and q = lane % 4:
//   16-bit  a: (g, 2q..) (g+8, 2q..) (g, 2q+8..) (g+8, 2q+8..)    b: (2q.., g) (2q+8.., g)
//   tf32    a: (g, q) (g+8, q) (g, q+4) (g+8, q+4)                b: (q, g) (q+4, g)
//   c: (g, 2q) (g, 2q+1) (g+8, 2q) (g+8, 2q+1)
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define DBP_MMA(T, SHAPE, A, B)                                                         \
  template <>                                                                           \
  __device__ __forceinline__ void mma<T>(float (&c)[4], const uint32_t (&a)[4],         \
                                         const uint32_t (&b)[2]) {                      \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." A "." B                      \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
DBP_MMA(bf16, "m16n8k16", "bf16", "bf16")
DBP_MMA(fp16, "m16n8k16", "f16", "f16")
DBP_MMA(float, "m16n8k8", "tf32", "tf32")
#undef DBP_MMA

// --- Launch ----------------------------------------------------------------------------------

// Launches kernel(params) after checking the device's limits. Never synchronises. What it returns
// is not left behind as the runtime's last error.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u ||
      block.x * block.y * block.z > 1024u)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess && shared_bytes > static_cast<size_t>(limit))
      return cudaErrorInvalidConfiguration;
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetLastError(), error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

#endif  // DBP_EMULATE

// N consecutive floats, one (N = 1) or 16 bytes (N = 4) per access.
template <int N>
__device__ __forceinline__ void load_floats(float (&value)[N], Global<const float> p) {
  static_assert(N == 1 || N == 4);
  if constexpr (N == 1) {
    value[0] = p[0];
  } else {
    const uint4 bits = load16(p);
    value[0] = bits_float(bits.x), value[1] = bits_float(bits.y);
    value[2] = bits_float(bits.z), value[3] = bits_float(bits.w);
  }
}
template <int N>
__device__ __forceinline__ void store_floats(Global<float> p, const float (&value)[N]) {
  static_assert(N == 1 || N == 4);
  if constexpr (N == 1) {
    p[0] = value[0];
  } else {
    store16(p, make_uint4(float_bits(value[0]), float_bits(value[1]), float_bits(value[2]),
                          float_bits(value[3])));
  }
}

}  // namespace dbp
