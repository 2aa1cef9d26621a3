"""Checks what goes into the APK, as far as that is possible without an Android SDK.

    python -m pocketslm.android.check

The spec, the requirements against the recipes of python-for-android, the manifest that its template
makes, the Java code against ``stubs/`` (or the SDK's android.jar where $ANDROID_JAR names one), and
what the staged Python imports. Prints a line per check; the status is 1 if one failed.
"""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from pocketslm.android.stage import stage

HERE = Path(__file__).resolve().parent
ANDROID = "{http://schemas.android.com/apk/res/android}"
TOOLS = "{http://schemas.android.com/tools}"
ARCHITECTURES = {"arm64-v8a", "x86_64"}
# What the app imports beside the standard library, and the requirement that brings it.
IMPORTS = {
    "pocketslm": "",
    "kivy": "kivy",
    "numpy": "numpy",
    "jnius": "pyjnius",
    "android": "android",
    "jinja2": "jinja2",
    "pypdf": "pypdf",
    "snowballstemmer": "snowballstemmer",
    "stop_words": "stop-words",
    "bidi": "python-bidi",
    "arabic_reshaper": "arabic-reshaper",
}
# Imported only where they are installed, and never needed on a phone.
OPTIONAL = {"onnxruntime", "onnxruntime_genai", "tokenizers", "executorch", "torch"}
# Pure Python, or with a fallback in pure Python: python-for-android installs them with no compiler.
PURE = {
    *("jinja2", "markupsafe", "pypdf", "python-bidi", "six", "arabic-reshaper"),
    *("snowballstemmer", "stop-words"),
}
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "asyncio"}


class Skipped(Exception):
    """A check that cannot be done here, and why."""


def read_spec() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(HERE / "buildozer.spec", encoding="utf-8")
    return parser["app"]


def listed(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def requirements() -> dict[str, str]:
    """Name -> version, "" where none is pinned."""
    found = {}
    for entry in listed(read_spec()["requirements"]):
        name, _, version = entry.partition("==")
        found[name] = version
    return found


def check_spec() -> str:
    """The architectures, the files it names, no permission."""
    spec = read_spec()
    assert set(listed(spec["android.archs"])) == ARCHITECTURES, "android.archs"
    assert not listed(spec["android.permissions"]), "android.permissions must be empty"
    named = ("android.extra_manifest_xml", "android.manifest.intent_filters")
    for key in (*named, "android.add_src", "p4a.local_recipes"):
        assert (HERE / spec[key]).exists(), f"{key}: {spec[key]} does not exist"
    if importlib.util.find_spec("buildozer") is not None:
        known = _buildozer_keys()
        unknown = [key for key in spec if key not in known and not key.startswith("requirements.")]
        assert not unknown, f"buildozer does not know {unknown}"
    return f"{len(spec)} settings"


def _buildozer_keys() -> set[str]:
    """Every setting that buildozer's own example or code names."""
    found = importlib.util.find_spec("buildozer")
    assert found is not None
    assert found.origin is not None
    home = Path(found.origin).parent
    text = "\n".join(
        path.read_text("utf-8") for ending in ("*.spec", "*.py") for path in home.rglob(ending)
    )
    keys = set(re.findall(r"^#?\s*([\w.]+)\s*=", text, re.M))
    return keys | set(re.findall(r"['\"]((?:android|p4a|source)\.[\w.]+)['\"]", text))


def check_requirements() -> str:
    """Each is pinned, and is built by a recipe of this very version or is pure Python."""
    recipes = _recipes()
    local = {path.parent.name for path in (HERE / "recipes").glob("*/__init__.py")}
    for name, version in requirements().items():
        if name in local:
            continue
        if name in PURE:
            assert version, f"{name} is not pinned"
            assert name not in recipes, f"{name} has a recipe now: take it out of PURE"
            _check_pure(name)
            continue
        assert name in recipes, f"{name} has no recipe, and is not known to be pure Python"
        theirs = recipes[name]
        assert version == theirs, f"{name}=={version}, but the recipe builds {theirs}"
    return f"{len(requirements())} requirements against {len(recipes)} recipes"


def _recipes() -> dict[str, str]:
    """The recipes of the installed python-for-android, and the version each builds; its code is
    read, not run."""
    found = importlib.util.find_spec("pythonforandroid")
    if found is None or found.origin is None:
        raise Skipped("python-for-android is not installed; `pip install python-for-android`")
    versions = {}
    for path in (Path(found.origin).parent / "recipes").glob("*/__init__.py"):
        match = re.search(r"^    version = [\"']v?([^\"']+)[\"']", path.read_text("utf-8"), re.M)
        versions[path.parent.name] = match[1] if match else ""
    return versions


def _check_pure(name: str) -> None:
    """Where it is installed here: nothing compiled in it, but for what it can do without."""
    try:
        parts = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    compiled = [str(part) for part in parts if part.suffix in (".so", ".pyd")]
    assert not compiled or name == "markupsafe", f"{name} is not pure Python: {compiled}"


def check_manifest() -> str:
    """The manifest of python-for-android's template with our settings: no permission is left."""
    root = ET.fromstring(render_manifest())
    asked = [
        node.get(f"{ANDROID}name")
        for node in root.iter()
        if node.tag.startswith("uses-permission") and node.get(f"{TOOLS}node") != "remove"
    ]
    assert not asked, f"the manifest asks for {asked}"
    removed = {node.get(f"{ANDROID}name") for node in root.iter("uses-permission")}
    assert "android.permission.INTERNET" in removed, "INTERNET is not taken out of libraries"
    application = root.find("application")
    assert application is not None
    assert application.get(f"{ANDROID}extractNativeLibs") == "true", "the runner is not unpacked"
    actions = {node.get(f"{ANDROID}name") for node in root.iter("action")}
    for action in ("MAIN", "VIEW", "SEND"):
        assert f"android.intent.action.{action}" in actions, f"no {action} filter"
    return "no permission; open-with and share-to"


def render_manifest() -> str:
    """AndroidManifest.xml as the build would write it."""
    import jinja2

    found = importlib.util.find_spec("pythonforandroid")
    if found is None or found.origin is None:
        raise Skipped("python-for-android is not installed; `pip install python-for-android`")
    templates = Path(found.origin).parent / "bootstraps" / "_sdl_common/build/templates"
    spec = read_spec()
    args = SimpleNamespace(
        permissions=[{"name": name} for name in listed(spec["android.permissions"])],
        extra_manifest_xml=(HERE / spec["android.extra_manifest_xml"]).read_text("utf-8"),
        extra_manifest_application_arguments="",
        intent_filters=(HERE / spec["android.manifest.intent_filters"]).read_text("utf-8"),
        min_sdk_version=int(spec["android.minapi"]),
        numeric_version="1",
        version=spec["version"],
        allow_backup="false",
        android_apptheme="@android:style/Theme.NoTitleBar",
        android_entrypoint="org.kivy.android.PythonActivity",
        activity_launch_mode=spec["android.manifest.launch_mode"],
        manifest_orientation="fullSensor",
        window=True,
        package="org.pocketslm.pocketslm",
        service_class_name="org.kivy.android.PythonService",
        **dict.fromkeys(("wakelock", "billing_pubkey", "backup_rules", "launcher", "home_app")),
        **dict.fromkeys(("android_used_libs", "meta_data", "add_activity"), ()),
    )
    text = (templates / "AndroidManifest.tmpl.xml").read_text("utf-8")
    return jinja2.Template(text).render(
        args=args, android_api=spec["android.api"], service=False, service_data=(),
        native_services=(), url_scheme="kivy", debug=False,
    )  # fmt: skip


def check_java() -> str:
    """The Java code compiles."""
    if shutil.which("javac") is None:
        raise Skipped("there is no javac; `apt-get install default-jdk-headless`")
    jar = os.environ.get("ANDROID_JAR")
    sources = [str(path) for path in (HERE / "java").rglob("*.java")]
    place = ["-classpath", jar] if jar else ["-sourcepath", str(HERE / "stubs")]
    with tempfile.TemporaryDirectory() as out:
        command = ["javac", "-Xlint:all", "-Werror", "--release", "11", *place, "-d", out, *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return f"{len(sources)} file against {'android.jar' if jar else 'stubs'}"


def check_imports() -> str:
    """The staged Python imports only what a requirement brings, and nothing that makes sockets."""
    names = set(requirements())
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(stage(Path(folder) / "app").rglob("*.py"))
        for path in files:
            for module in _imported(path):
                top = module.partition(".")[0]
                parses = module == "urllib.parse"
                assert parses or top not in NETWORK, f"{path.name} imports {module}"
                if top in sys.stdlib_module_names or top in OPTIONAL:
                    continue
                assert top in IMPORTS, f"{path.name} imports {module}, which no requirement brings"
                needed = IMPORTS[top]
                assert not needed or needed in names, f"{needed} is not required: {path.name}"
    return f"{len(files)} files"


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


CHECKS: tuple[Callable[[], str], ...] = (
    check_spec,
    check_requirements,
    check_manifest,
    check_java,
    check_imports,
)


def main() -> int:
    status = 0
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            print(f"{name:<13} ok: {check()}")
        except Skipped as reason:
            print(f"{name:<13} skipped: {reason}")
        except AssertionError as fault:
            print(f"{name:<13} FAILED: {fault}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
