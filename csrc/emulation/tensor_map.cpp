// Tensor maps and the copies they describe.
#include "../kernels/sm90.cuh"

namespace dbp {

// The limits that cuTensorMapEncodeTiled checks.
cudaError_t make_tensor_map(TensorMap& map, DType dtype, Global<const void> base, int rank,
                            const int64_t* size, const int64_t* stride_bytes, const int32_t* box,
                            Swizzle swizzle) {
  const int element = size_of(dtype), width = static_cast<int>(swizzle);
  if (rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(base.raw) % 16)
    return cudaErrorInvalidValue;
  const int64_t row = int64_t{box[0]} * element;
  if (row % 16 || (width && row > width)) return cudaErrorInvalidValue;
  map = TensorMap{};
  std::memcpy(map.magic, "dbpTmap", 8);
  map.base = reinterpret_cast<uint64_t>(base.raw);
  for (int d = 0; d < rank; ++d) {
    if (size[d] < 1 || size[d] > int64_t{1} << 32 || box[d] < 1 || box[d] > 256)
      return cudaErrorInvalidValue;
    map.size[d] = size[d];
    map.box[d] = box[d];
    if (d + 1 == rank) continue;
    if (stride_bytes[d] % 16 || stride_bytes[d] < 0 || stride_bytes[d] >= int64_t{1} << 40)
      return cudaErrorInvalidValue;
    map.stride_bytes[d] = stride_bytes[d];
  }
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(element);
  map.swizzle = static_cast<uint8_t>(width);
  return cudaSuccess;
}

namespace emulation {

void tma_load(uint32_t destination, const TensorMap& map, uint32_t mbarrier, int rank,
              const int32_t* at) {
  if (std::memcmp(map.magic, "dbpTmap", 8) || map.rank != rank)
    machine.deadlock("tensor copy with a map that was not made, or of another rank");
  const uint32_t alignment = map.swizzle ? 8u * map.swizzle : 128u;
  if (destination % alignment)
    machine.misaligned("tensor copy to shared byte " + std::to_string(destination) +
                       ", not a multiple of " + std::to_string(alignment));
  const uint32_t row = static_cast<uint32_t>(map.box[0]) * map.element_bytes;
  uint32_t rows = 1;
  for (int d = 1; d < rank; ++d) rows *= static_cast<uint32_t>(map.box[d]);
  std::vector<unsigned char> data(size_t{row} * rows, 0);
  std::vector<uint32_t> chunks;
  const int64_t low = at[0] < 0 ? 0 : at[0];
  const int64_t high = min<int64_t>(int64_t{at[0]} + map.box[0], map.size[0]);
  for (uint32_t r = 0; r < rows; ++r) {
    const auto* source = reinterpret_cast<const unsigned char*>(map.base);
    bool inside = low < high;
    uint32_t rest = r;
    for (int d = 1; d < rank; ++d) {
      const auto size = static_cast<uint32_t>(map.box[d]);
      const int64_t i = int64_t{at[d]} + rest % size;
      rest /= size;
      inside &= i >= 0 && i < map.size[d];
      source += i * map.stride_bytes[d - 1];
    }
    if (inside) {
      const auto bytes = static_cast<size_t>((high - low) * map.element_bytes);
      machine.global_read(source + low * map.element_bytes, bytes, map.element_bytes);
      std::memcpy(data.data() + size_t{row} * r + (low - at[0]) * map.element_bytes,
                  source + low * map.element_bytes, bytes);
    }
  }
  for (uint32_t chunk = destination; chunk < destination + row * rows; chunk += 16)
    chunks.push_back(map.swizzle ? chunk ^ (chunk >> 7 & (map.swizzle / 16u - 1)) << 4 : chunk);
  machine.tensor_copy(mbarrier, std::move(chunks), std::move(data));
}

}  // namespace emulation
}  // namespace dbp
