// A whole layer, as stages that a team of workers goes through: weights are packed, then the
// recurrences run, in parts of the batch that need nothing of each other or, where rows are few and
// weights many, step by step together (CpuPlan). One table of entry points for each instruction
// set.
#pragma once

// Each needs those before it.
// clang-format off
#include "../cell.h"
#include "../random.h"
#include "simd.h"
#include "denormals.h"
#include "product.h"
#include "variant.h"
#include "step_rows.h"
#include "forward_weights.h"
#include "forward_input.h"
#include "forward_variant.h"
#include "forward.h"
#include "backward_weights.h"
#include "chunk_gradients.h"
#include "backward_variant.h"
#include "backward.h"
#include "gradients.h"
#include "changes.h"
#include "cell_gradients.h"
#include "sequence_products.h"
// clang-format on

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
class Layer {
  using T = typename M::Compute;

 public:
  // With a null block nothing is run; the return value is the room that is needed, in bytes.
  static int64_t forward(const LayerForward& p, const CpuPlan& given, const Parallel& parallel,
                         void* block) {
    CpuPlan plan = given;
    if (p.variant) plan.recurrent = Weights::packed;  // products apart from the cell
    if (!p.w_ih) plan.input_within_step = false;
    using Job = ForwardJob<S, M>;
    const LayerShape& s = p.shape;
    Arena arena(block);
    std::vector<ForwardWeights<M>> weights(s.D);
    for (auto& w : weights) w.reserve(arena, p, plan);
    std::vector<Job> jobs;  // part by part, directions within
    jobs.reserve(plan.parts * s.D);
    for (int64_t k = 0; k < plan.parts * s.D; ++k)
      jobs.emplace_back(p, plan, weights[k % s.D], k % s.D, k / s.D, arena);
    std::vector<typename Job::Walk> walks = walks_of(jobs, plan, s.D, arena);
    if (!block) return arena.used();

    Team team(plan.workers);
    parallel.for_each(team.workers(), [&](int64_t id) {
      const FlushDenormals guard;
      Team::Worker worker(team, int(id));
      const int64_t groups = ForwardWeights<M>::groups(s.H);
      const int64_t pieces = groups + (s.projected ? weights[0].w_hr.count() : 0);
      worker.each(s.D * pieces, [&](int64_t item) {
        const int64_t d = item / pieces, n = item % pieces;
        n < groups ? weights[d].template pack<S>(p, d, n)
                   : weights[d].template pack_projection<S>(p, d, n - groups);
      });
      if (plan.in_step) return Job::run(jobs.data(), walks.data() + id * s.D, s.D, worker);
      worker.each(int64_t(jobs.size()), [&](int64_t k) {
        Team alone(1);
        Team::Worker self(alone, 0);
        Job::run(&jobs[k], &walks[k], 1, self);
      });
    });
    return arena.used();
  }

  static int64_t backward(const LayerBackward& p, const CpuPlan& plan, const Parallel& parallel,
                          void* block) {
    const LayerShape& s = p.shape;
    const int64_t rows = (s.B + plan.parts - 1) / plan.parts, chunk = plan.chunk_steps(rows),
                  count = plan.parts * s.D;
    const bool one_chunk = p.others.before % chunk + s.T <= chunk && plan.parts == 1;
    Arena arena(block);
    std::vector<BackwardWeights<M>> weights(s.D);
    for (auto& w : weights) w.reserve(arena, p, one_chunk);
    const std::vector<WeightSums<T>> dw = weight_sums(p, plan, arena);
    std::vector<ChunkGradients<S, M>>
        chunks;  // part by part, directions within; so are the jobs and the products
    chunks.reserve(count);
    for (int64_t k = 0; k < count; ++k)
      chunks.emplace_back(p, plan, k % s.D, k / s.D, std::min(s.T, chunk), arena);
    Backward run;
    run.jobs.reserve(count);
    run.products.reserve(count);
    for (int64_t k = 0; k < count; ++k)
      run.jobs.emplace_back(p, weights[k % s.D], chunks[k], arena);
    for (int64_t k = 0; k < count; ++k)
      run.products.emplace_back(p, weights[k % s.D], chunks[k], dw[k], plan.span_steps(rows),
                                arena);
    run.walks = walks_of(run.jobs, plan, s.D, arena);
    run.lists.reserve(plan.workers);
    for (int k = 0; k < plan.workers; ++k) run.lists.push_back(run.products.back().walk(arena));
    if (!block) return arena.used();

    Team team(plan.workers);
    parallel.for_each(team.workers(), [&](int64_t id) {
      const FlushDenormals guard;
      Team::Worker worker(team, int(id));
      const int64_t pieces = weights[0].count();
      worker.each(s.D * pieces, [&](int64_t item) {
        weights[item / pieces].template pack<S>(p, item / pieces, item % pieces);
      });
      if (plan.in_step) {
        run.part(0, &run.walks[id * s.D], run.lists[id], p, chunk, worker);
      } else {
        worker.each(plan.parts, [&](int64_t part) {
          Team alone(1);
          Team::Worker self(alone, 0);
          run.part(part, &run.walks[part * s.D], run.lists[id], p, chunk, self);
        });
      }
      if (p.dw_hh) add_parts(p, dw, plan, worker);
    });
    return arena.used();
  }

 private:
  // Workers in step each have a walk for every job; otherwise a job has one, of whoever runs it.
  template <class Job>
  static std::vector<typename Job::Walk> walks_of(const std::vector<Job>& jobs, const CpuPlan& plan,
                                                  int64_t D, Arena& arena) {
    const int64_t count = plan.in_step ? plan.workers * D : int64_t(jobs.size());
    std::vector<typename Job::Walk> walks;
    walks.reserve(count);
    for (int64_t k = 0; k < count; ++k) walks.push_back(jobs[plan.in_step ? k % D : k].walk(arena));
    return walks;
  }

  using Sizes = typename WeightGradients<T>::Sizes;

  // Those of direction d, of the whole batch.
  static WeightGradients<T> result(const LayerBackward& p, int64_t d) {
    const Sizes size(p);
    return {static_cast<T*>(p.dw_ih) + d * size.w_ih, static_cast<T*>(p.dw_hh) + d * size.w_hh,
            static_cast<T*>(p.db) + d * size.b, static_cast<T*>(p.dw_hr) + d * size.w_hr,
            size.more ? static_cast<T*>(p.variant->dmore) + d * size.more : nullptr};
  }

  // Where a call has all steps, the first part sums in the result, the others beside it.
  static std::vector<WeightSums<T>> weight_sums(const LayerBackward& p, const CpuPlan& plan,
                                                Arena& arena) {
    const int64_t D = p.shape.D;
    const Sizes size(p);
    std::vector<WeightSums<T>> dw(plan.parts * D);
    for (int64_t k = 0; p.sums_weights() && k < plan.parts * D; ++k) {
      if (p.sums) {
        T* const own = static_cast<T*>(p.sums) + 2 * k * size.all();
        dw[k] = {WeightGradients<T>::at(own, size), WeightGradients<T>::at(own + size.all(), size)};
      } else if (k < D) {
        dw[k].all = result(p, k);
      } else {
        dw[k].all = {arena.take<T>(size.w_ih), arena.take<T>(size.w_hh), arena.take<T>(size.b),
                     arena.take<T>(size.w_hr), arena.take<T>(size.more)};
      }
    }
    return dw;
  }

  // Adds what all parts found, in their order.
  static void add_parts(const LayerBackward& p, const std::vector<WeightSums<T>>& dw,
                        const CpuPlan& plan, Team::Worker& worker) {
    const int64_t D = p.shape.D, slices = worker.workers();
    const Sizes size(p);
    worker.each(D * slices, [&](int64_t item) {
      const int64_t d = item / slices, slice = item % slices;
      const auto add = [&](T* WeightGradients<T>::* member, int64_t count) {
        const int64_t first = slice * count / slices, last = (slice + 1) * count / slices;
        T* const sum = result(p, d).*member;
        if (p.sums) std::copy(dw[d].all.*member + first, dw[d].all.*member + last, sum + first);
        for (int64_t part = 1; part < plan.parts; ++part) {
          const T* const more = dw[part * D + d].all.*member;
          for (int64_t k = first; k < last; ++k) sum[k] += more[k];
        }
      };
      add(&WeightGradients<T>::w_ih, size.w_ih);
      add(&WeightGradients<T>::w_hh, size.w_hh);
      add(&WeightGradients<T>::b, size.b);
      add(&WeightGradients<T>::w_hr, size.w_hr);
      add(&WeightGradients<T>::more, size.more);
    });
  }

  struct Backward {
    using Job = BackwardJob<S, M>;
    using Products = GradientJob<S, M>;
    std::vector<Job> jobs;
    std::vector<Products> products;
    std::vector<typename Job::Walk> walks;
    std::vector<typename Products::Walk> lists;  // each worker's, for one direction at a time

    // All directions of one part of the batch, by the workers of one team.
    void part(int64_t part, typename Job::Walk* mine, typename Products::Walk& list,
              const LayerBackward& p, int64_t chunk, Team::Worker& worker) {
      const LayerShape& s = p.shape;
      const int64_t before = p.others.before;
      Job* const job = &jobs[part * s.D];
      const Products* const product = &products[part * s.D];
      for (int64_t d = 0; d < s.D; ++d) job[d].begin(mine[d]);
      worker.each(s.D, [&](int64_t d) {
        job[d].start();
        product[d].start();
      });
      for (int64_t last = s.T; last > 0;) {
        const int64_t first = std::max<int64_t>(0, (before + last - 1) / chunk * chunk - before);
        Job::run_chunk(job, mine, s.D, first, last, worker);
        for (int64_t d = 0; d < s.D; ++d) multiply(product[d], list, first, last, worker);
        last = first;
      }
      const int64_t panels = job[0].panels();
      worker.each(s.D * panels, [&](int64_t item) {
        const int64_t d = item / panels;
        job[d].finish(mine[d], item % panels);
      });
    }

    static void multiply(const Products& product, typename Products::Walk& list, int64_t first,
                         int64_t last, Team::Worker& worker) {
      product.plan_chunk(list, first, last);
      worker.each(product.input_items() + product.transpose_items(), [&](int64_t item) {
        const int64_t transpose = item - product.input_items();
        transpose < 0 ? product.input_gradient(list, item)
                      : product.transpose_item(list, transpose);
      });
      worker.each(product.weight_items(worker.workers()),
                  [&](int64_t item) { product.weight_item(list, item, worker.workers()); });
    }
  };
};

#define LSTM_LAYER(S, M)                            \
  {&Layer<S, M>::forward,                           \
   &Layer<S, M>::backward,                          \
   &Changes<typename M::Compute>::run,              \
   &CellGradientsJob<typename M::Compute>::run,     \
   &SequenceProducts<typename M::Compute>::product, \
   &SequenceProducts<typename M::Compute>::outer_products}

}  // namespace lstm_cuda::LSTM_CPU_ISA
