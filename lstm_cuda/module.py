"""``FusedLSTM`` and ``FusedLSTMCell``: ``torch.nn``'s modules on ``fused_lstm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .checks import check_backend, check_checkpoint, check_pair
from .convert import fused_from_torch, torch_from_fused
from .functional import fused_lstm, native_dtype
from .heads import check_heads
from .layouts import PackedLayout, with_batch, without_batch
from .packed import PackedWeights
from .reference import Cell, check_probability
from .segments import check_segments

if TYPE_CHECKING:
    from typing_extensions import Self

_State = tuple[Tensor, Tensor]


class FusedLSTM(nn.RNNBase):
    """A faster ``torch.nn.LSTM``, call for call and parameter for parameter.

    Each layer and direction computes ``reference.lstm_layer``'s formula. It derives from
    ``nn.RNNBase`` because torch.compile turns away instances of ``nn.LSTM``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
        device, dtype:
            as for ``torch.nn.LSTM``.
        reverse: the one direction runs backwards in time.
        peephole: the gates see the cell state (Gers and Schmidhuber 2000); adds ``weight_ci_l0``,
            ``weight_cf_l0``, ``weight_co_l0``, each [H], for each layer (and ``_reverse`` for the
            second direction).
        forget_gate: False gives the 1997 cell, ``c_t = c_{t-1} + i g``. Weights keep four blocks,
            so that state dicts fit; the forget block is unused.
        coupled: ``f = 1 - i``; the forget block is unused.
        activation, recurrent_activation, output_activation: names in ``reference.ACTIVATIONS`` for
            the candidate, the gates and the cell state (None: as ``activation``).
        recurrent_dropout: probability of zeroing an element of h between steps, one mask per
            sequence and layer.
        zoneout: probability, or a pair for (h, c), of keeping an element of the state (Krueger et
            al. 2017).
        weight_dropout: probability of zeroing an element of ``weight_hh``, one mask per call
            (Merity et al. 2018).
        cell_clip: bound on ``|c_t|``.
        layer_norm: normalises the gates and c (Ba et al. 2016); adds the gains ``weight_ln_ih_l0``
            [4H], ``weight_ln_hh_l0`` [4H], ``weight_ln_c_l0`` [H] and, with ``bias``, the shift
            ``bias_ln_c_l0`` [H] for each layer and direction; the biases shift the gates.
        forget_bias: initial value of the forget gate's total bias: ``bias_ih`` gets it, ``bias_hh``
            gets 0.
        backend: "auto" (by the input's device), "cpu", "cuda", or "torch" for the differentiable
            reference: slow, but on any device and under any transform.
        checkpoint: in training, keep the state before every k-th step for backward instead of the
            gates of all steps, and compute them again; see ``fused_lstm``.
        truncate: no gradient of the state passes between t-1 and t where t is a multiple of k; see
            ``fused_lstm``.
        heads: n blocks of H/n units, each of which sees only its own h: a block-diagonal
            recurrence. ``weight_hh_l0`` is [4H, P/n] and ``weight_hr_l0`` [P, H/n], in the state
            dict, too; of their rows those of head k, the k-th of n parts of each gate or of P, meet
            the h and the units of head k. n divides H and ``proj_size``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or two exclude each
            other.
    """

    _packed: list[PackedWeights] | None = None  # see freeze()
    checkpoint: int | None = None  # here, too, for modules pickled before there was one
    truncate: int | None = None
    heads: int = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reverse: bool = False,
        peephole: bool = False,
        forget_gate: bool = True,
        coupled: bool = False,
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
        output_activation: str | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        cell_clip: float | None = None,
        layer_norm: bool = False,
        forget_bias: float | None = None,
        backend: str = "auto",
        checkpoint: int | None = None,
        truncate: int | None = None,
        heads: int = 1,
    ) -> None:
        for name, size in {"num_layers": num_layers, "proj_size": proj_size}.items():
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        flags = {
            "bidirectional": bidirectional, "reverse": reverse, "peephole": peephole,
            "forget_gate": forget_gate, "coupled": coupled, "layer_norm": layer_norm,
        }  # fmt: skip
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
        check_probability("dropout", dropout)
        pair: Any = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
        cell = Cell(
            forget_gate, coupled, activation, recurrent_activation, output_activation,
            recurrent_dropout, pair, weight_dropout, cell_clip,
        )  # fmt: skip
        if reverse and bidirectional:
            raise ValueError("reverse=True is for one direction; bidirectional=True has both")
        if forget_bias is not None:
            if not isinstance(forget_bias, (int, float)) or isinstance(forget_bias, bool):
                raise TypeError(f"forget_bias must be a number or None; got {forget_bias!r}")
            if not bias or coupled or not forget_gate:
                raise ValueError("forget_bias needs bias=True and a forget gate of its own")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating point dtype; got {dtype}")
        check_backend(backend)
        check_segments(checkpoint, truncate)
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype,
        )  # fmt: skip
        check_heads(heads, hidden_size, proj_size)
        self.heads = heads
        for name in self._flat_weights_names if heads > 1 else ():
            if name.startswith(("weight_hh", "weight_hr")):
                w = getattr(self, name).detach().chunk(heads, 1)[0]
                setattr(self, name, nn.Parameter(w.clone(memory_format=torch.contiguous_format)))
        self.reverse = reverse
        self.forget_bias = forget_bias
        self.backend = backend
        self.checkpoint = checkpoint
        self.truncate = truncate
        self.cell = cell
        H, G = hidden_size, 4 * hidden_size
        ci, cf, co = "weight_ci", "weight_cf", "weight_co"
        self._peephole_names = self._add({ci: H, cf: H, co: H} if peephole else {})
        norms = {"weight_ln_ih": G, "weight_ln_hh": G, "weight_ln_c": H}
        if bias:
            norms["bias_ln_c"] = H
        self._layer_norm_names = self._add(norms if layer_norm else {})
        self._reset_extras()
        self._reset_forget_bias()
        if checkpoint is not None:
            check_checkpoint(backend)

    def _add(self, sizes: dict[str, int]) -> list[list[str]]:
        """Register parameters of these sizes for each layer and direction; returns their names."""
        like = getattr(self, self._all_weights[0][0])
        rows = []
        for names in self._all_weights if sizes else ():
            suffix = names[0].removeprefix("weight_ih")
            rows.append([stem + suffix for stem in sizes])
            for name, size in zip(rows[-1], sizes.values(), strict=True):
                setattr(self, name, nn.Parameter(like.new_empty(size)))
        return rows

    def _extras(self) -> tuple[str, ...]:
        """The names of the options that make another cell."""
        peephole = ("peephole",) if self._peephole_names else ()
        return self.cell.options + peephole + (("layer_norm",) if self._layer_norm_names else ())

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``torch.nn.LSTM``; gains are 1, shifts 0."""
        super().reset_parameters()
        if "cell" in self.__dict__:  # not in the call that RNNBase's constructor makes
            self._reset_extras()
            self._reset_forget_bias()

    def _reset_extras(self) -> None:
        bound = self.hidden_size**-0.5
        for name in (name for row in self._peephole_names for name in row):
            nn.init.uniform_(getattr(self, name), -bound, bound)
        for name in (name for row in self._layer_norm_names for name in row):
            nn.init.constant_(getattr(self, name), float(name.startswith("weight")))

    @torch.no_grad()
    def _reset_forget_bias(self) -> None:
        if self.forget_bias is not None:
            block = slice(self.hidden_size, 2 * self.hidden_size)
            for _, _, b_ih, b_hh, *_ in self.all_weights:
                b_ih[block] = self.forget_bias
                b_hh[block] = 0.0

    def flatten_parameters(self) -> None:
        """Do nothing: the weights are used where they are. Code for ``torch.nn.LSTM`` calls it."""

    def freeze(self) -> Self:
        """Prepare for inference: ``eval()``, and keep what calls derive from the weights.

        On CUDA, kernels that hold the weights of a whole sequence want them in another order. Calls
        make that anew each time, in one small kernel; a frozen module keeps it, at the price of
        another copy of ``weight_hh`` (with a projection, of ``weight_hh @ weight_hr``). Calls with
        gradients, under autocast and captured in a CUDA graph do not use it. A change of the
        weights is noticed, except to inference tensors (made under ``torch.inference_mode``) and
        through ``.data``. ``train()`` ends it. With ``heads``, there is nothing to keep.

        Returns:
            The module.
        """
        self.eval()
        self._packed = [PackedWeights() for _ in range(self.num_layers)]
        return self

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; training ends what ``freeze`` began."""
        if mode:
            self._packed = None
        return super().train(mode)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: _State | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """Run the stack.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence.
            hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), without B for unbatched input, or None for
                zeros.
            lengths: [B] integers; row b stops after ``lengths[b]`` steps. See ``fused_lstm``.
            reset: [T, B] ([B, T] with ``batch_first``, [T] unbatched), bool, or uint8 or float 0/1:
                True at t cuts between t-1 and t. See ``fused_lstm``.
            return_cells: also return the cell states of the last layer.

        Returns:
            output [T, B, D*P] and (h_n [L*D, B, P], c_n [L*D, B, H]), laid out as the input; with
            ``return_cells`` then cells [T, B, D*H], laid out as the output.

        Raises:
            TypeError, ValueError, RuntimeError: an argument is wrong; the message says which, what
                was wanted, what came.
            NotImplementedError: with ``checkpoint`` or ``truncate``, under vmap; with
                ``truncate``, under forward-mode differentiation; unless ``backend="torch"``.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset, return_cells)
        if isinstance(input, Tensor) and input.dim() == 2:
            batch_of_one = with_batch(input, hx, lengths, reset)
            return without_batch(*self._run(*batch_of_one, return_cells, False))
        if isinstance(input, Tensor) and input.dim() != 3:
            raise ValueError(
                f"FusedLSTM: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        if isinstance(lengths, int):
            raise TypeError(f"lengths must be [batch] for batched input; got the number {lengths}")
        return self._run(input, hx, lengths, reset, return_cells, self.batch_first)

    def _run(
        self,
        x: Tensor,
        hx: _State | None,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        return_cells: bool,
        batch_first: bool,
        ragged: bool = False,
    ) -> tuple[Any, ...]:
        dtype = None
        if isinstance(x, Tensor) and (ragged or self.proj_size > 0 or x.dtype is torch.float16):
            dtype = native_dtype(x, hx)
        result = fused_lstm(
            x,
            hx,
            self.all_weights,
            batch_first=batch_first,
            bidirectional=self.bidirectional,
            reverse=self.reverse,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            reset=reset,
            return_cells=return_cells,
            cell=self.cell,
            peephole=self._rows(self._peephole_names),
            layer_norm=self._rows(self._layer_norm_names),
            backend=self.backend,
            checkpoint=self.checkpoint,
            truncate=self.truncate,
            packed=self._packed,
            wide_c=dtype is torch.float32,
            heads=self.heads,
        )
        if dtype is None:
            return result
        output, (h_n, c_n), *cells = result
        if self.proj_size == 0:
            output, h_n = output.to(dtype), h_n.to(dtype)
        return (output, (h_n, c_n.to(dtype)), *cells)

    def _rows(self, names: list[list[str]]) -> list[list[Tensor]] | None:
        return [[getattr(self, name) for name in row] for row in names] if names else None

    def _forward_packed(
        self,
        packed: PackedSequence,
        hx: _State | None,
        lengths: Tensor | Sequence[int] | int | None,
        reset: Tensor | None,
        return_cells: bool,
    ) -> tuple[Any, ...]:
        if lengths is not None:
            raise ValueError("lengths must be None with a PackedSequence, which has its own")
        layout = PackedLayout(packed)
        # What does not fit is left for fused_lstm to complain about.
        if hx is not None and all(t.dim() == 3 and t.shape[1] == layout.B for t in check_pair(hx)):
            hx = self.permute_hidden(hx, packed.sorted_indices)
        reset = layout.reset(reset, self.batch_first)
        output, state, *cells = self._run(
            layout.x(), hx, layout.lengths, reset, return_cells, False, layout.ragged
        )
        state = self.permute_hidden(state, packed.unsorted_indices)
        return (layout.packed(output), state, *map(layout.packed, cells))

    def permute_hidden(self, hx: _State, permutation: Tensor | None) -> _State:  # type: ignore[override]
        """Both states with their batch in another order."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def extra_repr(self) -> str:
        """As ``torch.nn.LSTM``'s, then the options that are not at their defaults."""
        options = {name: getattr(self.cell, name) for name in self.cell.options}
        options |= {name: True for name in self._extras() if name not in options}
        if self.reverse:
            options["reverse"] = True
        if self.forget_bias is not None:
            options["forget_bias"] = self.forget_bias
        if self.heads > 1:
            options["heads"] = self.heads
        if self.backend != "auto":
            options["backend"] = self.backend
        for name in ("checkpoint", "truncate"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return super().extra_repr() + "".join(f", {k}={v!r}" for k, v in options.items())

    @classmethod
    def from_torch(cls, lstm: nn.LSTM, *, copy: bool = False, **options: Any) -> FusedLSTM:
        """A FusedLSTM in place of a ``torch.nn.LSTM``.

        Args:
            lstm: its sizes, settings, training mode and parameters are taken over.
            copy: copy the parameters; otherwise both modules share them, and an optimizer of one
                trains both.
            options: keyword arguments of FusedLSTM that ``torch.nn.LSTM`` does not have. Parameters
                that they add start as in a new module; ``forget_bias`` leaves those taken over.

        Raises:
            TypeError: not an ``nn.LSTM``.
            ValueError: a parameter is computed (parametrized, weight norm); or ``heads`` is given,
                as the recurrence of an ``nn.LSTM`` is not in blocks.
        """
        return fused_from_torch(lstm, cls, copy, **options)

    def to_torch(self, *, copy: bool = False) -> nn.LSTM:
        """The ``torch.nn.LSTM`` that computes the same; ``copy`` as for ``from_torch``.

        With ``heads``, a copy alone: its recurrent weights are block-diagonal matrices, whose zeros
        training does not keep.

        Raises:
            ValueError: an option is set that ``torch.nn.LSTM`` does not have, or a parameter is
                computed; or ``heads`` without ``copy``.
        """
        return torch_from_fused(self, copy)
