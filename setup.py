"""The build of a wheel compiles the native operators where there is a compiler."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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
        operators = Path(self.build_lib) / "pocketslm" / "runtime" / "ops"
        build = _load(operators / "build.py")
        try:
            build.build_library(operators / "lib")
        except build.BuildError as error:
            self.warn(f"the native operators were not compiled: {error}")


class PlatformWheel(bdist_wheel):
    """Any Python 3, but this operating system and processor."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pocketslm_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": PlatformWheel})
