// The kernel behind prepare.cuh.
//
// One block of 256 threads for each 32 x 32 tile of what is written. A tile goes through shared
// memory, read along whichever dimension is contiguous in the source and written along rows, so a
// transposition costs no more than a copy.
#include "prepare.cuh"

#include "element.cuh"

namespace lstm_cuda {
namespace {

constexpr int kTile = 32, kThreads = 256, kLines = kThreads / 32;

LSTM_HOST_DEVICE int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
LSTM_HOST_DEVICE int64_t blocks(const PrepareJob& job) {
  return job.matrices * tiles(job.padded_rows) * tiles(job.padded_columns);
}

template <Arithmetic arithmetic>
LSTM_KERNEL(kThreads)
prepare(LSTM_PARAMETER Prepare p) {
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  ptx::Shared shared;
  Compute* const tile = shared.take<Compute>(kTile * (kTile + 1), 16);
  int64_t index = ptx::block_index();
  int which = 0;
  for (; index >= blocks(p.jobs[which]); ++which) index -= blocks(p.jobs[which]);
  const PrepareJob& job = p.jobs[which];
  const int64_t column0 = index % tiles(job.padded_columns) * kTile;
  index /= tiles(job.padded_columns);
  const int64_t row0 = index % tiles(job.padded_rows) * kTile;
  const int64_t matrix = index / tiles(job.padded_rows);
  const void* const source = job.from == PrepareJob::From::w_hh   ? p.w_hh[matrix]
                             : job.from == PrepareJob::From::w_hr ? p.w_hr[matrix]
                                                                  : job.source;
  const bool wide = job.from == PrepareJob::From::compute;

  const int lane = int(ptx::thread_index() % 32), line = int(ptx::thread_index() / 32);
  const bool along_rows = job.column_stride == 1;
  for (int k = line; k < kTile; k += kLines) {
    const int r = along_rows ? k : lane, column = along_rows ? lane : k;
    const int64_t row = row0 + r, gate = (column0 + column) / job.gate_columns;
    const int64_t j = (column0 + column) % job.gate_columns;
    const bool inside =
        matrix < job.sources && row < job.rows && gate < job.gates && j < job.columns;
    const int64_t at = matrix * job.source_stride + row * job.row_stride +
                       (gate * job.columns + j) * job.column_stride;
    tile[r * (kTile + 1) + column] =
        inside ? load_either<arithmetic>(source, wide, at) : Compute(0);
  }
  ptx::block_sync();  // the whole tile is there: rows are read by others than wrote them
  for (int k = line; k < kTile; k += kLines) {
    if (row0 + k >= job.padded_rows || column0 + lane >= job.padded_columns) continue;
    const int64_t at = (matrix * job.padded_rows + row0 + k) * job.pitch + column0 + lane;
    const Compute value = tile[k * (kTile + 1) + lane];
    if (job.compute) {
      static_cast<Compute*>(job.to)[at] = value;
    } else {
      static_cast<Element*>(job.to)[at] = operand<arithmetic>(to_element<Element>(value));
    }
  }
}

}  // namespace

Status launch_prepare(const Prepare& p, Arithmetic arithmetic, Stream stream) {
  int64_t count = 0;
  for (int k = 0; k < p.count; ++k) count += blocks(p.jobs[k]);
  return by_arithmetic(arithmetic, [&]<Arithmetic a>() {
    return launch<prepare<a>>({"prepare", unsigned(count), kThreads,
                               kTile * (kTile + 1) * sizeof(typename Types<a>::Compute)},
                              p, stream);
  });
}

}  // namespace lstm_cuda
