"""The CUDA side of the benchmarks, and what runs on a GPU in one command.

Nothing here needs more than torch: machines with a GPU often have no network.
"""
