// How the forward recurrence of families rec_cta, rec_cluster and rec_group (rec_forward.cuh) is laid out
// over warps: compile-time sizes, and who a warp is.
#pragma once

#include <algorithm>
#include <type_traits>

#include "element.cuh"
#include "families.h"
#include "resident.h"

namespace lstm_cuda::resident {

template <Arithmetic arithmetic_, ResidentShape shape_, int tiles_, int turns_,
          CellKind cell_ = CellKind::plain>
struct ForwardConfig {
  static constexpr CellKind kCell = cell_;
  static constexpr Arithmetic arithmetic = arithmetic_;
  static constexpr ResidentShape shape = shape_;
  static constexpr ForwardFragments fragments{shape};
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  // Of gates_x: what is normalised by itself is given unrounded.
  using Given = std::conditional_t<kCell == CellKind::norm, Compute, Element>;
  static constexpr int kParts = parts_of(arithmetic);
  // Column tiles of one turn, and turns of one step: a part has kTiles * kTurns.
  static constexpr int kTiles = tiles_, kTurns = turns_, kColumns = 8 * kTiles * kTurns;
  static constexpr int kUnits = shape.units(), kThreads = shape.threads();
  static constexpr int kSplit = shape.split, kGroups = fragments.row_groups();
  static constexpr int kOctets = fragments.octets(), kSteps = fragments.steps();
  // Pair j of a row group and turn, octet j / kTiles and column tile j % kTiles, is owned by warp
  // j % kOwners of it. Pair i of a warp is pair i % kOwned of turn i / kOwned.
  static constexpr int kPairs = kOctets * kTiles;
  static constexpr int kOwners = std::min(kPairs, kSplit), kOwned = kPairs / kOwners;
  static constexpr int kAll = kTurns * kOwned;
  // An mma answers late: a warp keeps at least four sums going.
  static constexpr int kChains = 2 * kOctets * kTiles * kParts < 4 ? 2 : 1;
  // Of a ring: a slot has of each gate and column 8 units, for ldmatrix, or with a pitch that keeps
  // columns' banks apart. gates_x is fetched kSlots - 1 steps ahead; two slots where four would take
  // too much.
  static constexpr int kPitch = sizeof(Given) == 2 ? 8 : sizeof(Given) == 4 ? 12 : 10;
  static constexpr int kSlotValues = 4 * 8 * kPitch;
  static constexpr int kMostOfRing = (kCell == CellKind::norm ? 64 : 100) * 1024;
  static constexpr int kSlots =
      4 * kGroups * kOwners * kAll * kSlotValues * int(sizeof(Given)) <= kMostOfRing ? 4 : 2;
  static_assert(kUnits % (8 * kGroups) == 0 && kPairs % kOwners == 0 && kSteps % 2 == 0);
};

// In the place of what other cells than torch.nn.LSTM's need.
struct Nothing {};

// Who a warp is.
template <class F>
struct WarpRole {
  unsigned team;  // in the launch
  int block;      // in the team
  int group, split;
  int own;  // among the owners of the row group; of a warp that owns nothing, 0

  LSTM_DEVICE WarpRole()
      : team(ptx::block_index() / F::shape.blocks),
        block(int(ptx::block_index() % F::shape.blocks)),
        group(warp() % F::kGroups),
        split(warp() / F::kGroups),
        own(owner() ? split : 0) {}

  LSTM_DEVICE bool owner() const { return split < F::kOwners; }
  // Of its pair i: the column tile, and the unit of lane 0.
  LSTM_DEVICE int tile(int i) const {
    return i / F::kOwned * F::kTiles + (i % F::kOwned * F::kOwners + own) % F::kTiles;
  }
  LSTM_DEVICE int unit(int i) const {
    const int octet = group * F::kOctets + (i % F::kOwned * F::kOwners + own) / F::kTiles;
    return block * F::kUnits + octet * 8;
  }
};

}  // namespace lstm_cuda::resident
