// Converts float32 matrices to scaled float16 and scales products back (csrc/cuda/scaled_product.h), and
// compares every value with arithmetic that shares nothing with the kernels.
//   scaled_product ORDER SEED ROUNDS
#include "cuda/scaled_product.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "half.hpp"
#include "memory.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b; }

struct Random {
  std::mt19937 bits;

  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  double uniform() { return std::uniform_real_distribution<double>(-1, 1)(bits); }
  float wide() { return float(std::ldexp(uniform(), int(below(240)) - 120)); }
};

template <class... Arguments>
std::string text(const char* format, Arguments... arguments) {
  char all[256];
  std::snprintf(all, sizeof all, format, arguments...);
  return all;
}

// A matrix in memory, between whose rows there is NaN.
struct Source {
  int64_t rows, columns, inner, outer_stride, inner_stride, first;
  std::vector<float> memory;
  std::unique_ptr<emulation::DeviceBuffer<float>> buffer;

  Source(int64_t rows_, int64_t columns_, Random& random) : rows(rows_), columns(columns_) {
    inner = random.below(2) ? rows : 1 + random.below(rows);
    inner = rows % inner ? rows : inner;
    // Rows begin at multiples of 16 bytes; or some of them.
    const bool aligned = random.below(2);
    const auto gap = [&](int64_t n) {
      return aligned || random.below(2) ? (n + 3) / 4 * 4 : n + random.below(3);
    };
    inner_stride = gap(columns);
    outer_stride = gap(inner * inner_stride);
    if (random.below(2)) {  // batch first
      outer_stride = gap(columns);
      inner_stride = gap(rows / inner * outer_stride);
    }
    first = aligned || random.below(2) ? 4 * random.below(2) : random.below(4);
    memory.assign(size_t(place(rows / inner - 1, inner - 1) + columns), kNan);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column)
        at(row, column) = float(random.uniform());
  }

  int64_t place(int64_t outer, int64_t in) const {
    return first + outer * outer_stride + in * inner_stride;
  }
  float& at(int64_t row, int64_t column) {
    return memory[size_t(place(row / inner, row % inner) + column)];
  }

  // Lines of one kind and lines that mix all kinds, along rows or along columns.
  void spoil(bool by_rows, Random& random) {
    const int64_t lines = by_rows ? rows : columns, length = by_rows ? columns : rows;
    const auto element = [&](int64_t line, int64_t k) -> float& {
      return by_rows ? at(line, k) : at(k, line);
    };
    for (int64_t line = 0; line < lines; ++line) {
      const float size = float(std::ldexp(1, int(random.below(250)) - 140));
      const int64_t kind = random.below(9);
      for (int64_t k = 0; k < length; ++k) {
        float& v = element(line, k);
        if (kind <= 2) v *= size;
        if (kind == 3) v = random.wide();
        if (kind == 4) v = random.below(2) ? 1e30f * v : 1e-30f * v;
        if (kind == 5) v = float(std::ldexp(double(random.below(9) - 4), -149));
        if (kind == 6) v = 0;
      }
      if (kind == 7) element(line, random.below(length)) = 3e38f;
      if (kind == 8) element(line, random.below(length)) = -float(std::ldexp(1, -112));
    }
    const float special[] = {float(kInfinity), -float(kInfinity), kNan, -0.f, 0x1p15f, 0x1.ffcp14f};
    for (float v : special) at(random.below(rows), random.below(columns)) = v;
    if (random.below(2))  // nothing finite
      for (int64_t k = 0; k < length; ++k)
        element(0, k) = random.below(2) ? kNan : float(kInfinity);
  }

  Matrix matrix() {
    buffer = std::make_unique<emulation::DeviceBuffer<float>>(memory);
    return {buffer->data() + first, rows, columns, inner, outer_stride, inner_stride};
  }
};

// Its conversion, by rows or by columns.
struct Conversion {
  Source source;
  bool by_rows;
  Matrix matrix;
  int64_t out_rows, out_columns;
  emulation::DeviceBuffer<uint16_t> to;
  emulation::DeviceBuffer<int> exponents;
  emulation::DeviceBuffer<unsigned> maxima;

  Conversion(Source given, bool by_rows_)
      : source(std::move(given)),
        by_rows(by_rows_),
        matrix(source.matrix()),
        out_rows(by_rows ? source.rows : padded(source.rows)),
        out_columns(padded(source.columns)),
        to(size_t(out_rows * out_columns)),
        exponents(size_t(by_rows ? source.rows : source.columns)),
        maxima(size_t(by_rows ? 1 : column_maxima(matrix))) {}

  ScaledOperand operand() const {
    return {matrix, to.data(), exponents.data(), by_rows ? nullptr : maxima.data()};
  }

  // What is wrong, or nothing.
  std::string compare() {
    const std::vector<uint16_t> bits = to.values();
    const std::vector<int> found = exponents.values();
    for (int64_t line = 0; line < int64_t(found.size()); ++line) {
      double largest = 0;
      for (int64_t k = 0; k < (by_rows ? source.columns : source.rows); ++k) {
        const double v = std::fabs(by_rows ? source.at(line, k) : source.at(k, line));
        if (std::isfinite(v)) largest = std::max(largest, v);
      }
      const int wanted = largest == 0 ? 0 : std::clamp(14 - std::ilogb(largest), -126, 126);
      if (found[size_t(line)] != wanted)
        return text("line %d: exponent %d, not %d", int(line), found[size_t(line)], wanted);
    }
    for (int64_t row = 0; row < out_rows; ++row)
      for (int64_t column = 0; column < out_columns; ++column) {
        double wanted = 0;
        if (row < source.rows && column < source.columns)
          wanted = round_to_half(
              std::ldexp(double(source.at(row, column)), found[size_t(by_rows ? row : column)]));
        const double value = from_half(bits[size_t(row * out_columns + column)]);
        if (!same(value, wanted))
          return text("[%d, %d]: %g, not %g", int(row), int(column), value, wanted);
      }
    return {};
  }
};

std::string convert(bool by_rows, Random& random) {
  const int64_t sizes[][2] = {{1, 1},    {1, 77},   {64, 1},  {7, 128},  {9, 129}, {8, 8},
                              {33, 260}, {200, 31}, {16, 64}, {150, 12}, {3, 7},   {700, 5}};
  std::vector<std::unique_ptr<Conversion>> all;
  std::vector<ScaledOperand> operands;
  const int64_t count = 1 + random.below(4);
  for (int64_t k = 0; k < count; ++k) {
    const auto& [rows, columns] = sizes[random.below(std::size(sizes))];
    Source source(rows, columns, random);
    if (random.below(8)) source.spoil(by_rows, random);
    all.push_back(std::make_unique<Conversion>(std::move(source), by_rows));
    operands.push_back(all.back()->operand());
  }
  const Status status = (by_rows ? scale_rows : scale_columns)(operands.data(), int(count), {});
  if (!status.ok()) return status.message;
  for (const auto& each : all) {
    const std::string wrong = each->compare();
    if (!wrong.empty())
      return text("by %s, [%d, %d] of %d, ", by_rows ? "rows" : "columns", int(each->source.rows),
                  int(each->source.columns), int(count)) +
             wrong;
  }
  return {};
}

std::string scale_back(Random& random) {
  const int64_t sizes[] = {1, 3, 4, 17, 64, 130, 1000};
  const int64_t batches = 1 + random.below(3), rows = sizes[random.below(6)],
                columns = sizes[random.below(7)];
  const auto exponents = [&](int64_t count) {
    std::vector<int> result;
    for (int64_t k = 0; k < count; ++k) result.push_back(int(random.below(253)) - 126);
    return result;
  };
  const std::vector<int> of_rows = exponents(batches * rows),
                         of_columns = exponents(batches * columns);
  std::vector<float> before(size_t(batches * rows * columns)), bias {};
  for (float& v : before) v = random.wide();
  before[0] = kNan;
  before.back() = float(kInfinity);
  const bool with_bias = random.below(2), side_by_side = random.below(2);
  for (int64_t k = 0; k < batches * columns; ++k) bias.push_back(random.wide());
  const emulation::DeviceBuffer<int> row_buffer(of_rows), column_buffer(of_columns);
  const emulation::DeviceBuffer<float> values(before), bias_buffer(bias);
  const Status status =
      unscale({values.data(), batches, rows, columns, row_buffer.data(), column_buffer.data(),
               with_bias ? bias_buffer.data() : nullptr, side_by_side},
              {});
  if (!status.ok()) return status.message;
  const std::vector<float> after = values.values();
  for (size_t k = 0; k < after.size(); ++k) {
    const size_t row = k / size_t(columns);
    const size_t batch = side_by_side ? row % size_t(batches) : row / size_t(rows);
    const size_t column = batch * size_t(columns) + k % size_t(columns);
    const float scaled = std::ldexp(before[k], -(of_rows[row] + of_columns[column]));
    const float wanted = with_bias ? scaled + bias[column] : scaled;
    // Below 2^-126 two steps may round twice.
    const bool near = std::fabs(scaled) < 0x1p-126f && std::fabs(after[k] - wanted) <= 0x1p-149f;
    if (!near && !same(after[k], wanted))
      return text("scaled back, %d x [%d, %d]: element %d is %g, not %g", int(batches), int(rows),
                  int(columns), int(k), double(after[k]), double(wanted));
  }
  return {};
}

// Products of 2^28 multiply-adds and 128 in each size are the least.
std::string choice() {
  const bool right =
      worth_scaling(1 << 14, 128, 128) && worth_scaling(128, 1 << 14, 128) &&
      worth_scaling(128, 128, 1 << 14) && worth_scaling(1 << 20, 1 << 20, 1 << 20) &&
      !worth_scaling((1 << 14) - 1, 128, 128) && !worth_scaling(1 << 20, 1 << 20, 127) &&
      !worth_scaling(1 << 20, 127, 1 << 20) && !worth_scaling(127, 1 << 20, 1 << 20) &&
      !worth_scaling(int64_t(1) << 31, 1 << 20, 1 << 20) && !worth_scaling(0, 0, 0) &&
      worth_scaling(1 << 12, 128, 128, 4) && !worth_scaling((1 << 12) - 1, 128, 128, 4) &&
      !worth_scaling(1 << 20, 1 << 20, 127, 4) && !worth_scaling(1 << 29, 128, 128, 4);
  return right ? "" : "the wrong products are scaled";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const std::string order = argv[1];
  auto& settings = emulation::settings();
  settings.seed = std::stoull(argv[2]);
  settings.order = order == "forward"   ? emulation::Order::forward
                   : order == "reverse" ? emulation::Order::reverse
                                        : emulation::Order::random;
  Random random{std::mt19937(unsigned(settings.seed))};
  int failed = 0;
  if (const std::string wrong = choice(); !wrong.empty())
    ++failed, std::printf("%s\n", wrong.c_str());
  for (int round = 0; round < std::stoi(argv[3]); ++round)
    for (const std::string& wrong :
         {convert(true, random), convert(false, random), scale_back(random)})
      if (!wrong.empty()) ++failed, std::printf("%s\n", wrong.c_str());
  return failed != 0;
}
