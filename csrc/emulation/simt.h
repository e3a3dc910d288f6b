// The emulated half of csrc/kernels/simt.cuh: the same names, every effect through the machine.
#pragma once

#include <type_traits>

#include "cuda_types.h"
#include "machine.h"

#define threadIdx (::dbp::emulation::machine.thread_index())
#define blockIdx (::dbp::emulation::machine.block_index())
#define blockDim (::dbp::emulation::machine.block_size())
#define gridDim (::dbp::emulation::machine.grid_size())

namespace dbp {
namespace emulation {

// What p[i] and *p are: reads check and load, assignments check and store. Not convertible from an
// lvalue, so that `auto v = p[i]`, a value on the device but a reference here, does not compile on.
template <class Pointer>
class Reference {
  using T = std::remove_const_t<typename Pointer::element>;

 public:
  explicit Reference(Pointer p) : p_(p) {}
  operator T() const&& { return p_.read(); }
  const Reference& operator=(T v) const&& { return p_.write(v), *this; }
  const Reference& operator=(const Reference& other) const&& {
    return p_.write(other.p_.read()), *this;
  }
  void operator+=(T v) const&& { p_.write(p_.read() + v); }
  void operator-=(T v) const&& { p_.write(p_.read() - v); }
  void operator*=(T v) const&& { p_.write(p_.read() * v); }

 private:
  Pointer p_;
};

// 8 bytes and nothing else, so that a struct of parameters has the device's layout.
template <class T>
struct GlobalPointer {
  using element = T;
  T* raw;

  GlobalPointer() = default;
  GlobalPointer(std::nullptr_t) : raw(nullptr) {}
  explicit GlobalPointer(T* raw) : raw(raw) {}
  template <class U, class = std::enable_if_t<std::is_convertible_v<U*, T*>>>
  GlobalPointer(GlobalPointer<U> other) : raw(other.raw) {}

  explicit operator bool() const { return raw != nullptr; }
  bool operator==(GlobalPointer other) const { return raw == other.raw; }
  bool operator!=(GlobalPointer other) const { return raw != other.raw; }
  GlobalPointer operator+(int64_t i) const { return GlobalPointer(raw + i); }
  GlobalPointer operator-(int64_t i) const { return GlobalPointer(raw - i); }
  GlobalPointer& operator+=(int64_t i) { return raw += i, *this; }
  Reference<GlobalPointer> operator[](int64_t i) const {
    return Reference<GlobalPointer>(*this + i);
  }
  Reference<GlobalPointer> operator*() const { return Reference<GlobalPointer>(*this); }

  std::remove_const_t<T> read() const {
    machine.global_read(raw, sizeof(T), alignof(T));
    return *raw;
  }
  template <class V>  // a template only because T may be void
  void write(const V& v) const {
    machine.global_write(raw, sizeof(T), alignof(T));
    *raw = v;
  }
};

// An address in shared memory and the array [begin, end) it belongs to.
template <class T>
struct SharedPointer {
  using element = T;
  uint32_t address, begin, end;

  template <class U, class = std::enable_if_t<std::is_convertible_v<T*, U*>>>
  operator SharedPointer<U>() const {
    return {address, begin, end};
  }
  SharedPointer operator+(int64_t i) const {
    return {static_cast<uint32_t>(address + i * static_cast<int64_t>(sizeof(T))), begin, end};
  }
  SharedPointer operator-(int64_t i) const { return *this + -i; }
  SharedPointer& operator+=(int64_t i) { return *this = *this + i; }
  Reference<SharedPointer> operator[](int64_t i) const {
    return Reference<SharedPointer>(*this + i);
  }
  Reference<SharedPointer> operator*() const { return Reference<SharedPointer>(*this); }

  std::remove_const_t<T> read() const {
    std::remove_const_t<T> v;
    std::memcpy(&v, machine.shared_read(address, sizeof(T), begin, end), sizeof(T));
    return v;
  }
  void write(const T& v) const {
    std::memcpy(machine.shared_write(address, sizeof(T), begin, end), &v, sizeof(T));
  }
};

inline void check_full_mask(unsigned mask) {
  if (mask != 0xffffffffu)
    machine.deadlock("a warp-level operation needs all 32 lanes in its mask");
}

// Every lane gives a value and the lane it wants to hear from.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  struct Argument {
    T value, result;
    int source;
  } argument{value, T{}, source};
  check_full_mask(mask);
  machine.warp(WarpOp::shuffle, &argument, [](Machine&, void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto& mine = *static_cast<Argument*>(lanes[i]);
      mine.result = static_cast<Argument*>(lanes[mine.source])->value;
    }
  });
  return argument.result;
}

void ldmatrix(uint32_t* r, uint32_t address, int count, bool transposed);
// kind: 'b' bf16, 'h' fp16 (m16n8k16) or 't' tf32 (m16n8k8)
void mma(char kind, float* c, const uint32_t* a, const uint32_t* b);

float bf16_to_float(uint16_t bits);
uint16_t float_to_bf16(float x);
float fp16_to_float(uint16_t bits);
uint16_t float_to_fp16(float x);

}  // namespace emulation
}  // namespace dbp

// --- CUDA built-ins --------------------------------------------------------------------------

// The default arguments are the caller's place.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!dbp::emulation::machine.skips(file, line)) dbp::emulation::machine.barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  dbp::emulation::check_full_mask(mask);
  if (!dbp::emulation::machine.skips(file, line)) dbp::emulation::machine.warp_barrier();
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return dbp::emulation::shuffle(mask, value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return dbp::emulation::shuffle(mask, value, (dbp::emulation::machine.lane() ^ lane_mask) & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = dbp::emulation::machine.lane();
  const int source = lane + static_cast<int>(delta);
  return dbp::emulation::shuffle(mask, value, source < 32 ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int lane = dbp::emulation::machine.lane();
  const int source = lane - static_cast<int>(delta);
  return dbp::emulation::shuffle(mask, value, source >= 0 ? source : lane);
}
template <class T>
T __ldg(dbp::emulation::GlobalPointer<T> p) {
  return *p;
}

// --- The wrappers of simt.cuh; see there for what each one means -----------------------------

namespace dbp {

template <class T>
using Global = emulation::GlobalPointer<T>;
template <class T>
using Shared = emulation::SharedPointer<T>;

template <class T, class U>
Global<T> cast(emulation::GlobalPointer<U> p) {
  return Global<T>(static_cast<T*>(p.raw));
}

template <class T>
Shared<T> shared_array(uint32_t byte_offset, uint32_t count) {
  return {byte_offset, byte_offset, byte_offset + count * static_cast<uint32_t>(sizeof(T))};
}

inline uint32_t shared_window() { return 0; }
template <class T>
uint32_t shared_address(emulation::SharedPointer<T> p) {
  return p.address;
}

template <class T>
T shared_load(uint32_t address) {
  return emulation::SharedPointer<T>{address, 0, UINT32_MAX}.read();
}
template <class T>
void shared_store(uint32_t address, T value) {
  emulation::SharedPointer<T>{address, 0, UINT32_MAX}.write(value);
}

template <class T>
uint4 load16(emulation::GlobalPointer<T> p) {
  return emulation::GlobalPointer<const uint4>(reinterpret_cast<const uint4*>(p.raw)).read();
}
template <class T>
void store16(emulation::GlobalPointer<T> p, uint4 value) {
  emulation::GlobalPointer<uint4>(reinterpret_cast<uint4*>(p.raw)).write(value);
}

template <class T>
bool aligned16(emulation::GlobalPointer<T> p) {
  return reinterpret_cast<uintptr_t>(p.raw) % 16 == 0;
}

inline float to_float(float x) { return x; }
inline float to_float(__nv_bfloat16 x) { return emulation::bf16_to_float(x.bits); }
inline float to_float(__half x) { return emulation::fp16_to_float(x.bits); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return {emulation::float_to_bf16(x)};
}
template <>
inline __half from_float<__half>(float x) {
  return {emulation::float_to_fp16(x)};
}

inline uint32_t pack_pair(__nv_bfloat16 low, __nv_bfloat16 high) {
  return low.bits | uint32_t{high.bits} << 16;
}
inline uint32_t pack_pair(__half low, __half high) { return low.bits | uint32_t{high.bits} << 16; }
inline uint32_t float_bits(float x) { return __float_as_uint(x); }
inline float bits_float(uint32_t x) { return __uint_as_float(x); }
// Adding half a unit to the magnitude rounds to nearest, ties away; infinities and NaN stay.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

template <int Bytes, class T>
void cp_async(uint32_t destination, emulation::GlobalPointer<T> source, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulation::machine.cp_async(destination, source.raw, Bytes, valid);
}
inline void cp_async_commit() { emulation::machine.cp_async_commit(); }
template <int Pending>
void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::machine.skips(file, line)) emulation::machine.cp_async_wait(Pending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  emulation::ldmatrix(r, address, 4, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  emulation::ldmatrix(r, address, 4, true);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  emulation::ldmatrix(r, address, 2, false);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
  emulation::ldmatrix(r, address, 2, true);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool is_bf16 = std::is_same_v<T, __nv_bfloat16>, is_fp16 = std::is_same_v<T, __half>;
  static_assert(is_bf16 || is_fp16 || std::is_same_v<T, float>);
  emulation::mma(is_bf16 ? 'b' : is_fp16 ? 'h' : 't', c, a, b);
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>);
  return emulation::machine.launch("kernel", reinterpret_cast<const void*>(kernel), grid, block,
                                   shared_bytes, &params, sizeof(Params),
                                   [kernel, params] { kernel(params); });
}

}  // namespace dbp
