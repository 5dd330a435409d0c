// The steps of family rec_step in their order, and the scratch memory between them.
#include "rec_step.cuh"

#include "prepare.cuh"

namespace lstm_cuda {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t element_bytes(Arithmetic a) {
  if (a == Arithmetic::float64) return 8;
  return a == Arithmetic::float16 || a == Arithmetic::bfloat16 ? 2 : 4;
}
int64_t compute_bytes(Arithmetic a) { return a == Arithmetic::float64 ? 8 : 4; }

int64_t tile_columns(StepTile tile) {
  switch (tile) {
    case StepTile::small:
      return StepTileOf<StepTile::small>::kColumns;
    case StepTile::medium:
      return StepTileOf<StepTile::medium>::kColumns;
    default:
      return StepTileOf<StepTile::large>::kColumns;
  }
}

// Matrices of products, [count][rows][pitch] with pitch in bytes, one after the other in scratch.
struct Matrices {
  int64_t offset, rows, pitch;
  int64_t stride() const { return rows * pitch; }
};

// A row of `gates` times `columns` values, each gate's part a multiple of 16 bytes.
int64_t pitch_of(int64_t columns, int64_t gates, int64_t bytes) {
  return gates * round_up(columns * bytes, 16);
}

struct Memory {
  Matrices weights;     // forward: w_hh [4H, P]; backward: its transpose [P, 4H]
  Matrices projection;  // forward: w_hr [P, H]; backward: its transpose [H, P]; if projected
  Matrices ring;        // forward: h [2D, B, P]; backward: dgates [2D, B, 4H]
  Matrices hand;        // forward: m [D, B, H]; backward: dh [D, B, P]; if projected
  int64_t state;        // c or dc [D, B, H], compute
  int64_t h_state;      // h or dh [D, B, P], compute, with zoneout of h; else -1
  int64_t row;          // of rows with norm, [D, B, 5H] or [D, B, 8H], compute; else -1
  int64_t total;

  Memory(const LayerShape& s, const CudaPlan& plan, const Variant* variant, bool backward) {
    const int64_t bytes = element_bytes(plan.arithmetic), wide = compute_bytes(plan.arithmetic);
    const int64_t columns = round_up(s.B, tile_columns(plan.tile));
    total = 0;
    const auto take = [&](int64_t count, int64_t rows, int64_t pitch) {
      const Matrices m{total, rows, pitch};
      total = round_up(total + count * m.stride(), 256);
      return m;
    };
    const int64_t h_pitch = pitch_of(s.P, 1, bytes), m_pitch = pitch_of(s.H, 1, bytes),
                  g_pitch = pitch_of(s.H, 4, bytes);
    const int64_t projected = s.projected ? s.D : 0;
    weights = backward ? take(s.D, s.P, g_pitch) : take(s.D, 4 * s.H, h_pitch);
    projection = backward ? take(projected, s.H, h_pitch) : take(projected, s.P, m_pitch);
    ring = take(2 * s.D, columns, backward ? g_pitch : h_pitch);
    hand = take(projected, columns, backward ? h_pitch : m_pitch);
    state = take(s.D, s.B, s.H * wide).offset;
    h_state = variant && variant->cell.zoneout_h > 0 ? take(s.D, s.B, s.P * wide).offset : -1;
    row = variant && variant->norm ? take(s.D, s.B, (backward ? 8 : 5) * s.H * wide).offset : -1;
  }
};

std::byte* at(void* scratch, int64_t offset) { return static_cast<std::byte*>(scratch) + offset; }
// The same of what is not always there.
std::byte* at_or_null(void* scratch, int64_t offset) {
  return offset < 0 ? nullptr : at(scratch, offset);
}

// Weights and state that lie as w and m do; weights that are read in place have the same pitch.
StepOperands operands(const void* weights, const Matrices& w, const void* state, const Matrices& m,
                      int64_t rows, int64_t B) {
  return {weights, w.pitch, w.stride(), state, m.pitch, m.stride(), m.pitch, rows, B};
}

// Jobs of `prepare`, in elements.
struct Jobs {
  const LayerShape& s;
  int64_t bytes;
  Prepare prepare{};

  Jobs(const LayerShape& shape, Arithmetic a, const void* const* w_hh, const void* const* w_hr)
      : s(shape), bytes(element_bytes(a)) {
    for (int64_t d = 0; d < s.D; ++d) {
      prepare.w_hh[d] = w_hh[d];
      if (s.projected) prepare.w_hr[d] = w_hr[d];
    }
  }
  void add(const PrepareJob& job) { prepare.jobs[prepare.count++] = job; }

  void weights(PrepareJob::From from, void* to, const Matrices& m, int64_t rows, int64_t columns,
               int64_t gates, int64_t row_stride, int64_t column_stride) {
    const int64_t pitch = m.pitch / bytes;
    add({from, nullptr, 0, s.D, row_stride, column_stride, rows, columns, gates, to, false, s.D,
         rows, pitch, pitch, pitch / gates});
  }
  // Filled from [D, B, columns], or with zeros where that is null.
  void fill(const void* source, int64_t columns, void* to, const Matrices& m, int64_t matrices) {
    const int64_t pitch = m.pitch / bytes;
    add({PrepareJob::From::memory, source, s.B * columns, s.D, columns, 1, s.B, columns, 1, to,
         false, matrices, m.rows, pitch, pitch, pitch});
  }
  void state(const void* source, bool wide, void* to, int64_t columns) {
    const auto from = wide ? PrepareJob::From::compute : PrepareJob::From::memory;
    add({from, source, s.B * columns, s.D, columns, 1, s.B, columns, 1, to, true, s.D, s.B, columns,
         columns, columns});
  }
};

// Whether a product can read the weights where they are: one matrix, rows aligned and not rounded.
bool readable(const LayerShape& s, Arithmetic a, const void* w, int64_t row_bytes) {
  return s.D == 1 && a != Arithmetic::tf32 && row_bytes % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(w) % 16 == 0;
}

}  // namespace

int64_t rec_step_scratch(const LayerShape& shape, const CudaPlan& plan, const Variant* variant,
                         bool backward) {
  return Memory(shape, plan, variant, backward).total;
}

Status rec_step_forward(const RecurrenceForward& p, const CudaPlan& plan, void* scratch,
                        Stream stream) {
  const LayerShape& s = p.shape;
  const Memory memory(s, plan, p.variant, false);
  const int64_t bytes = element_bytes(plan.arithmetic);
  std::byte* const ring = at(scratch, memory.ring.offset);
  std::byte* const hand = at(scratch, memory.hand.offset);
  const int64_t slot_bytes = s.D * memory.ring.stride();

  Jobs jobs(s, plan.arithmetic, p.w_hh, p.w_hr);
  const void *w_hh = at(scratch, memory.weights.offset),
             *w_hr = at(scratch, memory.projection.offset);
  if (readable(s, plan.arithmetic, p.w_hh[0], s.P * bytes)) {
    w_hh = p.w_hh[0];
  } else {
    jobs.weights(PrepareJob::From::w_hh, at(scratch, memory.weights.offset), memory.weights,
                 4 * s.H, s.P, 1, s.P, 1);
  }
  if (s.projected) {
    if (readable(s, plan.arithmetic, p.w_hr[0], s.H * bytes)) {
      w_hr = p.w_hr[0];
    } else {
      jobs.weights(PrepareJob::From::w_hr, at(scratch, memory.projection.offset), memory.projection,
                   s.P, s.H, 1, s.H, 1);
    }
    jobs.fill(nullptr, s.H, hand, memory.hand, s.D);
  }
  jobs.fill(p.h_operand ? p.h_operand : p.h0, s.P, ring, memory.ring, 2 * s.D);
  jobs.state(p.c0, p.wide_c, at(scratch, memory.state), s.H);
  std::byte* const h_state = at_or_null(scratch, memory.h_state);
  if (h_state) jobs.state(p.h0, false, h_state, s.P);
  Status status = launch_prepare(jobs.prepare, plan.arithmetic, stream);

  // Step s reads slot s % 2 and fills the other.
  for (int64_t step = 0; step < s.T && status.ok(); ++step) {
    std::byte* const now = ring + step % 2 * slot_bytes;
    std::byte* const next = ring + (step + 1) % 2 * slot_bytes;
    StepForward cell{};
    cell.product = operands(w_hh, memory.weights, now, memory.ring, s.H, s.B);
    // Nothing comes from a state of zeros.
    if (step == 0 && !p.h0) cell.product.depth = 0;
    cell.shape = s;
    cell.step = step;
    cell.h0 = p.h0, cell.c0 = p.c0;
    cell.lengths = p.lengths, cell.reset = p.reset;
    cell.gates = p.gates, cell.save = p.save, cell.wide_c = p.wide_c;
    cell.y = p.y, cell.h_n = p.h_n, cell.c_n = p.c_n, cell.c = p.c;
    cell.c_state = at(scratch, memory.state);
    cell.out = s.projected ? hand : next;
    cell.kept = now;
    const Matrices& out = s.projected ? memory.hand : memory.ring;
    cell.out_pitch = out.pitch, cell.out_stride_d = out.stride();
    const bool overlap = plan.overlap && step > 0;
    if (p.variant) {
      cell.variant = *p.variant;
      cell.gates_x = p.gates_x;
      cell.h_state = h_state;
      cell.row = at_or_null(scratch, memory.row);
      status = launch_variant_forward(cell, plan, overlap, stream);
    } else {
      status = launch_step_forward(cell, plan, overlap, stream);
    }
    if (!s.projected || !status.ok()) continue;

    StepProject project{};
    project.product = operands(w_hr, memory.projection, hand, memory.hand, s.P, s.B);
    project.shape = s;
    project.what = Projection::h;
    project.step = step;
    project.lengths = p.lengths, project.reset = p.reset;
    project.h0 = p.h0;
    project.y = p.y, project.h_n = p.h_n;
    project.out = next, project.kept = now;
    project.out_pitch = memory.ring.pitch, project.out_stride_d = memory.ring.stride();
    if (p.variant) project.variant = *p.variant;
    project.state = h_state;
    status = launch_step_project(project, plan, p.variant, plan.overlap, stream);
  }
  return status;
}

Status rec_step_backward(const RecurrenceBackward& p, const CudaPlan& plan, void* scratch,
                         Stream stream) {
  const LayerShape& s = p.shape;
  const Memory memory(s, plan, p.variant, true);
  std::byte* const ring = at(scratch, memory.ring.offset);
  std::byte* const hand = at(scratch, memory.hand.offset);
  std::byte* const w_hh = at(scratch, memory.weights.offset);
  std::byte* const w_hr = at(scratch, memory.projection.offset);
  const int64_t slot_bytes = s.D * memory.ring.stride();

  Jobs jobs(s, plan.arithmetic, p.w_hh, p.w_hr);
  jobs.weights(PrepareJob::From::w_hh, w_hh, memory.weights, s.P, s.H, 4, 1, s.P);
  if (s.projected) {
    jobs.weights(PrepareJob::From::w_hr, w_hr, memory.projection, s.H, s.P, 1, 1, s.H);
    jobs.fill(nullptr, s.P, hand, memory.hand, s.D);
  }
  jobs.fill(nullptr, 4 * s.H, ring, memory.ring, 2 * s.D);
  jobs.state(nullptr, false, at(scratch, memory.state), s.H);
  std::byte* const dh_state = at_or_null(scratch, memory.h_state);
  if (dh_state) jobs.state(nullptr, false, dh_state, s.P);
  Status status = launch_prepare(jobs.prepare, plan.arithmetic, stream);

  StepProject project{};
  project.product = operands(w_hh, memory.weights, nullptr, memory.ring, s.P, s.B);
  project.shape = s;
  project.lengths = p.lengths, project.reset = p.reset;
  project.dy = p.dy, project.dh_n = p.dh_n;
  project.dh = p.dh, project.dh0 = p.dh0;
  project.out = hand;
  project.out_pitch = memory.hand.pitch, project.out_stride_d = memory.hand.stride();
  if (p.variant) project.variant = *p.variant;
  project.state = dh_state;

  // Step s reads slot (s + 1) % 2 and fills slot s % 2.
  for (int64_t step = s.T - 1; step >= 0 && status.ok(); --step) {
    std::byte* const now = ring + (step + 1) % 2 * slot_bytes;
    std::byte* const next = ring + step % 2 * slot_bytes;
    const bool first = step == s.T - 1;
    bool overlap = plan.overlap && !first;
    if (s.projected) {
      project.what = Projection::dh;
      project.step = step;
      project.product.state = now;
      project.product.depth = first ? 0 : memory.ring.pitch;
      status = launch_step_project(project, plan, p.variant, overlap, stream);
      if (!status.ok()) break;
      overlap = plan.overlap;
    }
    StepBackward cell{};
    cell.product = s.projected ? operands(w_hr, memory.projection, hand, memory.hand, s.H, s.B)
                               : operands(w_hh, memory.weights, now, memory.ring, s.H, s.B);
    if (first && !s.projected) cell.product.depth = 0;
    cell.shape = s;
    cell.step = step;
    cell.c0 = p.c0;
    cell.lengths = p.lengths, cell.reset = p.reset;
    cell.gates = p.gates, cell.c = p.c;
    cell.dy = p.dy, cell.dh_n = p.dh_n, cell.dc_n = p.dc_n, cell.dc = p.dc;
    cell.dgates = p.dgates, cell.dc0 = p.dc0, cell.wide_c = p.wide_c;
    cell.dc_state = at(scratch, memory.state);
    cell.out = next, cell.kept = now;
    cell.out_pitch = memory.ring.pitch, cell.out_stride_d = memory.ring.stride();
    cell.gate_pitch = memory.ring.pitch / 4;
    if (p.variant) {
      cell.variant = *p.variant;
      cell.dgates_x = p.dgates_x, cell.m = p.m;
      cell.dh_state = dh_state;
      cell.row = at_or_null(scratch, memory.row);
      status = launch_variant_backward(cell, plan, overlap, stream);
    } else {
      status = launch_step_backward(cell, plan, overlap, stream);
    }
  }
  if (status.ok() && p.dh0) {
    project.what = Projection::dh0;
    project.step = 0;
    project.product.state = ring;
    project.product.depth = memory.ring.pitch;
    status = launch_step_project(project, plan, p.variant, plan.overlap, stream);
  }
  return status;
}

}  // namespace lstm_cuda
