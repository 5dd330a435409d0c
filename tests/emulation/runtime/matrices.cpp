// Fragments of matrices in the registers of a warp, as the PTX ISA draws them.
//
// Sums are made in float32, in the order of k. Tensor cores add several products at once and
// truncate: the last bits differ.
#include <cstring>

#include "collectives.hpp"

namespace lstm_cuda::emulation {

namespace {

float as_float(std::uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

float from_bf16(std::uint32_t v) { return as_float(v << 16); }

// The bits in float32's places, whose exponents begin 112 lower; those of infinity and NaN are all
// ones in both.
float from_fp16(std::uint32_t v) {
  const std::uint32_t sign = (v & 0x8000) << 16, magnitude = (v & 0x7FFF) << 13;
  if (magnitude >= 0x0F800000) return as_float(sign | magnitude | 0x7F800000);
  return as_float(sign | magnitude) * 0x1p112f;
}

float from_tf32(std::uint32_t bits) { return as_float(bits & 0xFFFFE000u); }  // ten bits count

struct Operands {
  float* d;
  const std::uint32_t *a, *b;
};
const Operands& operands(void* argument) { return *static_cast<Operands*>(argument); }

// d += a b, where a and b are whole. Of d, lane 4g + q holds columns 2q and 2q + 1 of rows g and g
// + 8.
template <int K>
void multiply(const float (&a)[16][K], const float (&b)[K][8], void* const* arguments) {
  for (unsigned row = 0; row < 16; ++row) {
    const auto sum = [&](unsigned n) -> float& {
      return operands(arguments[row % 8 * 4 + n / 2]).d[row / 8 * 2 + n % 2];
    };
    float sums[8];
    for (unsigned n = 0; n < 8; ++n) sums[n] = sum(n);
    for (int k = 0; k < K; ++k)
      for (unsigned n = 0; n < 8; ++n) sums[n] += a[row][k] * b[k][n];
    for (unsigned n = 0; n < 8; ++n) sum(n) = sums[n];
  }
}

// m16n8k16. Register r of a holds rows g + 8 (r odd), columns 2q, 2q + 1, + 8 from the third
// register on; of b rows 2q, 2q + 1, + 8 in the second, of column g.
template <float (*convert)(std::uint32_t)>
void run_mma16(void* const* arguments, unsigned) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Operands& o = operands(arguments[lane]);
    const unsigned g = lane / 4, q = lane % 4;
    for (unsigned r = 0; r < 4; ++r)
      for (unsigned half = 0; half < 2; ++half)
        a[g + r % 2 * 8][2 * q + half + r / 2 * 8] = convert(o.a[r] >> 16 * half & 0xFFFF);
    for (unsigned r = 0; r < 2; ++r)
      for (unsigned half = 0; half < 2; ++half)
        b[2 * q + half + r * 8][g] = convert(o.b[r] >> 16 * half & 0xFFFF);
  }
  multiply(a, b, arguments);
}

// m16n8k8. The same with one element in a register: columns q, q + 4 of a, rows q, q + 4 of b.
void run_mma_tf32(void* const* arguments, unsigned) {
  float a[16][8], b[8][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Operands& o = operands(arguments[lane]);
    const unsigned g = lane / 4, q = lane % 4;
    for (unsigned r = 0; r < 4; ++r) a[g + r % 2 * 8][q + r / 2 * 4] = from_tf32(o.a[r]);
    for (unsigned r = 0; r < 2; ++r) b[q + r * 4][g] = from_tf32(o.b[r]);
  }
  multiply(a, b, arguments);
}

struct Rows {
  std::uint32_t* r;
  const std::uint16_t* row;
  unsigned count;
  bool transpose;
};
const Rows& rows(void* argument) { return *static_cast<Rows*>(argument); }

// Lanes 8i..8i+7 give the rows of matrix i, of which lane 4g + q gets elements 2q, 2q + 1 of row g
// (of column g if transposed).
void run_ldmatrix(void* const* arguments, unsigned) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Rows& mine = rows(arguments[lane]);
    const unsigned g = lane / 4, q = lane % 4;
    for (unsigned i = 0; i < mine.count; ++i) {
      const auto element = [&](unsigned row, unsigned column) -> std::uint32_t {
        return rows(arguments[8 * i + row]).row[column];
      };
      mine.r[i] = mine.transpose ? element(2 * q, g) | element(2 * q + 1, g) << 16
                                 : element(g, 2 * q) | element(g, 2 * q + 1) << 16;
    }
  }
}

}  // namespace

void ldmatrix(std::uint32_t* r, unsigned count, const void* row, bool transpose, Site at) {
  Rows mine{r, static_cast<const std::uint16_t*>(row), count, transpose};
  if (current->thread % kLanes < 8 * count) {  // other lanes' addresses are not used
    if (reinterpret_cast<std::uintptr_t>(row) % 16)
      fail(at, "ldmatrix: a row is not aligned to 16 bytes");
    if (!self()->home->holds(row, 16)) fail(at, "ldmatrix: a row is not in shared memory");
    touch(row, 16, Access::read, LSTM_CALLER, "ldmatrix", at);
  }
  collective("ldmatrix", run_ldmatrix, &mine, ~0u, at);
}

void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site at) {
  Operands mine{d, a, b};
  collective("mma_bf16", run_mma16<from_bf16>, &mine, ~0u, at);
}

void mma_fp16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site at) {
  Operands mine{d, a, b};
  collective("mma_fp16", run_mma16<from_fp16>, &mine, ~0u, at);
}

void mma_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b, Site at) {
  Operands mine{d, a, b};
  collective("mma_tf32", run_mma_tf32, &mine, ~0u, at);
}

}  // namespace lstm_cuda::emulation
