#include "plan.h"

#include <span>

#include "plan_model.h"

namespace lstm_cuda {
namespace {

using model::ceil_div;

Arithmetic arithmetic_of(Dtype dtype, bool allow_tf32) {
  switch (dtype) {
    case Dtype::float64:
      return Arithmetic::float64;
    case Dtype::float32:
      return allow_tf32 ? Arithmetic::tf32 : Arithmetic::float32;
    case Dtype::float16:
      return Arithmetic::float16;
    default:
      return Arithmetic::bfloat16;
  }
}

// What is said of a family: why it was chosen, and why not.
struct Words {
  const char *name, *chosen, *refused, *wide, *shared, *counts;
};
constexpr Words kWords[] = {
    {"rec_cta", "the weights fit the registers of one block",
     "rec_cta could not be launched on this device",
     "the weights do not fit the registers of one block",
     "rec_cta needs more shared memory than the device has",
     "more steps or rows than rec_cta counts"},
    {"rec_cluster", "the weights fit the registers of a cluster",
     "rec_cluster could not be launched on this device",
     "the weights do not fit the registers of a cluster",
     "rec_cluster needs more shared memory than the device has",
     "more steps or rows than rec_cluster counts"},
    {"rec_group", "the weights fit the blocks of a group",
     "rec_group could not be launched on this device",
     "the weights do not fit the blocks of a group",
     "rec_group needs more shared memory than the device has",
     "more steps or rows than rec_group counts"},
    {"rec_step", nullptr, "rec_step could not be launched on this device", nullptr,
     "the device has too little shared memory", nullptr},
};
const Words& words(Family family) { return kWords[int(family)]; }

// Where rec_step is chosen though others could run the layer.
constexpr const char* kFewSteps =
    "so few steps that loading all weights at first would take longer";
constexpr int64_t kLong = 1 << 20;  // steps
constexpr const char* kManyRows =
    "so many rows that reading the weights at every step costs little";
constexpr const char* kNarrow =
    "so narrow a projection that its products cost less than those with it folded into the weights";

int padded_hidden(int64_t H) { return H <= 32 ? 32 : H <= 64 ? 64 : 128; }

// The compiled shape that holds H; null if there is none.
const ResidentShape* resident_shape(Family family, CellKind cell, Arithmetic arithmetic,
                                    int64_t H) {
  using Shapes = std::span<const ResidentShape>;
  const bool exact = parts_of(arithmetic) == 2;
  const Shapes of_cluster =
      cell == CellKind::plain ? Shapes(kClusterShapes) : Shapes(kClusterShapesVariant);
  const Shapes shapes = family == Family::rec_cluster
                            ? (exact ? Shapes(kClusterShapesExact) : of_cluster)
                            : (exact ? Shapes(kGroupShapesExact) : Shapes(kGroupShapes));
  const auto found = std::find_if(shapes.begin(), shapes.end(),
                                  [H](const ResidentShape& each) { return H <= each.hidden; });
  return found == shapes.end() ? nullptr : &*found;
}

bool has_clusters(const CudaDevice& device) {
  return device.architecture == 90 || device.architecture == 100 || device.architecture == 103;
}

// The largest tile that still gives most multiprocessors a block; padding of a small batch costs
// more than it saves.
StepTile step_tile(const LayerShape& s, const CudaDevice& device, Arithmetic arithmetic,
                   bool backward) {
  const int64_t rows = backward ? s.H : 4 * s.H;
  const auto blocks = [&](int64_t tile_rows, int64_t columns) {
    return double(ceil_div(rows, tile_rows)) * double(ceil_div(s.B, columns) * s.D);
  };
  const auto fits = [&](StepTile tile) { return device.shared_bytes >= step_shared_bytes(tile); };
  if (fits(StepTile::large) && arithmetic != Arithmetic::float64 && s.B > 32 &&
      blocks(128, 64) * 4 >= 3.0 * device.multiprocessors)
    return StepTile::large;
  if (fits(StepTile::medium) && s.B > 16 && 2 * blocks(64, 32) >= device.multiprocessors)
    return StepTile::medium;
  return StepTile::small;
}
int columns_of(StepTile tile) {
  return tile == StepTile::small ? 16 : tile == StepTile::medium ? 32 : 64;
}

// Why rec_cluster or rec_group cannot run it; null if it can.
const char* why_not_resident(Family family, const LayerShape& s, Arithmetic arithmetic,
                             const CudaRequest& request, const CudaDevice& device) {
  if (arithmetic == Arithmetic::float64) return "only rec_cta and rec_step multiply in float64";
  const ResidentShape* const shape = resident_shape(family, request.cell, arithmetic, s.H);
  if (!shape) return words(family).wide;
  if (request.cell != CellKind::plain) {
    if (family == Family::rec_group) return "rec_group has no other cells than torch.nn.LSTM's";
    if (request.large_h && (arithmetic == Arithmetic::float32 || arithmetic == Arithmetic::tf32))
      return "rec_cluster multiplies float32 as float16, which has no room for a large h";
  }
  if (family == Family::rec_cluster && !has_clusters(device))
    return "rec_cluster needs compute capability 9.0, 10.0 or 10.3";
  if (family == Family::rec_group && device.multiprocessors < shape->blocks)
    return "a group has more blocks than the device has multiprocessors";
  if (device.shared_bytes < resident_shared_bytes(family, arithmetic, *shape, 1))
    return words(family).shared;
  if (ceil_div(s.B, 8) > kMostOfCta / (s.D * shape->blocks)) return words(family).counts;
  return nullptr;
}

// Why the family cannot run it; null if it can.
const char* why_not(Family family, const LayerShape& s, Arithmetic arithmetic,
                    const CudaRequest& request, const CudaDevice& device) {
  if (device.architecture < 80) return "the device is older than compute capability 8.0";
  if (family == Family::rec_step)
    return device.shared_bytes < step_shared_bytes(StepTile::small) ? words(family).shared
                                                                    : nullptr;
  if (request.cell != CellKind::plain && s.projected)
    return "only rec_step has projections of other cells than torch.nn.LSTM's";
  if (s.T > kMostOfCta) return words(family).counts;
  if (family != Family::rec_cta) return why_not_resident(family, s, arithmetic, request, device);
  if (s.H > widest_cta(arithmetic, request.cell, request.backward)) return words(family).wide;
  if (device.shared_bytes < kCtaSharedBytes) return words(family).shared;
  if (ceil_div(s.B, 8) > kMostOfCta / s.D) return words(family).counts;
  return nullptr;
}

// The plan's part that only rec_cluster and rec_group have: as many column tiles as make the
// recurrence shortest, of equal ones the fewest, in one turn or two. What was asked for may not be
// compiled: then no tiles.
void choose_tiles(CudaPlan& plan, const LayerShape& s, const CudaRequest& request,
                  const CudaDevice& device) {
  plan.resident = *resident_shape(plan.family, request.cell, plan.arithmetic, s.H);
  const int most = most_tiles(plan.arithmetic, plan.resident);
  const auto wanted = [&](int tiles, int turns) {
    return has_turns(plan.family, request.cell, plan.resident, tiles, turns) &&
           (!request.columns || request.columns == 8 * tiles) &&
           (!request.turns || request.turns == turns) &&
           device.shared_bytes >=
               resident_shared_bytes(plan.family, plan.arithmetic, plan.resident, tiles);
  };
  const auto consider = [&](int tiles, int turns) {
    if (!wanted(tiles, turns)) return;
    int groups = 0;
    double us;
    if (plan.family == Family::rec_group) {
      groups = int(std::clamp<int64_t>(ceil_div(s.B, 8 * tiles) * s.D, 1,
                                       device.multiprocessors / plan.resident.blocks));
      us = model::group_us(s, plan.arithmetic, plan.resident, tiles, groups, request.backward,
                           device);
    } else {
      us = model::cluster_us(s, request.cell, plan.arithmetic, plan.resident, tiles, turns,
                             request.backward, device);
    }
    if (plan.column_tiles > 0 && us >= plan.estimated_us) return;
    plan.column_tiles = tiles;
    plan.turns = turns;
    plan.groups = groups;
    plan.estimated_us = us;
  };
  for (int tiles = 1; tiles <= most; tiles *= 2)
    for (int turns : {1, 2}) consider(tiles, turns);
  plan.pack_beside =
      !request.backward && model::worth_packing_beside(s, plan.arithmetic, plan.resident.hidden);
}

// The plan for a family, forced or not; where it cannot run the layer the reason says why.
CudaPlan plan_family(Family family, const LayerShape& s, Arithmetic arithmetic,
                     const CudaRequest& request, const CudaDevice& device) {
  const bool backward = request.backward;
  CudaPlan plan{};
  plan.family = family;
  plan.arithmetic = arithmetic;
  plan.reason = why_not(family, s, arithmetic, request, device);
  plan.possible = !plan.reason;
  if (!plan.possible) return plan;
  plan.reason = words(family).chosen;
  if (family == Family::rec_cta) {
    plan.padded_hidden = padded_hidden(s.H);
    plan.estimated_us =
        model::cta_us(s, request.cell, arithmetic, plan.padded_hidden, backward, device);
  } else if (family == Family::rec_step) {
    plan.tile = step_tile(s, device, arithmetic, backward);
    plan.overlap = device.architecture >= 90;
    plan.estimated_us =
        model::launches_us(s, request.cell, arithmetic, columns_of(plan.tile), backward, device);
  } else {
    choose_tiles(plan, s, request, device);
    if (plan.column_tiles == 0) {
      plan.possible = false;
      plan.reason = "no kernel of this family is compiled for so many batch rows and turns";
    }
  }
  plan.folds_projection = s.projected && family != Family::rec_step;
  if (plan.folds_projection)
    plan.estimated_us += model::folding_us(s, arithmetic, family, backward, device);
  return plan;
}

}  // namespace

const char* name_of(Family family) { return words(family).name; }

const char* name_of(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::float64:
      return "float64";
    case Arithmetic::float32:
      return "float32";
    case Arithmetic::tf32:
      return "tf32";
    case Arithmetic::float16:
      return "float16";
    default:
      return "bfloat16";
  }
}

const char* name_of(StepTile tile) {
  return tile == StepTile::small ? "small" : tile == StepTile::medium ? "medium" : "large";
}

CudaPlan plan_cuda(const LayerShape& shape, const CudaRequest& request, const CudaDevice& device) {
  const Arithmetic arithmetic = arithmetic_of(shape.dtype, request.allow_tf32);
  const auto refused = [&](Family family) { return (request.refused >> int(family) & 1) != 0; };
  const auto plan_for = [&](Family family) {
    return plan_family(family, shape, arithmetic, request, device);
  };
  if (request.forced >= 0) {
    CudaPlan plan = plan_for(Family(request.forced));
    if (plan.possible && refused(plan.family)) {
      plan.possible = false;
      plan.reason = words(plan.family).refused;
    } else if (plan.possible) {
      plan.reason = "forced";
    }
    return plan;
  }

  // Of equal estimates, the family that is named first.
  CudaPlan best{}, ideal{};  // of what may be launched here; of all that could run it
  const char* obstacle = nullptr;
  bool only_width = true, others = false;
  for (Family family : kFamilies) {
    const CudaPlan plan = plan_for(family);
    if (!plan.possible) {
      if (family == Family::rec_step) return plan;  // then nothing runs it
      // Wider families follow, so a layer's width is an obstacle only in the last of them.
      if (only_width) obstacle = plan.reason;
      only_width = only_width && plan.reason == words(family).wide;
      continue;
    }
    others |= family != Family::rec_step;
    if (!ideal.possible || plan.estimated_us < ideal.estimated_us) ideal = plan;
    // There is nothing to make way for rec_step, so it never does.
    if (refused(family) && family != Family::rec_step) continue;
    if (!best.possible || plan.estimated_us < best.estimated_us) best = plan;
  }
  if (best.family != ideal.family) {
    best.reason = words(ideal.family).refused;
  } else if (best.family == Family::rec_step) {
    LayerShape longer = shape;
    longer.T = std::max(shape.T, kLong);
    LayerShape plain = longer;
    plain.P = plain.H;
    plain.projected = false;
    CudaRequest anything = request;
    anything.refused = 0;
    const auto never = [&](const LayerShape& s) {
      return plan_cuda(s, anything, device).family == best.family;
    };
    best.reason = !others                             ? obstacle
                  : shape.T < kLong && !never(longer) ? kFewSteps
                  : shape.projected && !never(plain)  ? kNarrow
                                                      : kManyRows;
  }
  return best;
}

int64_t packed_layout(const CudaPlan& plan) {
  if (plan.family != Family::rec_cluster && plan.family != Family::rec_group) return 0;
  const ResidentShape& shape = plan.resident;
  return ((int64_t(shape.hidden) * 256 + shape.blocks) * 16 + int64_t(plan.family)) * 16 +
         int64_t(plan.arithmetic);
}

bool plan_of_layout(int64_t layout, CudaPlan& plan) {
  for (Family family : {Family::rec_cluster, Family::rec_group}) {
    for (Arithmetic arithmetic :
         {Arithmetic::float32, Arithmetic::tf32, Arithmetic::float16, Arithmetic::bfloat16}) {
      plan = {};
      plan.possible = true;
      plan.family = family;
      plan.arithmetic = arithmetic;
      for (int64_t hidden = 1;;) {
        const ResidentShape* const shape =
            resident_shape(family, CellKind::plain, arithmetic, hidden);
        if (!shape) break;
        plan.resident = *shape;
        if (packed_layout(plan) == layout) return true;
        hidden = shape->hidden + 1;
      }
    }
  }
  return false;
}

}  // namespace lstm_cuda
