// The kernels behind scaled_product.h: bound by memory, so that what they do is read and write whole
// sectors. A lane has four neighbours in a row: 16 bytes where rows are aligned. What is read twice, for
// the scales and to be converted, comes from a cache the second time, if it fits.
#include "scaled_product.h"

#include <algorithm>
#include <climits>

#include "element.cuh"
#include "scale.cuh"

namespace lstm_cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kQuad = 4;                    // elements of a lane
constexpr int kTileColumns = 32 * kQuad;    // of a warp
constexpr int kMaxChunks = 64;              // into which rows are cut to find a column's maximum
constexpr int64_t kWantedBlocks = 1024;     // to keep a large device busy
constexpr int64_t kUnscaledInBlock = 8192;  // elements

template <class T>
struct alignas(kQuad * sizeof(T)) Quad {
  T v[kQuad];
};

struct Job {
  ScaledOperand operand;
  int chunks;            // of scale_columns
  bool aligned;          // every row begins at a multiple of 16 bytes
  unsigned first_block;  // of the grid
};

struct Jobs {
  Job of[kMaxScaledOperands];
  int count;

  // That of this block.
  LSTM_DEVICE const Job& mine() const {
    int i = count - 1;
    while (i > 0 && ptx::block_index() < of[i].first_block) --i;
    return of[i];
  }
};

LSTM_DEVICE unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

LSTM_DEVICE const float* row_of(const Matrix& m, int64_t row) {
  // 32 bits: the 64-bit division takes several times as long as reading four floats.
  const unsigned r = unsigned(row), inner = unsigned(m.inner);
  return m.from + r / inner * m.outer_stride + r % inner * m.inner_stride;
}

// Four elements of a row from `column` on; zeros past its end.
LSTM_DEVICE Quad<float> fetch(const Job& job, const float* row, int64_t column) {
  const int64_t left = job.operand.matrix.columns - column;
  if (job.aligned && left >= kQuad) return ptx::load<Quad<float>>(row + column);
  Quad<float> quad{};
  LSTM_UNROLL
  for (int i = 0; i < kQuad; ++i)
    if (i < left) quad.v[i] = row[column + i];
  return quad;
}

LSTM_DEVICE void put(const Job& job, int64_t row, int64_t column, const Quad<float>& quad,
                     const float (&scales)[kQuad]) {
  Quad<__half> scaled;
  LSTM_UNROLL
  for (int i = 0; i < kQuad; ++i) scaled.v[i] = __float2half_rn(quad.v[i] * scales[i]);
  ptx::store(
      static_cast<__half*>(job.operand.to) + row * padded(job.operand.matrix.columns) + column,
      scaled);
}

// A warp for each row.
LSTM_KERNEL(kThreads)
scale_rows_kernel(LSTM_PARAMETER Jobs p) {
  const Job& job = p.mine();
  const Matrix& m = job.operand.matrix;
  const int64_t row = int64_t(ptx::block_index() - job.first_block) * kWarps + warp();
  if (row >= m.rows) return;
  const float* const from = row_of(m, row);
  unsigned largest = 0;
  for (int64_t column = kQuad * lane(); column < m.columns; column += kTileColumns) {
    const Quad<float> quad = fetch(job, from, column);
    LSTM_UNROLL
    for (int i = 0; i < kQuad; ++i) largest = larger(largest, finite_size(quad.v[i]));
  }
  LSTM_UNROLL
  for (unsigned lanes = 1; lanes < 32; lanes *= 2)
    largest = larger(largest, ptx::shuffle_xor(largest, lanes));
  const int exponent = scale_exponent(largest);
  const float scale = power_of_two(exponent);
  for (int64_t column = kQuad * lane(); column < padded(m.columns); column += kTileColumns)
    put(job, row, column, fetch(job, from, column), {scale, scale, scale, scale});
  if (lane() == 0) job.operand.exponents[row] = exponent;
}

// What a block of the two kernels for columns has: all rows of a chunk, in 128 columns.
struct Tile {
  int chunk;
  int64_t column;      // of this lane, the first of four
  int64_t begin, end;  // rows, padding included

  LSTM_DEVICE explicit Tile(const Job& job) {
    const Matrix& m = job.operand.matrix;
    const int block = int(ptx::block_index() - job.first_block);
    const int64_t rows = (padded(m.rows) + job.chunks - 1) / job.chunks;
    chunk = block % job.chunks;
    column = int64_t(block / job.chunks) * kTileColumns + kQuad * lane();
    begin = chunk * rows;
    end = begin + rows < padded(m.rows) ? begin + rows : padded(m.rows);
  }
};

// The largest of what the warps of a block have for their columns, to all of them.
LSTM_DEVICE Quad<unsigned> over_warps(Quad<unsigned> own) {
  ptx::Shared shared;
  Quad<unsigned>* const all = shared.take<Quad<unsigned>>(kThreads);
  all[ptx::thread_index()] = own;
  ptx::block_sync();  // all warps' maxima are there before any is read
  LSTM_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const Quad<unsigned> other = all[32 * w + lane()];
    LSTM_UNROLL
    for (int i = 0; i < kQuad; ++i) own.v[i] = larger(own.v[i], other.v[i]);
  }
  return own;
}

// maxima[chunk, padded(columns)] = the largest finite_size of the chunk's rows.
LSTM_KERNEL(kThreads)
column_maxima_kernel(LSTM_PARAMETER Jobs p) {
  const Job& job = p.mine();
  const Matrix& m = job.operand.matrix;
  const Tile tile(job);
  const int64_t end = tile.end < m.rows ? tile.end : m.rows;
  Quad<unsigned> largest{};
  for (int64_t row = tile.begin + warp(); row < end; row += kWarps) {
    const Quad<float> quad = fetch(job, row_of(m, row), tile.column);
    LSTM_UNROLL
    for (int i = 0; i < kQuad; ++i) largest.v[i] = larger(largest.v[i], finite_size(quad.v[i]));
  }
  largest = over_warps(largest);
  if (warp() == 0 && tile.column < padded(m.columns))
    ptx::store(job.operand.maxima + tile.chunk * padded(m.columns) + tile.column, largest);
}

LSTM_KERNEL(kThreads)
scale_columns_kernel(LSTM_PARAMETER Jobs p) {
  const Job& job = p.mine();
  const Matrix& m = job.operand.matrix;
  const Tile tile(job);
  const bool used = tile.column < padded(m.columns);
  Quad<unsigned> largest{};
  for (int chunk = warp(); chunk < job.chunks; chunk += kWarps) {
    if (!used) continue;
    const auto other =
        ptx::load<Quad<unsigned>>(job.operand.maxima + chunk * padded(m.columns) + tile.column);
    LSTM_UNROLL
    for (int i = 0; i < kQuad; ++i) largest.v[i] = larger(largest.v[i], other.v[i]);
  }
  largest = over_warps(largest);
  if (!used) return;
  float scales[kQuad];
  LSTM_UNROLL
  for (int i = 0; i < kQuad; ++i) {
    const int exponent = scale_exponent(largest.v[i]);
    scales[i] = power_of_two(exponent);
    if (tile.chunk == 0 && warp() == 0 && tile.column + i < m.columns)
      job.operand.exponents[tile.column + i] = exponent;
  }
  for (int64_t row = tile.begin + warp(); row < tile.end; row += kWarps) {
    const Quad<float> quad = row < m.rows ? fetch(job, row_of(m, row), tile.column) : Quad<float>{};
    put(job, row, tile.column, quad, scales);
  }
}

struct Unscale {
  ScaledProduct product;
  unsigned rows_in_block;
};

template <class T, int width>
struct alignas(width * sizeof(T)) Piece {
  T v[width];
};

// width: elements of an access, which divides the columns.
template <int width>
LSTM_KERNEL(kThreads)
unscale_kernel(LSTM_PARAMETER Unscale p) {
  const ScaledProduct& product = p.product;
  const unsigned pieces = unsigned(product.columns / width);  // in a row
  const int64_t first = int64_t(ptx::block_index()) * p.rows_in_block;
  const int64_t left = product.batches * product.rows - first;
  const unsigned rows = left < p.rows_in_block ? unsigned(left) : p.rows_in_block;
  for (unsigned i = ptx::thread_index(); i < rows * pieces; i += kThreads) {
    const int64_t row = first + i / pieces, column = int64_t(i % pieces) * width;
    const int64_t batch = product.batches == 1   ? 0
                          : product.side_by_side ? row % product.batches
                                                 : row / product.rows;
    const int64_t of_batch = batch * product.columns + column;
    float* const at = product.values + row * product.columns + column;
    auto values = ptx::load<Piece<float, width>>(at);
    const auto exponents = ptx::load<Piece<int, width>>(product.column_exponents + of_batch);
    const int row_exponent = product.row_exponents[row];
    Piece<float, width> bias{};
    if (product.bias) bias = ptx::load<Piece<float, width>>(product.bias + of_batch);
    LSTM_UNROLL
    for (int k = 0; k < width; ++k) {
      // In two steps, of which neither leaves the range of floats unless both together do.
      const int exponent = -(row_exponent + exponents.v[k]), half = exponent / 2;
      values.v[k] = values.v[k] * power_of_two(half) * power_of_two(exponent - half) + bias.v[k];
    }
    ptx::store(at, values);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const Matrix& m) {
  const auto multiple = [](int64_t stride, int64_t rows) {
    return rows <= 1 || stride % kQuad == 0;
  };
  return reinterpret_cast<uintptr_t>(m.from) % (kQuad * sizeof(float)) == 0 &&
         multiple(m.inner_stride, std::min(m.inner, m.rows)) &&
         multiple(m.outer_stride, ceil_div(m.rows, m.inner));
}

int column_tiles(const Matrix& m) { return int(ceil_div(padded(m.columns), kTileColumns)); }

int chunks_of(const Matrix& m) {
  const int64_t wanted = ceil_div(kWantedBlocks, column_tiles(m));
  return int(std::clamp<int64_t>(std::min(wanted, m.rows / 64), 1, kMaxChunks));
}

// blocks(job): how many it has.
template <class Blocks>
Status jobs_of(const ScaledOperand* operands, int count, Blocks blocks, Jobs& jobs,
               unsigned& total) {
  jobs.count = count;
  total = 0;
  for (int i = 0; i < count; ++i) {
    const Matrix& m = operands[i].matrix;
    if (m.rows > INT_MAX - kScaledMultiple) {  // rows are counted in 32 bits
      Status status;
      std::snprintf(status.message, sizeof status.message, "a product of %lld rows",
                    static_cast<long long>(m.rows));
      return status;
    }
    jobs.of[i] = {operands[i], chunks_of(m), aligned(m), total};
    total += unsigned(blocks(jobs.of[i]));
  }
  return {};
}

}  // namespace

Status scale_rows(const ScaledOperand* operands, int count, Stream stream) {
  Jobs jobs{};
  unsigned blocks = 0;
  const Status status = jobs_of(
      operands, count, [](const Job& job) { return ceil_div(job.operand.matrix.rows, kWarps); },
      jobs, blocks);
  if (!status.ok()) return status;
  return launch<scale_rows_kernel>({"scale_rows", blocks, kThreads}, jobs, stream);
}

int64_t column_maxima(const Matrix& m) { return chunks_of(m) * padded(m.columns); }

Status scale_columns(const ScaledOperand* operands, int count, Stream stream) {
  Jobs jobs{};
  unsigned blocks = 0;
  Status status = jobs_of(
      operands, count, [](const Job& job) { return column_tiles(job.operand.matrix) * job.chunks; },
      jobs, blocks);
  if (!status.ok()) return status;
  constexpr std::size_t kShared = kThreads * sizeof(Quad<unsigned>);
  status = launch<column_maxima_kernel>({"column_maxima", blocks, kThreads, kShared}, jobs, stream);
  if (!status.ok()) return status;
  return launch<scale_columns_kernel>({"scale_columns", blocks, kThreads, kShared}, jobs, stream);
}

Status unscale(const ScaledProduct& product, Stream stream) {
  const int64_t rows = product.batches * product.rows;
  const int64_t in_block = std::clamp<int64_t>(kUnscaledInBlock / product.columns, 1, rows);
  const Unscale p{product, unsigned(in_block)};
  const LaunchShape shape{"unscale", unsigned(ceil_div(rows, in_block)), kThreads};
  return product.columns % kQuad == 0 ? launch<unscale_kernel<kQuad>>(shape, p, stream)
                                      : launch<unscale_kernel<1>>(shape, p, stream);
}

bool worth_scaling(int64_t rows, int64_t columns, int64_t depth, int64_t batches) {
#if defined(LSTM_EMULATE)
  if (emulation::scale_all_products) return rows > 0 && columns > 0 && depth > 0;
#endif
  constexpr int64_t kLeast = 128;
  constexpr double kLeastProduct = double(1 << 28);
  return std::min({rows, columns, depth}) >= kLeast &&
         double(batches) * double(rows) * double(columns) * double(depth) >= kLeastProduct &&
         batches * std::max({rows, columns, depth}) < INT_MAX - kScaledMultiple;
}

}  // namespace lstm_cuda
