"""The static runner as a native library of the APK, for every architecture that is built.

An app may execute only what Android has unpacked into its library folder, and only files named
lib*.so are unpacked. buildozer has no ``android.add_libs_x86_64``, so a recipe puts it there.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pythonforandroid.recipe import Recipe

TARGETS = {"arm64-v8a": "aarch64-linux", "x86_64": "x86_64-linux"}
LIBRARY = "libpocketslm_run.so"


class PocketslmRunRecipe(Recipe):
    version = "0.1.0"
    url = None  # the sources are this repository's
    depends = ("python3",)

    def should_build(self, arch: Any) -> bool:
        return not self.has_libs(arch, LIBRARY)

    def build_arch(self, arch: Any) -> None:
        super().build_arch(arch)
        sources = Path(__file__).resolve().parents[3] / "runtime" / "ops"
        output = Path(self.get_build_container_dir(arch.arch)) / LIBRARY
        # The interpreter that started buildozer, which has ziglang; not the one for the phone.
        python = os.environ.get("POCKETSLM_PYTHON", sys.executable)
        # Its musl keeps to old system calls: glibc's clone3 would be the end of it in an app.
        subprocess.run([python, "-c", "import ziglang"], check=True)
        command = [python, str(sources / "build.py"), "--runner", "--output", str(output)]
        subprocess.run([*command, "--target", TARGETS[arch.arch]], check=True)
        self.install_libs(arch, str(output))


recipe = PocketslmRunRecipe()
