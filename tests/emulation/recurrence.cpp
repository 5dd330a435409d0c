// Runs the recurrence kernels, forward and backward, on small problems against plain loops in float64
// that share nothing with them. Built plain, with AddressSanitizer and with ThreadSanitizer, and from
// broken copies of the kernels.
//   recurrence FAMILY ARITHMETIC ORDER SEED [CASE]
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/element.cuh"
#include "cuda/families.h"
#include "memory.hpp"

using namespace lstm_cuda;

namespace {

struct Case {
  int64_t T, B, D, H, P;  // P = 0: not projected
  uint64_t reversed;
  bool lengths, reset, state, all_gradients;
};

const Case kCases[] = {
    {4, 9, 2, 21, 0, 2, true, true, true, true},    {3, 3, 1, 70, 0, 1, true, false, true, true},
    {3, 17, 1, 24, 0, 0, false, true, false, true}, {2, 8, 1, 64, 0, 0, false, false, true, false},
    {4, 5, 2, 19, 6, 2, true, true, true, true},    {3, 5, 1, 40, 33, 1, true, false, false, false},
};

using Values = std::vector<double>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One problem: what is given, rounded to what the element type holds, and what should come out.
struct Problem {
  Case c;
  int64_t P;
  Values gates_x, w_hh, w_hr, h0, c0, dy, dh_n, dc_n, dc;
  std::vector<int64_t> lengths;
  std::vector<uint8_t> reset;
  Values y, h_n, c_n, cells, gates;  // forward
  Values dgates, dh, dh0, dc0;       // backward

  int64_t length(int64_t b) const { return c.lengths ? lengths[size_t(b)] : c.T; }
  int64_t row(int64_t t, int64_t b, int64_t d) const { return (t * c.B + b) * c.D + d; }

  // Row b's steps of recurrence d in order, each with whether it starts from zeros.
  std::vector<std::pair<int64_t, bool>> steps(int64_t b, int64_t d) const {
    std::vector<std::pair<int64_t, bool>> list;
    const bool backwards = c.reversed >> d & 1;
    const int64_t n = length(b);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t t = backwards ? n - 1 - k : k;
      bool fresh = false;
      if (c.reset) {
        if (!backwards)
          fresh = reset[size_t(t * c.B + b)];
        else if (t + 1 < n)
          fresh = reset[size_t((t + 1) * c.B + b)];
      }
      list.emplace_back(t, fresh);
    }
    return list;
  }

  void forward() {
    const int64_t H = c.H;
    const size_t rows = size_t(c.T * c.B * c.D);
    y.assign(rows * size_t(P), 0), cells.assign(rows * size_t(H), 0);
    gates.assign(rows * size_t(4 * H), 0);
    h_n.assign(size_t(c.D * c.B * P), 0), c_n.assign(size_t(c.D * c.B * H), 0);
    for (int64_t d = 0; d < c.D; ++d)
      for (int64_t b = 0; b < c.B; ++b) {
        Values h(size_t(P), 0), s(size_t(H), 0);
        if (c.state) {
          for (int64_t j = 0; j < P; ++j) h[size_t(j)] = h0[size_t((d * c.B + b) * P + j)];
          for (int64_t j = 0; j < H; ++j) s[size_t(j)] = c0[size_t((d * c.B + b) * H + j)];
        }
        for (const auto& [t, fresh] : steps(b, d)) {
          if (fresh) h.assign(size_t(P), 0), s.assign(size_t(H), 0);
          Values z(size_t(4 * H)), m(static_cast<size_t>(H));
          for (int64_t r = 0; r < 4 * H; ++r) {
            double sum = gates_x[size_t(row(t, b, d) * 4 * H + r)];
            for (int64_t k = 0; k < P; ++k)
              sum += w_hh[size_t((d * 4 * H + r) * P + k)] * h[size_t(k)];
            const bool candidate = r / H == 2;
            z[size_t(r)] = candidate ? std::tanh(sum) : sigmoid(sum);
            gates[size_t(row(t, b, d) * 4 * H + r)] = z[size_t(r)];
          }
          for (int64_t j = 0; j < H; ++j) {
            s[size_t(j)] = z[size_t(H + j)] * s[size_t(j)] + z[size_t(j)] * z[size_t(2 * H + j)];
            cells[size_t(row(t, b, d) * H + j)] = s[size_t(j)];
            m[size_t(j)] = z[size_t(3 * H + j)] * std::tanh(s[size_t(j)]);
          }
          for (int64_t j = 0; j < P; ++j) {
            double out = c.P ? 0 : m[size_t(j)];
            for (int64_t k = 0; c.P && k < H; ++k)
              out += w_hr[size_t((d * P + j) * H + k)] * m[size_t(k)];
            h[size_t(j)] = out;
            y[size_t(row(t, b, d) * P + j)] = out;
          }
        }
        for (int64_t j = 0; j < P; ++j) h_n[size_t((d * c.B + b) * P + j)] = h[size_t(j)];
        for (int64_t j = 0; j < H; ++j) c_n[size_t((d * c.B + b) * H + j)] = s[size_t(j)];
      }
  }

  void backward() {
    const int64_t H = c.H;
    const size_t rows = size_t(c.T * c.B * c.D);
    dgates.assign(rows * size_t(4 * H), 0), dh.assign(rows * size_t(P), 0);
    dh0.assign(size_t(c.D * c.B * P), 0), dc0.assign(size_t(c.D * c.B * H), 0);
    for (int64_t d = 0; d < c.D; ++d)
      for (int64_t b = 0; b < c.B; ++b) {
        Values carry(size_t(P), 0), ds(size_t(H), 0);
        for (int64_t j = 0; c.all_gradients && j < P; ++j)
          carry[size_t(j)] = dh_n[size_t((d * c.B + b) * P + j)];
        for (int64_t j = 0; c.all_gradients && j < H; ++j)
          ds[size_t(j)] = dc_n[size_t((d * c.B + b) * H + j)];
        const auto list = steps(b, d);
        for (size_t k = list.size(); k-- > 0;) {
          const auto [t, fresh] = list[k];
          const int64_t at = row(t, b, d);
          Values g(size_t(4 * H));
          for (int64_t j = 0; j < P; ++j) {
            carry[size_t(j)] += dy[size_t(at * P + j)];
            dh[size_t(at * P + j)] = carry[size_t(j)];
          }
          for (int64_t j = 0; j < H; ++j) {
            double dm = c.P ? 0 : carry[size_t(j)];
            for (int64_t r = 0; c.P && r < P; ++r)
              dm += w_hr[size_t((d * P + r) * H + j)] * carry[size_t(r)];
            const double* z = &gates[size_t(at * 4 * H + j)];
            const double i = z[0], f = z[H], u = z[2 * H], o = z[3 * H];
            const double s = std::tanh(cells[size_t(at * H + j)]);
            double before = 0;
            if (!fresh && k > 0) before = cells[size_t(row(list[k - 1].first, b, d) * H + j)];
            if (!fresh && k == 0 && c.state) before = c0[size_t((d * c.B + b) * H + j)];
            double& e = ds[size_t(j)];
            if (c.all_gradients) e += dc[size_t(at * H + j)];
            e += dm * o * (1 - s * s);
            g[size_t(j)] = e * u * i * (1 - i);
            g[size_t(H + j)] = e * before * f * (1 - f);
            g[size_t(2 * H + j)] = e * i * (1 - u * u);
            g[size_t(3 * H + j)] = dm * s * o * (1 - o);
            e = fresh ? 0 : e * f;
          }
          for (int64_t r = 0; r < 4 * H; ++r) dgates[size_t(at * 4 * H + r)] = g[size_t(r)];
          for (int64_t j = 0; j < P; ++j) {
            double sum = 0;
            for (int64_t r = 0; !fresh && r < 4 * H; ++r)
              sum += w_hh[size_t((d * 4 * H + r) * P + j)] * g[size_t(r)];
            carry[size_t(j)] = sum;
          }
        }
        for (int64_t j = 0; j < P; ++j) dh0[size_t((d * c.B + b) * P + j)] = carry[size_t(j)];
        for (int64_t j = 0; j < H; ++j) dc0[size_t((d * c.B + b) * H + j)] = ds[size_t(j)];
      }
  }
};

template <class Element>
Element narrow(double v) {
  if constexpr (std::is_same_v<Element, double>)
    return v;
  else
    return to_element<Element>(float(v));
}

template <Arithmetic arithmetic>
class Runner {
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;

 public:
  Runner(const Case& c, unsigned seed) : random_(seed) {
    p_.c = c;
    p_.P = c.P ? c.P : c.H;
    const double scale = 1 / std::sqrt(double(c.H));
    const int64_t rows = c.T * c.B * c.D;
    p_.gates_x = draw(rows * 4 * c.H, 1);
    p_.w_hh = draw(c.D * 4 * c.H * p_.P, scale);
    p_.w_hr = draw(c.P ? c.D * p_.P * c.H : 1, scale);
    p_.h0 = draw(c.D * c.B * p_.P, 1), p_.c0 = draw(c.D * c.B * c.H, 1);
    p_.dy = draw(rows * p_.P, 1), p_.dh_n = draw(c.D * c.B * p_.P, 1);
    p_.dc_n = draw(c.D * c.B * c.H, 1), p_.dc = draw(rows * c.H, 1);
    for (int64_t b = 0; b < c.B; ++b) p_.lengths.push_back(int64_t(random_() % uint64_t(c.T + 1)));
    p_.lengths.front() = c.T, p_.lengths.back() = 0;
    for (int64_t k = 0; k < c.T * c.B; ++k) p_.reset.push_back(random_() % 4 == 0);
    p_.forward();
    p_.backward();
  }

  // What went wrong, or nothing.
  std::string run(Family family) {
    const Case& c = p_.c;
    LayerShape shape{};
    shape.dtype = arithmetic == Arithmetic::float64    ? Dtype::float64
                  : arithmetic == Arithmetic::float16  ? Dtype::float16
                  : arithmetic == Arithmetic::bfloat16 ? Dtype::bfloat16
                                                       : Dtype::float32;
    shape.T = c.T, shape.B = c.B, shape.D = c.D, shape.H = c.H, shape.P = p_.P;
    shape.reversed = c.reversed, shape.projected = c.P != 0;
    const CudaDevice device{90, 132, 232448};
    CudaPlan plan =
        plan_cuda(shape, {arithmetic == Arithmetic::tf32, false, int(family), 0}, device);
    if (!plan.possible) return {};

    std::vector<const void*> w_hh, w_hr;
    std::vector<std::unique_ptr<emulation::DeviceBuffer<Element>>> weights;
    for (int64_t d = 0; d < c.D; ++d) {
      const auto part = [&](const Values& all, int64_t size) {
        const Values one(all.begin() + d * size, all.begin() + (d + 1) * size);
        weights.push_back(std::make_unique<emulation::DeviceBuffer<Element>>(elements(one)));
        return weights.back()->data();
      };
      w_hh.push_back(part(p_.w_hh, 4 * c.H * p_.P));
      if (c.P) w_hr.push_back(part(p_.w_hr, p_.P * c.H));
    }
    using Elements = emulation::DeviceBuffer<Element>;
    using Computes = emulation::DeviceBuffer<Compute>;
    const Elements h0(elements(p_.h0)), c0(elements(p_.c0)), gates(elements(p_.gates_x));
    const emulation::DeviceBuffer<int64_t> lengths(p_.lengths);
    const emulation::DeviceBuffer<uint8_t> reset(p_.reset);
    const Elements y(p_.y.size()), h_n(p_.h_n.size()), c_n(p_.c_n.size());
    const Computes cells(p_.cells.size());

    RecurrenceForward f{};
    f.shape = shape;
    f.w_hh = w_hh.data(), f.w_hr = c.P ? w_hr.data() : nullptr;
    f.h0 = c.state ? h0.data() : nullptr, f.c0 = c.state ? c0.data() : nullptr;
    f.lengths = c.lengths ? lengths.data() : nullptr;
    f.reset = c.reset ? reset.data() : nullptr;
    f.gates = gates.data(), f.save = true;
    f.y = y.data(), f.h_n = h_n.data(), f.c_n = c_n.data(), f.c = cells.data();
    {
      const emulation::DeviceBuffer<char> scratch(size_t(rec_step_scratch(shape, plan, false)));
      const Status status = family == Family::rec_cta
                                ? rec_cta_forward(f, plan, {})
                                : rec_step_forward(f, plan, scratch.data(), {});
      if (!status.ok()) return status.message;
    }
    check("y", y.values(), p_.y), check("h_n", h_n.values(), p_.h_n);
    check("c_n", c_n.values(), p_.c_n), check("c", cells.values(), p_.cells);

    const Elements dy(elements(p_.dy)), dh_n(elements(p_.dh_n)), dc_n(elements(p_.dc_n));
    const Computes dc(std::vector<Compute>(p_.dc.begin(), p_.dc.end()));
    const Elements dgates(p_.dgates.size()), dh(p_.dh.size()), dh0(p_.dh0.size()),
        dc0(p_.dc0.size());
    RecurrenceBackward b{};
    b.shape = shape;
    b.w_hh = f.w_hh, b.w_hr = f.w_hr, b.c0 = f.c0, b.lengths = f.lengths, b.reset = f.reset;
    b.gates = gates.data(), b.c = cells.data(), b.dy = dy.data();
    if (c.all_gradients) b.dh_n = dh_n.data(), b.dc_n = dc_n.data(), b.dc = dc.data();
    b.dgates = dgates.data(), b.dh = c.P ? dh.data() : nullptr;
    if (c.state) b.dh0 = dh0.data(), b.dc0 = dc0.data();
    plan = plan_cuda(shape, {arithmetic == Arithmetic::tf32, true, int(family), 0}, device);
    {
      const emulation::DeviceBuffer<char> scratch(size_t(rec_step_scratch(shape, plan, true)));
      const Status status = family == Family::rec_cta
                                ? rec_cta_backward(b, plan, {})
                                : rec_step_backward(b, plan, scratch.data(), {});
      if (!status.ok()) return status.message;
    }
    check("dgates", dgates.values(), p_.dgates);
    if (c.P) check("dh", dh.values(), p_.dh);
    if (c.state) check("dh0", dh0.values(), p_.dh0), check("dc0", dc0.values(), p_.dc0);
    return complaint_;
  }

 private:
  Values draw(int64_t count, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    Values values(static_cast<size_t>(count));
    for (double& v : values) v = double(to_compute(narrow<Element>(uniform(random_))));
    return values;
  }

  static std::vector<Element> elements(const Values& values) {
    std::vector<Element> result;
    for (double v : values) result.push_back(narrow<Element>(v));
    return result;
  }

  // norm(out - expected) / norm(expected), which a NaN never passes.
  template <class T>
  void check(const char* name, const std::vector<T>& out, const Values& expected) {
    double difference = 0, norm = 0;
    for (size_t k = 0; k < expected.size(); ++k) {
      difference += std::pow(double(to_compute(out[k])) - expected[k], 2);
      norm += expected[k] * expected[k];
    }
    const double error = std::sqrt(difference / norm);
    const double bound = arithmetic == Arithmetic::float64    ? 1e-12
                         : arithmetic == Arithmetic::float32  ? 5e-6
                         : arithmetic == Arithmetic::bfloat16 ? 3e-2
                         : arithmetic == Arithmetic::float16  ? 4e-3
                                                              : 2e-3;
    if (!(error <= bound)) {
      char text[128];
      std::snprintf(text, sizeof text, "%s is wrong by %.2g; ", name, error);
      complaint_ += text;
    }
  }

  std::mt19937 random_;
  Problem p_;
  std::string complaint_;
};

template <Arithmetic arithmetic>
int run_all(Family family, int only) {
  int failed = 0, number = 0;
  for (const Case& c : kCases) {
    const int current = number++;
    if (only >= 0 && only != current) continue;
    const std::string complaint = Runner<arithmetic>(c, unsigned(current + 1)).run(family);
    if (complaint.empty()) continue;
    ++failed;
    std::printf("case %d: %s\n", current, complaint.c_str());
  }
  return failed != 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  const std::string family_name = argv[1], arithmetic = argv[2], order = argv[3];
  auto& settings = emulation::settings();
  settings.seed = std::stoull(argv[4]);
  settings.order = order == "forward"   ? emulation::Order::forward
                   : order == "reverse" ? emulation::Order::reverse
                                        : emulation::Order::random;
  const Family family = family_name == "rec_cta" ? Family::rec_cta : Family::rec_step;
  const int only = argc > 5 ? std::stoi(argv[5]) : -1;
  if (arithmetic == "float64") return run_all<Arithmetic::float64>(family, only);
  if (arithmetic == "float32") return run_all<Arithmetic::float32>(family, only);
  if (arithmetic == "tf32") return run_all<Arithmetic::tf32>(family, only);
  if (arithmetic == "float16") return run_all<Arithmetic::float16>(family, only);
  if (arithmetic == "bfloat16") return run_all<Arithmetic::bfloat16>(family, only);
  return 2;
}
