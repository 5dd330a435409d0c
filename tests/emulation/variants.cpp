// Runs rec_step's kernels of other cells, forward and backward, with many options at once: with the
// threads in one order, and again in another. The bits must be the same. What is right the tests in
// Python know.
//   variants ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#include <cstdlib>
#include <random>

#include "cuda/rec_step.cuh"
#include "recurrence_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

struct VariantCase {
  int64_t T, B, D, H, P;  // P = 0: not projected
  uint64_t reversed;
  CellOptions cell;
  bool peephole, norm, h_scale, drawn;
};

const VariantCase kCases[] = {
    {3, 5, 2, 21, 0, 2, {.clip = 0.5, .zoneout_h = 0.3, .zoneout_c = 0.4}, true, false, true, true},
    {2, 3, 2, 21, 6, 2, {.zoneout_h = 0.3, .zoneout_c = 0.4}, true, true, true, false},
    {2, 2, 1, 260, 0, 1, {.forget = Forget::coupled, .zoneout_h = 0.3}, false, true, false, true},
    {3, 3, 1, 37, 33, 0, {.output = Activation::softsign}, true, false, false, false},
};

template <Arithmetic arithmetic>
class VariantRunner {
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  using Elements = DeviceBuffer<Element>;
  using Computes = DeviceBuffer<Compute>;

 public:
  explicit VariantRunner(const VariantCase& c) : c_(c) {
    shape_.dtype = dtype_of(arithmetic);
    shape_.T = c.T, shape_.B = c.B, shape_.D = c.D, shape_.H = c.H, shape_.P = c.P ? c.P : c.H;
    shape_.reversed = c.reversed, shape_.projected = c.P != 0;
  }

  // All results, or what went wrong.
  std::string run(std::vector<char>& results) {
    const auto& [T, B, D, H, narrow_P, reversed, cell, peephole, norm, h_scale, drawn] = c_;
    const int64_t P = shape_.P, rows = T * B * D;
    random_.seed(7);
    std::vector<const void*> w_hh, w_hr;
    const Elements weights(elements(D * 4 * H * P)), projections(elements(D * P * H));
    for (int64_t d = 0; d < D; ++d) {
      w_hh.push_back(weights.data() + d * 4 * H * P);
      w_hr.push_back(projections.data() + d * P * H);
    }
    std::vector<int64_t> of_rows;
    std::vector<uint8_t> boundaries;
    for (int64_t b = 0; b < B; ++b) of_rows.push_back(b == 0 ? T : b + 1 == B ? 0 : T - 1);
    for (int64_t k = 0; k < T * B; ++k) boundaries.push_back(random_() % 4 == 0);
    const DeviceBuffer<int64_t> lengths(of_rows),
        seed(std::vector<int64_t>{0x123456789, 0x987654321});
    const DeviceBuffer<uint8_t> reset(boundaries);
    const Elements h0(elements(D * B * P)), c0(elements(D * B * H)), gates(elements(rows * 4 * H));
    const Computes gates_x(computes(rows * 4 * H)), w_p(computes(D * 3 * H)),
        gains(computes(D * 6 * H)), scale(computes(D * B * P));
    const auto wide = static_cast<size_t>(rows * 4 * H);
    const Computes normed(wide), rstd(static_cast<size_t>(rows));
    const Elements y(static_cast<size_t>(rows * P)), h_n(static_cast<size_t>(D * B * P)),
        c_n(static_cast<size_t>(D * B * H)), saved(wide);
    const Computes cells(static_cast<size_t>(rows * H));

    Variant variant{};
    variant.cell = cell;
    variant.peephole = peephole ? w_p.data() : nullptr;
    variant.norm = norm ? gains.data() : nullptr;
    variant.h_scale = h_scale ? scale.data() : nullptr;
    variant.seed = drawn ? seed.data() : nullptr;
    variant.normed = norm ? normed.data() : nullptr;
    variant.rstd = norm ? rstd.data() : nullptr;
    RecurrenceForward f{};
    f.shape = shape_;
    f.w_hh = w_hh.data(), f.w_hr = c_.P ? w_hr.data() : nullptr;
    f.h0 = h0.data(), f.c0 = c0.data(), f.h_operand = h_scale ? h0.data() : nullptr;
    f.lengths = lengths.data(), f.reset = reset.data();
    f.gates = norm ? saved.data() : gates.data();
    f.gates_x = norm ? gates_x.data() : nullptr;
    f.save = true;
    f.y = y.data(), f.h_n = h_n.data(), f.c_n = c_n.data(), f.c = cells.data();
    f.variant = &variant;
    Status status = start(f, rec_step_forward, false);
    if (!status.ok()) return status.message;

    const Elements dy(elements(rows * P)), dh_n(elements(D * B * P)), dc_n(elements(D * B * H));
    const Computes dc(computes(rows * H));
    const int64_t sums = (peephole ? 3 : 0) + (norm ? 6 : 0);
    const Computes dmore(std::vector<Compute>(static_cast<size_t>(D * B * sums * H), Compute(0)));
    const Elements dgates(wide), dh(static_cast<size_t>(rows * P)),
        dh0(static_cast<size_t>(D * B * P)), dc0(static_cast<size_t>(D * B * H)),
        m(static_cast<size_t>(rows * H));
    const Computes dgates_x(wide);
    variant.dmore = dmore.data();
    RecurrenceBackward b{};
    b.shape = shape_;
    b.w_hh = f.w_hh, b.w_hr = f.w_hr, b.c0 = f.c0, b.lengths = f.lengths, b.reset = f.reset;
    b.gates = f.gates, b.c = cells.data();
    b.dy = dy.data(), b.dh_n = dh_n.data(), b.dc_n = dc_n.data(), b.dc = dc.data();
    b.dgates = dgates.data(), b.dh = c_.P ? dh.data() : nullptr;
    b.dh0 = dh0.data(), b.dc0 = dc0.data();
    b.variant = &variant;
    b.dgates_x = norm ? dgates_x.data() : nullptr;
    b.m = c_.P ? m.data() : nullptr;
    status = start(b, rec_step_backward, true);
    if (!status.ok()) return status.message;

    for (const Elements* each : {&y, &h_n, &c_n, &dgates, &dh0, &dc0}) append(results, *each);
    append(results, cells), append(results, dmore);
    if (norm) append(results, dgates_x);
    if (c_.P) append(results, dh), append(results, m);
    const bool finite = finite_;
    append(results, norm ? saved : gates);  // of idle rows these are not written
    if (norm) append(results, normed), append(results, rstd);
    return finite ? "" : "a result is not finite";
  }

 private:
  template <class Params, class Kernels>
  Status start(const Params& p, Kernels kernels, bool backward) const {
    CudaRequest request{arithmetic == Arithmetic::tf32, backward, int(Family::rec_step), 0};
    request.cell = kind_of(p.variant);
    const CudaPlan plan = plan_cuda(shape_, request, {90, 132, 232448});
    const DeviceBuffer<char> scratch(size_t(rec_step_scratch(shape_, plan, p.variant, backward)));
    return kernels(p, plan, scratch.data(), {});
  }

  double draw() { return std::uniform_real_distribution<double>(-1, 1)(random_); }
  std::vector<Element> elements(int64_t count) {
    std::vector<Element> values;
    for (int64_t k = 0; k < count; ++k) values.push_back(narrow<Element>(draw() / 2));
    return values;
  }
  std::vector<Compute> computes(int64_t count) {
    std::vector<Compute> values;
    for (int64_t k = 0; k < count; ++k) values.push_back(Compute(draw()));
    return values;
  }

  template <class T>
  void append(std::vector<char>& results, const DeviceBuffer<T>& buffer) {
    const std::vector<T> values = buffer.values();
    for (const T& v : values) finite_ = finite_ && std::isfinite(double(to_compute(v)));
    const char* const bytes = reinterpret_cast<const char*>(values.data());
    results.insert(results.end(), bytes, bytes + values.size() * sizeof(T));
  }

  VariantCase c_;
  LayerShape shape_{};
  std::mt19937 random_;
  bool finite_ = true;
};

}  // namespace

// Of the plain cell, which recurrence.cpp runs: not compiled here.
namespace lstm_cuda {
Status launch_step_forward(const StepForward&, const CudaPlan&, bool, Stream) { std::abort(); }
Status launch_step_backward(const StepBackward&, const CudaPlan&, bool, Stream) { std::abort(); }
}  // namespace lstm_cuda

int main(int argc, char** argv) {
  const std::optional<Arithmetic> arithmetic = argc < 4 ? std::nullopt : arithmetic_of(argv[1]);
  if (!arithmetic) return 2;
  const Selection selection(argc > 4 ? argv[4] : "");
  int failed = 0, number = 0;
  for (const VariantCase& c : kCases) {
    const int current = number++;
    if (!selection.has(current, true)) continue;
    std::vector<char> usual, other;
    const std::string complaint = by_arithmetic(*arithmetic, [&]<Arithmetic a>() {
      set_order("forward", "0");
      const std::string first = VariantRunner<a>(c).run(usual);
      set_order(argv[2], argv[3]);
      return first.empty() ? VariantRunner<a>(c).run(other) : first;
    });
    if (complaint.empty() && usual == other) continue;
    ++failed;
    std::printf("case %d: %s\n", current,
                complaint.empty() ? "the order of threads changes it" : complaint.c_str());
  }
  return failed != 0;
}
