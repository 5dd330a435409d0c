#include "recurrence_problem.hpp"

#include <cmath>

namespace lstm_cuda::test {

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

std::vector<std::pair<int64_t, bool>> Problem::steps(int64_t b, int64_t d) const {
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

Values Problem::gates_with_h0() const {
  Values sums = gates_x;
  for (int64_t d = 0; c.state && d < c.D; ++d)
    for (int64_t b = 0; b < c.B; ++b) {
      const auto list = steps(b, d);
      if (list.empty() || list.front().second) continue;
      for (int64_t r = 0; r < 4 * c.H; ++r)
        for (int64_t k = 0; k < P; ++k)
          sums[size_t(row(list.front().first, b, d) * 4 * c.H + r)] +=
              w_hh[size_t((d * 4 * c.H + r) * P + k)] * h0[size_t((d * c.B + b) * P + k)];
    }
  return sums;
}

void Problem::forward() {
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

void Problem::backward() {
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
        carry.assign(size_t(P), 0);
        for (int64_t r = 0; !fresh && r < 4 * H; ++r)
          for (int64_t j = 0; j < P; ++j)
            carry[size_t(j)] += w_hh[size_t((d * 4 * H + r) * P + j)] * g[size_t(r)];
      }
      for (int64_t j = 0; j < P; ++j) dh0[size_t((d * c.B + b) * P + j)] = carry[size_t(j)];
      for (int64_t j = 0; j < H; ++j) dc0[size_t((d * c.B + b) * H + j)] = ds[size_t(j)];
    }
}

}  // namespace lstm_cuda::test
