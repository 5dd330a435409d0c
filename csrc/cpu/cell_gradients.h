// The gradients, by the cells of a run, of what is linear in its tangents and in its adjoints
// (lstm_cuda/recurrence.py): within each step, but for what a cell state passes on to the next one.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class T>
class CellGradientsJob {
  static constexpr int lanes = kLanes<T>;

 public:
  // With a null block nothing is run; the return value is the room that is needed, in bytes.
  static int64_t run(const CellGradients& p, const Parallel& parallel, void* block) {
    const Cells& cells = p.cells;
    Arena arena(block);
    T* const zeros = arena.take<T>(4 * cells.H);
    if (!block) return arena.used();
    std::memset(static_cast<void*>(zeros), 0, sizeof(T) * 4 * cells.H);

    const CellGradientsJob job(p, zeros);
    const bool small = cells.T * cells.D * cells.B * cells.H < 50'000;
    Team team(small ? 1 : int(std::min<int64_t>(parallel.threads, cells.T)));
    parallel.for_each(team.workers(), [&](int64_t id) {
      const FlushDenormals guard;
      Team::Worker worker(team, int(id));
      worker.each(cells.T, [&](int64_t t) {
        for (int64_t d = 0; d < cells.D; ++d)
          for (int64_t b = 0; b < cells.B; ++b) job.row(t, d, b);
      });
    });
    return arena.used();
  }

 private:
  CellGradientsJob(const CellGradients& p, const T* zeros) : p_(p), cells_{p.cells, zeros} {}

  void row(int64_t t, int64_t d, int64_t b) const {
    const int64_t row = cells_.at(t, d, b), step = p_.cells.D * p_.cells.B;
    const bool before = cells_.passes(t, d, b), after = cells_.passes(t + 1, d, b);
    const bool from_c0 = t == 0 && !cells_.fresh(row);
    const T* const c_prev = cells_.entering(t, d, b);
    for (int64_t j = 0; j < p_.cells.H; j += lanes) {
      const int left = lanes_left(j, p_.cells.H, lanes);
      Cell<Vec<T>> gradients = cells_.four(p_.source_gates, row, j, left);
      gradients.c = cells_.one(p_.dc, row, j, left);
      gradients.m = cells_.one(p_.dm, row, j, left);
      Cell<Vec<T>> found = cell_gradients<Math<T>>(
          cells_.cell(row, j, left), load<T>(c_prev + j, left), cells_.four(p_.z, row, j, left),
          cells_.one(p_.change_c, row, j, left),
          cells_.one(before ? p_.change_c : nullptr, row - step, j, left), gradients);
      if (after) found.c += of_entering(row + step, j, left);
      cells_.put_four(p_.dgates, row, j, found, left);
      cells_.put_one(p_.dcells, row, j, found.c, left);
      if (p_.dc0 && t == 0)
        cells_.put_one(p_.dc0, row, j, from_c0 ? of_entering(row, j, left) : Vec<T>{}, left);
    }
  }

  // The gradient by the cell state that enters this step.
  LSTM_INLINE Vec<T> of_entering(int64_t row, int64_t j, int left) const {
    const Vec<T> f = cells_.forget(row, j, left);
    const T* const z = static_cast<const T*>(p_.z) + row * 4 * p_.cells.H + p_.cells.H + j;
    return cells_.one(p_.dc, row, j, left) * f * (1 - f) * load<T>(z, left);
  }

  const CellGradients& p_;
  const CellRows<T> cells_;
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
