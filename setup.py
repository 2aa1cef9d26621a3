"""The build of a wheel compiles the native operators where there is a compiler."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Puts the library beside its sources; without it, it is compiled on first use."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        # The copy that was just made: the library's name is a hash of what a user will have.
        sys.path.insert(0, str(Path(self.build_lib).resolve()))
        sys.dont_write_bytecode = True  # it would be part of the wheel
        from pocketslm.runtime.ops import build, built

        try:
            build.build_library(built.SOURCES / "lib")
        except build.BuildError as error:
            self.warn(f"the native operators were not compiled: {error}")


class PlatformWheel(bdist_wheel):
    """Any Python 3, but this operating system and processor."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": PlatformWheel})
