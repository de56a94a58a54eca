"""Build of the native modules; everything else about the project is in pyproject.toml.

They are compiled once, at installation: `data._index` from csrc/src (which knows nothing of Python) under the thin
layer of csrc/bindings, `runtime._kernels` from csrc/kernels. Portable code only (no -march=native): a wheel built on a
login node must run on every compute node. The kernels carry a version per instruction set and choose at run time.
"""

import os
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

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


COMPILE = ["-O3", "-g0", "-fvisibility=hidden", *WARNINGS, *FOREIGN_INCLUDES]


class BuildExtensions(build_ext):
    """Builds with OpenMP where the compiler has it; the kernels run on one thread elsewhere."""

    def build_extensions(self) -> None:
        """Add the flag to the kernels if a small program compiles with it."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
            try:
                # The flag goes by itself: torch's own libgomp is in the process by then, and both share its threads.
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
            except CompileError:
                pass
            else:
                for extension in self.extensions:
                    if extension.name.endswith("._kernels"):
                        extension.extra_compile_args.append("-fopenmp")
                        extension.extra_link_args.append("-fopenmp")
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_7b.data._index",
            files("csrc/src/*.cpp", "csrc/bindings/*.cpp"),
            include_dirs=["csrc/include"],
            depends=files("csrc/include/megatron_7b/*.h", "csrc/bindings/*.h"),
            cxx_std=17,
            extra_compile_args=COMPILE,
        ),
        Pybind11Extension(
            "megatron_7b.runtime._kernels",
            files("csrc/kernels/*.cpp"),
            include_dirs=["csrc/include"],
            depends=files("csrc/include/megatron_7b/kernels.h", "csrc/kernels/*.h"),
            cxx_std=17,
            # 64-byte vectors pass between functions of one file only, so how another compiler passes them is no matter.
            extra_compile_args=[*COMPILE, "-Wno-psabi"],
        ),
    ],
    cmdclass={"build_ext": BuildExtensions},
)
