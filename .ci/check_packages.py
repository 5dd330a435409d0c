"""Builds the source archive and, from it, the wheel; then tries the wheel apart from this folder.

The wheel must hold the package, its licence and nothing else; its compiled part must load; it must
import in under 0.3 s beyond torch's own import; and README.md's first example must run with it.

It is compiled without optimisation, in a third of the time: that the sources compile with it
`make test` shows, and here counts whether the archive has all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCES = shutil.ignore_patterns(
    ".*cache", ".git", ".hypothesis", ".venv", "*.egg-info", "*.so", "__pycache__", "build", "dist"
)
IMPORT_LIMIT_S = 0.3
TRY_IMPORT = """
import sys, time, torch
start = time.perf_counter()
import lstm_cuda
print(time.perf_counter() - start)
assert lstm_cuda.__file__.startswith(sys.argv[1]), lstm_cuda.__file__
lstm_cuda.build_info()
"""


def python(*arguments: str, cwd: Path, **variables: str) -> str:
    """Runs this interpreter with environment variables; returns its standard output."""
    scripts = sysconfig.get_path("scripts")  # ninja is there
    path = scripts + os.pathsep + os.environ["PATH"]
    environment = {**os.environ, "PATH": path, **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def build_wheel(folder: Path) -> Path:
    """The wheel, made from a source archive that is made from a clean copy of this folder."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCES)
    make_archive = f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r})"
    python("-c", make_archive, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    compiler = folder / "c++"  # whose last word on optimisation is that there is none
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    python("-m", "pip", "wheel", *options, str(archive), cwd=folder, CXX=str(compiler))
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"^```python\n(.+?)^```", readme, re.MULTILINE | re.DOTALL)
    assert example is not None, "README.md has no example"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel = build_wheel(folder)
        names = zipfile.ZipFile(wheel).namelist()
        strays = [n for n in names if not re.match(r"lstm_cuda(-[^/]*\.dist-info)?/", n)]
        assert not strays, f"the wheel holds {strays}"
        for needed in ("lstm_cuda/py.typed", ".dist-info/licenses/LICENSE"):
            assert any(n.endswith(needed) for n in names), f"the wheel has no {needed}"

        installed = folder / "installed"
        options = ("--quiet", "--no-deps", "--target", str(installed))
        python("-m", "pip", "install", *options, str(wheel), cwd=folder)
        path = {"PYTHONPATH": str(installed)}
        runs = [python("-c", TRY_IMPORT, str(installed), cwd=folder, **path) for _ in "123"]
        import_s = min(float(run) for run in runs)  # the least disturbed of three
        assert import_s < IMPORT_LIMIT_S, f"import lstm_cuda takes {import_s:.2f} s beyond torch"
        python("-c", example[1], cwd=folder, **path)
        print(f"{wheel.name}: import {import_s:.2f} s, README's example runs")


if __name__ == "__main__":
    main()
