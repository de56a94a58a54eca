"""Build of the native data module; everything else about the project is in pyproject.toml.

The extension is compiled once, at installation. Sources in csrc/src know nothing of Python, those in csrc/bindings are
the thin layer over them. Portable code only (no -march=native): a wheel built on a login node must run on every compute
node.
"""

import os
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("MEGATRON_7B_BUILD_JOBS", default=2).install()

# Warnings are errors in our code only: other people's headers are system headers.
FOREIGN_INCLUDES = (f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wsign-conversion")
# Errors only where the project itself is checked: the next compiler's new warning must not break a user's installation.
if os.environ.get("MEGATRON_7B_STRICT_BUILD"):
    WARNINGS += ("-Werror",)


def files(*patterns: str) -> list[str]:
    """Paths relative to this folder (where setuptools runs), in an order that doesn't depend on the file system."""
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_7b.data._index",
            files("csrc/src/*.cpp", "csrc/bindings/*.cpp"),
            include_dirs=["csrc/include"],
            depends=files("csrc/include/megatron_7b/*.h", "csrc/bindings/*.h"),
            cxx_std=17,
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", *WARNINGS, *FOREIGN_INCLUDES],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
