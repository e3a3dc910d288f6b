// The emulated half of csrc/kernels/sm90.cuh: the same names, every effect through the machine.
#pragma once

#include "simt.h"

namespace dbp {

enum class Swizzle : int32_t;
enum class DType : int32_t;

// In the place of a CUtensorMap, of its size. The first bytes tell what it is to whoever reads a
// recorded parameter struct.
struct alignas(128) TensorMap {
  char magic[8];
  uint64_t base;
  int64_t size[5];
  int64_t stride_bytes[4];
  int32_t box[5];
  uint8_t rank, element_bytes, swizzle;
};
static_assert(sizeof(TensorMap) == 128);

cudaError_t make_tensor_map(TensorMap& map, DType dtype, emulation::GlobalPointer<const void> base,
                            int rank, const int64_t* size, const int64_t* stride_bytes,
                            const int32_t* box, Swizzle swizzle);

#define DBP_SM90_THREADS(threads) threads
template <class Params>
cudaError_t check_sm90_code(void (*)(Params), int) {
  return emulation::machine.capability() == 90 ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

namespace emulation {
void tma_load(uint32_t destination, const TensorMap& map, uint32_t mbarrier, int rank,
              const int32_t* at);
inline void wgmma(WgmmaArgument argument) {
  machine.warp(WarpOp::wgmma, &argument, [](Machine& m, void* const* lanes) {
    m.wgmma(reinterpret_cast<const WgmmaArgument* const*>(lanes));
  });
}
}  // namespace emulation

template <int Rank>
void tma_load(uint32_t destination, const TensorMap& map, uint32_t mbarrier,
              const int32_t (&at)[Rank]) {
  emulation::tma_load(destination, map, mbarrier, Rank, at);
}

inline void mbarrier_init(uint32_t mbarrier, uint32_t count) {
  emulation::machine.mbarrier_init(mbarrier, count);
}
inline void mbarrier_arrive(uint32_t mbarrier) { emulation::machine.mbarrier_arrive(mbarrier, 0); }
inline void mbarrier_expect(uint32_t mbarrier, uint32_t bytes) {
  emulation::machine.mbarrier_arrive(mbarrier, bytes);
}
inline void mbarrier_wait(uint32_t mbarrier, uint32_t parity, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  if (!emulation::machine.skips(file, line)) emulation::machine.mbarrier_wait(mbarrier, parity);
}
inline void fence_async_proxy(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::machine.skips(file, line)) emulation::machine.fence_async_proxy();
}
inline void named_barrier(int id, int threads, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  if (!emulation::machine.skips(file, line)) emulation::machine.named_barrier(id, threads);
}

template <int Registers>
void registers_decrease() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}
template <int Registers>
void registers_increase() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}

inline void wgmma_fence() { emulation::machine.wgmma_fence(); }
inline void wgmma_commit() { emulation::machine.wgmma_commit(); }
template <int Pending>
void wgmma_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::machine.skips(file, line)) emulation::machine.wgmma_wait(Pending);
}
template <int N>
void wgmma_pin(float (&)[N]) {}

template <class T, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 32 || N == 64 || N == 128);
  constexpr bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(is_bf16 || std::is_same_v<T, __half>);
  emulation::wgmma({is_bf16 ? 'b' : 'h', N, d, a, b, nullptr});
}
template <class T, int N>
void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  constexpr bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(N == 64 && (is_bf16 || std::is_same_v<T, __half>));
  emulation::wgmma({is_bf16 ? 'b' : 'h', N, d, 0, b, a});
}

}  // namespace dbp
