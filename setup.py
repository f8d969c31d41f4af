"""Builds tokred: CMake compiles the libraries, setuptools packs what CMake installs."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and installs into the source tree (editable) or the wheel."""

    def run(self) -> None:
        import pybind11

        # The cmake and ninja beside this Python, before older ones of the system.
        beside = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join([beside, os.environ["PATH"]])
        in_place = self.inplace or self.editable_mode
        prefix = ROOT / "python" if in_place else Path(self.build_lib).resolve()
        build = ROOT / "build" if in_place else Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYBIND11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--parallel"])
        install = ["cmake", "--install", str(build), "--strip", "--prefix", str(prefix)]
        subprocess.check_call(install)

    def get_outputs(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3: the op libraries know neither Python nor torch's C++ ABI.

    The introspection module `tokred._C` serves the Python it was built with; others do without.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("tokred._C", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
