"""Looks for what the benchmarks need beyond the package, then runs them."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

NEEDED = ("rich", "matplotlib", "vega_datasets")  # pyproject.toml has them as the extra "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    # Only this option is looked at here: a GPU has its own workloads and options, and needs less.
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--device", default="cpu")
    chosen, others = which.parse_known_args(arguments)
    if chosen.device == "cuda":
        from .gpu.run import main as run_on_gpu

        return run_on_gpu(others)

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"The benchmarks need {', '.join(missing)}. Install with\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    from .cli import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
