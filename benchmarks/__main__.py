"""Looks for what the benchmarks need beyond the package, then runs them."""

import importlib.util
import sys

NEEDED = ("rich", "matplotlib", "vega_datasets")  # pyproject.toml has them as the extra "bench"


def main() -> int:
    """Returns the exit status."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"The benchmarks need {', '.join(missing)}. Install with\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    from .cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
