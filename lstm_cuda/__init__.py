"""A drop-in, faster ``torch.nn.LSTM``."""

from importlib.metadata import PackageNotFoundError, version

from . import onnx
from .convert import convert
from .explain import explain
from .functional import fused_lstm
from .lstm_cell import FusedLSTMCell
from .module import FusedLSTM
from .ops import CudaDevice, build_info, force_kernel

try:
    __version__ = version("lstm_cuda")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CudaDevice",
    "FusedLSTM",
    "FusedLSTMCell",
    "__version__",
    "build_info",
    "convert",
    "explain",
    "force_kernel",
    "fused_lstm",
    "onnx",
]
