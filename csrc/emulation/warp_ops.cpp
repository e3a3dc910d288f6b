// ldmatrix, mma.sync and the 16-bit conversions, as the PTX manual defines them.
#include "simt.h"

namespace dbp::emulation {

namespace {

struct LdmatrixArgument {
  uint32_t* r;
  uint32_t address;
  int count;
  bool transposed;
};

// Shared memory serves the 8 rows of a matrix in one cycle if they lie in 8 different 16-byte bank
// groups; every further row in a group costs a cycle. Equal addresses are one access.
int extra_cycles(const uint32_t* rows) {
  int worst = 1;
  for (int i = 0; i < 8; ++i) {
    int same = 1;
    for (int j = 0; j < i; ++j) {
      if (rows[j] == rows[i]) {
        same = 0;
        break;
      }
      same += rows[j] / 16 % 8 == rows[i] / 16 % 8;
    }
    if (same > worst) worst = same;
  }
  return worst - 1;
}

void load_matrices(Machine& m, void* const* lanes) {
  const auto& first = *static_cast<LdmatrixArgument*>(lanes[0]);
  for (int i = 0; i < first.count; ++i) {
    uint32_t rows[8];
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      rows[row] = static_cast<LdmatrixArgument*>(lanes[8 * i + row])->address;
      std::memcpy(matrix[row], m.shared_read(rows[row], 16, 0, UINT32_MAX), 16);
    }
    m.count().ldmatrix_phases++;
    m.count().ldmatrix_conflicts += extra_cycles(rows);
    for (int lane = 0; lane < 32; ++lane) {
      const auto& mine = *static_cast<LdmatrixArgument*>(lanes[lane]);
      if (mine.count != first.count || mine.transposed != first.transposed)
        m.deadlock("lanes of the warp call different forms of ldmatrix");
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = lane / 4, column = 2 * (lane % 4) + j;
        pair[j] = first.transposed ? matrix[column][row] : matrix[row][column];
      }
      std::memcpy(&mine.r[i], pair, 4);
    }
  }
}

struct MmaArgument {
  char kind;
  float* c;
  const uint32_t *a, *b;
};

float element(char kind, uint32_t word, int half) {
  if (kind == 't') return __uint_as_float(word & ~0x1fffu);  // the hardware ignores the low bits
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return kind == 'b' ? bf16_to_float(bits) : fp16_to_float(bits);
}

// Exact products, one sum in double, one rounding. Hardware may differ in the last bits.
void multiply(Machine& m, void* const* lanes) {
  m.count().mma++;
  const char kind = static_cast<MmaArgument*>(lanes[0])->kind;
  const int per_word = kind == 't' ? 1 : 2, depth = 8 * per_word;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaArgument*>(lanes[lane]);
    if (mine.kind != kind) m.deadlock("lanes of the warp call different forms of mma");
    const int g = lane / 4, q = lane % 4;
    for (int h = 0; h < per_word; ++h) {
      const int k = q * per_word + h, further = 4 * per_word;
      a[g][k] = element(kind, mine.a[0], h);
      a[g + 8][k] = element(kind, mine.a[1], h);
      a[g][k + further] = element(kind, mine.a[2], h);
      a[g + 8][k + further] = element(kind, mine.a[3], h);
      b[k][g] = element(kind, mine.b[0], h);
      b[k + further][g] = element(kind, mine.b[1], h);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<MmaArgument*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = c[i];
      for (int k = 0; k < depth; ++k) sum += double{a[row][k]} * double{b[k][column]};
      c[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void ldmatrix(uint32_t* r, uint32_t address, int count, bool transposed) {
  LdmatrixArgument argument{r, address, count, transposed};
  machine.warp(WarpOp::ldmatrix, &argument, load_matrices);
}

void mma(char kind, float* c, const uint32_t* a, const uint32_t* b) {
  MmaArgument argument{kind, c, a, b};
  machine.warp(WarpOp::mma, &argument, multiply);
}

float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

uint16_t float_to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

float fp16_to_float(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

uint16_t float_to_fp16(float x) {
  const auto sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  if (std::isnan(x)) return 0x7fff;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds beyond the largest, 65504
  // Units of the last place at this magnitude; nearbyint rounds to nearest even.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(magnitude, -unit)), unit);
  if (rounded < 0x1p-14f) return sign | static_cast<uint16_t>(std::ldexp(rounded, 24));
  std::frexp(rounded, &exponent);
  const auto mantissa = static_cast<uint16_t>(std::ldexp(rounded, 11 - exponent)) - 1024;
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | mantissa);
}

}  // namespace dbp::emulation
