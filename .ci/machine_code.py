"""What the machine code of a kernel says, as `cuobjdump -sass` lists it.

Of kernels whose weights stay (families rec_cluster and rec_group) the loop over the steps is
looked at, because all time is spent there: the number of its products and of its sends is known
from the kernel's template arguments, and a fence there would take as long as a whole step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Of enum class Arithmetic; products of float32 are three, of two parts each.
EXACT = 1
NORM = "2"  # of enum class CellKind
# MEMBAR waits for all stores, ERRBAR belongs to a release of the whole device.
FENCES = ("MEMBAR", "ERRBAR")


@dataclass(frozen=True)
class Instruction:
    """One line: where it stands, under which condition, what it does and with what."""

    address: int
    condition: str  # a predicate, or ""
    opcode: str  # with all modifiers
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where it may go on instead."""
        if self.name not in ("BRA", "JMP", "WARPSYNC") or not self.operands:
            return None
        last = self.operands[-1]
        return int(last, 16) if re.fullmatch(r"0x[0-9a-f]+", last) else None

    @property
    def goes_on(self) -> bool:
        """Whether the next line may follow."""
        if self.name == "BRA":  # may have its condition as an operand
            return bool(self.condition) or len(self.operands) > 1
        return bool(self.condition) or self.name not in ("EXIT", "JMP", "RET")


def read_functions(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of each function, by mangled name."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in sass.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = functions.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?(\S+)(.*?);", line):
            condition = "" if match[2] in (None, "PT", "UPT") else match[2]
            operands = tuple(part.strip() for part in match[4].split(",") if part.strip())
            code.append(Instruction(int(match[1], 16), condition, match[3], operands))
    return functions


def local_accesses(code: Sequence[Instruction]) -> int:
    """Loads and stores of local memory."""
    return sum(each.name in ("LDL", "STL") for each in code)


def product_loops(code: Sequence[Instruction]) -> list[Counter[str]]:
    """How often each instruction stands in each loop with products in it; the outermost loops.

    A loop is all that can be reached from a product and from which the product can be reached
    again: also what the compiler has moved to the end of the function. A product that is in no
    loop counts as one of a single instruction.
    """
    place = {each.address: index for index, each in enumerate(code)}
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for index, each in enumerate(code):
        following = [index + 1] if each.goes_on and index + 1 < len(code) else []
        if each.target is not None and each.target in place:
            following.append(place[each.target])
        for other in following:
            after[index].append(other)
            before[other].append(index)
    waiting = [index for index, each in enumerate(code) if each.name == "HMMA"]
    loops = []
    while waiting:
        inside = _reached(waiting[0], after) & _reached(waiting[0], before)
        loops.append(Counter(code[index].name for index in inside))
        waiting = [index for index in waiting if index not in inside]
    return loops


def _reached(start: int, following: Sequence[Sequence[int]]) -> set[int]:
    seen, waiting = {start}, [start]
    while waiting:
        for other in following[waiting.pop()]:
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


@dataclass(frozen=True)
class StepKernel:
    """The template arguments of a kernel with resident weights, as csrc/cuda/resident.h has them.

    Attributes:
        family: "Cluster" or "Group".
        shared: row tiles of a warp, backward, whose weights are in shared memory.
        tiles: of 8 batch rows, in one turn.
        turns: of a step, one after the other in the code.
        norm: of rows, over all blocks (unit_totals.cuh).
    """

    backward: bool
    family: str
    exact: bool
    hidden: int
    blocks: int
    warps: int
    split: int
    shared: int
    tiles: int
    turns: int
    norm: bool = False

    @classmethod
    def of(cls, mangled: str) -> StepKernel | None:
        """From a kernel's mangled name; None for all other kernels."""
        match = re.search(
            r"(Forward|Backward)ConfigIL\w+?ArithmeticE(\d+)EXtl\w+?ResidentShapeE"
            r"((?:Li\d+E)+)EELi(\d+)ELi(\d+)E(?:L\w+?CellKindE(\d)E)?"
            r".*?(Cluster|Group)(?:Exchange|Reduce)",
            mangled,
        )
        if match is None:
            return None
        shape = [int(number) for number in re.findall(r"Li(\d+)E", match[3])]
        hidden, blocks, warps, split, _, shared = (*shape, 0, 0)[:6]
        backward, exact = match[1] == "Backward", int(match[2]) == EXACT
        tiles, turns = int(match[4]), int(match[5])
        sizes = (hidden, blocks, warps, split, shared, tiles, turns)
        return cls(backward, match[7], exact, *sizes, norm=match[6] == NORM)

    @property
    def _row_tiles(self) -> int:
        """Of a warp."""
        if self.backward:
            return self.hidden // 16 // self.warps
        return 2 * self._octets

    @property
    def _octets(self) -> int:
        return self.hidden // self.blocks // 8 // (self.warps // self.split)

    def _rolled(self) -> tuple[int, int]:
        """Row tiles and column tiles in the code of a backward step, where a loop has the others.

        As rec_backward_product.cuh says: row tiles with weights in shared memory are a loop, of two
        at a time where one sum would be all that goes on; so are many column tiles, unless they
        share such weights.
        """
        if self.shared:
            at_once = 1 if self.exact or self.tiles > 1 else 2
            return self._row_tiles - self.shared + at_once, self.tiles
        return self._row_tiles, 1 if self._row_tiles * self.tiles >= 16 else self.tiles

    def products(self) -> int:
        """HMMA in the code of a warp's step."""
        each = self.turns * (3 if self.exact else 1)
        if self.backward:
            steps = 4 * self.hidden // self.blocks // 16
            rows, columns = self._rolled()
            return rows * steps * columns * each
        else:
            steps = self.hidden // 16 // self.split
            # Through L2 a NaN travels as another number, and one more product makes it one again.
            steps += self.family == "Group"
        return self._row_tiles * steps * self.tiles * each

    def sends(self) -> int:
        """STAS in the code of a warp's step."""
        if self.family != "Cluster":
            return 0
        totals = 2 * self.blocks // 4 if self.norm else 0  # of c, and of products
        if self.backward:
            rows, columns = self._rolled()
            return self.turns * rows * columns + totals
        pairs = self._octets * self.tiles
        owned = pairs // min(pairs, self.split)
        return self.turns * owned * (2 if self.exact else 1) * self.blocks // 4 + totals


def step_faults(mangled: str, code: Sequence[Instruction]) -> Iterator[str]:
    """What is not as it should be in a kernel's loop over the steps; nothing for other kernels."""
    kernel = StepKernel.of(mangled)
    if kernel is None:
        return
    loops = product_loops(code)
    if len(loops) != 1 or sum(loops[0].values()) == 1:
        yield f"has products in {len(loops)} places, not in one loop over the steps"
        return
    (loop,) = loops
    for name in FENCES:
        if loop[name]:
            yield f"has {loop[name]} {name} in its loop over the steps"
    for name, expected in (("HMMA", kernel.products()), ("STAS", kernel.sends())):
        if loop[name] != expected:
            yield f"has {loop[name]} {name} in its loop over the steps, not {expected}"
