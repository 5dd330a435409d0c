"""From ``torch.nn.LSTM`` to ``FusedLSTM`` and back, one module or a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from .heads import dense

if TYPE_CHECKING:
    from .module import FusedLSTM

_Recurrent = TypeVar("_Recurrent", bound=nn.RNNBase)


def rebuild(
    source: nn.RNNBase, cls: Callable[..., _Recurrent], copy: bool, **options: Any
) -> _Recurrent:
    """A module of the class with the sizes, settings, mode and parameters of another.

    Raises:
        ValueError: a parameter is computed (parametrized, weight norm), so there is none to take
            over.
    """
    names = source._flat_weights_names
    computed = [name for name in names if name not in source._parameters]
    if computed:
        raise ValueError(
            f"{computed[0]} is computed, not a parameter; remove its parametrization or weight "
            "norm first"
        )
    result = cls(
        source.input_size, source.hidden_size, source.num_layers, source.bias, source.batch_first,
        source.dropout, source.bidirectional, source.proj_size, device="meta", **options,
    )  # fmt: skip
    for name in names:
        parameter = getattr(source, name)
        if copy:
            parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        setattr(result, name, parameter)
    return result.train(source.training)


def fused_from_torch(lstm: nn.LSTM, cls: type[FusedLSTM], copy: bool, **options: Any) -> FusedLSTM:
    """``FusedLSTM.from_torch``."""
    if not isinstance(lstm, nn.LSTM):
        raise TypeError(f"lstm must be a torch.nn.LSTM; got {type(lstm).__name__}")
    if options.get("heads", 1) != 1:
        raise ValueError(
            "heads must be 1 for the parameters of an nn.LSTM, whose weight_hh is one dense "
            f"block; got {options['heads']}"
        )
    fused = rebuild(lstm, cls, copy, **options)
    like = lstm.all_weights[0][0]
    names = fused._peephole_names + fused._layer_norm_names
    for name in (name for row in names for name in row):
        setattr(fused, name, nn.Parameter(like.new_empty(getattr(fused, name).shape)))
    fused._reset_extras()
    return fused


def torch_from_fused(fused: FusedLSTM, copy: bool) -> nn.LSTM:
    """``FusedLSTM.to_torch``."""
    options = fused._extras() + (("reverse",) if fused.reverse else ())
    options += () if fused.truncate is None else ("truncate",)
    if options:
        raise ValueError(f"torch.nn.LSTM has no {', '.join(options)}")
    if fused.heads > 1 and not copy:
        raise ValueError(
            f"copy must be True with heads, whose weight_hh torch.nn.LSTM cannot share; got {copy}"
        )
    lstm = rebuild(fused, nn.LSTM, copy)
    for name in fused._flat_weights_names if fused.heads > 1 else ():
        if name.startswith(("weight_hh", "weight_hr")):
            w = getattr(fused, name)
            matrix = dense(w.detach(), fused.heads, 4 if name.startswith("weight_hh") else 1)
            setattr(lstm, name, nn.Parameter(matrix, w.requires_grad))
    return lstm


def convert(model: nn.Module) -> list[str]:
    """Replace every ``torch.nn.LSTM`` in a model by a ``FusedLSTM`` with its parameters, in place.

    One used in several places stays one. Left alone, with a warning: subclasses of ``nn.LSTM``,
        computed weights
    (parametrized, weight norm), modules with hooks.

    Args:
        model: contains the modules to replace; its optimizers keep working, the parameters are the
            same objects.

    Returns:
        The names of the replaced modules, each of one's names where it has several.

    Raises:
        TypeError: the model is itself an ``nn.LSTM``: nothing can be replaced in place.
    """
    from .module import FusedLSTM  # module.py builds on what is above

    if isinstance(model, nn.LSTM):
        raise TypeError("convert() replaces modules inside a model; use FusedLSTM.from_torch(lstm)")
    replaced: list[str] = []
    made: dict[nn.Module, FusedLSTM] = {}
    for name, lstm in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(lstm, nn.LSTM):
            continue
        reason = _why_not(lstm)
        if reason is not None:
            warnings.warn(f"convert: left {name} as it is: {reason}", stacklevel=2)
            continue
        if lstm not in made:
            made[lstm] = FusedLSTM.from_torch(lstm)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made[lstm])
        replaced.append(name)
    return replaced


def _why_not(lstm: nn.LSTM) -> str | None:
    if type(lstm) is not nn.LSTM:
        return f"{type(lstm).__name__} is a subclass of torch.nn.LSTM, with code of its own"
    if any(name not in lstm._parameters for name in lstm._flat_weights_names):
        return "it has computed weights"
    hooks = [value for name, value in vars(lstm).items() if name.endswith("_hooks")]
    return "it has hooks, which would be lost" if any(hooks) else None
