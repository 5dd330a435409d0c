"""Measures lstm_cuda against torch.nn.LSTM: `python -m benchmarks --help`."""
