"""Builds the compiled libraries with CMake and Ninja; everything else about the package stands in pyproject.toml.

torch is never imported here: an isolated build does not have it, and importing it takes longer than compiling. Only the
headers and libraries of the torch package are needed, found by file name in the environment installed into.

Environment variables:
    LFM_FAST_BUILD   auto (default): without a compiler or torch's headers, install plain Python and say so
                     require: that is an error; off: never compile
    LFM_FAST_CUDA    auto (default): the CUDA library too where nvcc and a torch with CUDA are found (it takes a minute
                     or two to compile); on: also beside a torch without CUDA; off: never
    LFM_FAST_TORCH   torch's package (folder with include/ and lib/) to compile against, where it is not found by itself
    LFM_FAST_CMAKE   further arguments for CMake, such as -DLFM_FAST_WERROR=ON
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
BUILD_RECORD = "_C_build.json"
CUDA_LIBRARY = "_C_cuda.so"
HEADER = Path("include/torch/csrc/stable/library.h")


def tool(name):
    """Path of a program beside the interpreter, whose folder pip does not put on the PATH, or on the PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def torch_candidates():
    """Folders that may be the torch package, best first.

    Under pip's build isolation sys.path is cut down, but sysconfig still answers for the interpreter pip runs on, and
    that is the environment installed into. Other front ends make a new environment; then the activated one is asked.
    Any torch from 2.10 on will do, because the library uses the stable ABI alone.
    """
    if os.environ.get("LFM_FAST_TORCH"):
        return [Path(os.environ["LFM_FAST_TORCH"])]
    found = importlib.util.find_spec("torch")  # finds a top-level package without running it
    folders = [Path(found.origin).parent] if found and found.origin else []
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if os.environ.get("VIRTUAL_ENV"):
        roots.append(str(Path(os.environ["VIRTUAL_ENV"], "lib", version, "site-packages")))
    roots += [site.getusersitepackages(), sysconfig.get_path("platlib", vars=bases)]
    return folders + [Path(root, "torch") for root in dict.fromkeys(roots)]


def torch_version(folder):
    """(major, minor) of a torch package, read from its version.py."""
    match = re.search(r"__version__ = ['\"](\d+)\.(\d+)", (folder / "version.py").read_text())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_torch():
    """The torch package to compile against, or None."""
    for folder in torch_candidates():
        if (folder / HEADER).is_file() and torch_version(folder) >= OLDEST_TORCH:
            return folder
    return None


def why_no_library():
    """The reason why nothing can be compiled here, as a sentence without its full stop, or None."""
    if os.environ.get("LFM_FAST_BUILD") == "off":
        return "LFM_FAST_BUILD=off was set"
    if find_torch() is None:
        return "no torch 2.10 or newer was found beside it at build time (install torch first, then lfm_fast)"
    compilers = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        return f"no C++ compiler was found at build time (looked for {', '.join(compilers)})"
    missing = [name for name in ("cmake", "ninja") if tool(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found at build time (pip install {' '.join(missing)})"
    return None


def find_nvcc():
    """Path of CUDA's compiler, or None."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(Path(home, "bin", "nvcc") for home in homes if home)]
    return next((str(path) for path in found if path and shutil.which(path)), None)


def torch_has_cuda(folder):
    """Whether a torch package is a build with CUDA, read from its version.py."""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d[\d.]*)['\"]", (folder / "version.py").read_text(), re.MULTILINE)
    return match is not None


def why_no_cuda():
    """The reason why no CUDA library is to be compiled, as a sentence without its full stop, or None."""
    wish = os.environ.get("LFM_FAST_CUDA") or "auto"
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"lfm_fast: LFM_FAST_CUDA is {wish}, expected auto, on or off.")
    if wish == "off":
        return "LFM_FAST_CUDA=off was set"
    if find_nvcc() is None:
        if wish == "on":
            raise SystemExit("lfm_fast: LFM_FAST_CUDA=on, but there is no nvcc (on the PATH, or named by CUDACXX).")
        return "nvcc was not found at build time"
    if wish == "auto" and not torch_has_cuda(find_torch()):
        return "the torch found at build time has no CUDA (LFM_FAST_CUDA=on compiles it all the same)"
    return None


class Build(build):
    """Runs build_ext even when nothing can be compiled, so that there is one place to say why."""

    sub_commands = [(name, None if name == "build_ext" else condition) for name, condition in build.sub_commands]

    def run(self):
        # setuptools packs whatever an earlier build left there, modules deleted since included
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """One CMake build for all extensions; an editable or in-place build copies the results into the source tree."""

    def run(self):
        folder = Path(self.build_lib, "lfm_fast").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        reason = why_no_library() or self.compile_into(folder)
        if reason:
            if os.environ.get("LFM_FAST_BUILD") == "require":
                raise SystemExit(f"lfm_fast: LFM_FAST_BUILD=require, but {reason}.")
            print(f"lfm_fast: installing without the compiled library: {reason}.", file=sys.stderr)
            for stale in folder.glob("_C_*.so"):  # of an earlier build, when it could
                stale.unlink()
            (folder / BUILD_RECORD).write_text(json.dumps({"reason": reason}) + "\n")
        if self.inplace or getattr(self, "editable_mode", False):
            self.copy_extensions_to_source()

    def compile_into(self, folder):
        """Configure and build; returns why it could not be configured, or None. A failing compilation is an error."""
        build_folder = Path(self.build_temp).resolve() / "cmake"
        command = [tool("cmake"), "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja"]
        # named again on every call: an isolated build's own ninja is gone the next time, but its path is remembered
        command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        command += [f"-DLFM_FAST_TORCH={find_torch()}", f"-DLFM_FAST_OUTPUT={folder}", "-DLFM_FAST_WERROR=OFF"]
        command += self.cuda_arguments()
        command += shlex.split(os.environ.get("LFM_FAST_CMAKE", ""))
        # by the environment: CMake tries such an nvcc before it relies on it, and insists on one given as an option
        environment = {**os.environ, **({"CUDACXX": nvcc} if (nvcc := find_nvcc()) else {})}
        configured = subprocess.run(command, capture_output=True, text=True, env=environment)
        if configured.returncode:
            print(configured.stdout, configured.stderr, file=sys.stderr)
            return "CMake found no way to build it (its messages stand in the build log)"
        if "no_cuda" in json.loads((folder / BUILD_RECORD).read_text()):
            (folder / CUDA_LIBRARY).unlink(missing_ok=True)  # of an earlier build
        if subprocess.run([tool("cmake"), "--build", str(build_folder)]).returncode:
            raise SystemExit(
                "lfm_fast: compiling failed (see above); LFM_FAST_BUILD=off installs it without the library, "
                "LFM_FAST_CUDA=off without that for CUDA."
            )
        return None

    @staticmethod
    def cuda_arguments():
        reason = why_no_cuda()
        if reason:
            return ["-DLFM_FAST_CUDA=OFF", f"-DLFM_FAST_NO_CUDA={reason}"]
        return ["-DLFM_FAST_CUDA=ON" if os.environ.get("LFM_FAST_CUDA") == "on" else "-DLFM_FAST_CUDA=AUTO"]

    def get_ext_filename(self, fullname):
        """lfm_fast._C_cpu -> lfm_fast/_C_cpu.so: a plain library for every Python, not a Python module."""
        return str(Path(*fullname.split("."))) + ".so"

    def built_files(self):
        """Names of what the build left in the package folder: the libraries and the record of how they were made."""
        return sorted(path.name for path in Path(self.build_lib, "lfm_fast").glob("_C_*"))

    def copy_extensions_to_source(self):
        package = ROOT / "lfm_fast"
        for stale in package.glob("_C_*.so"):
            if stale.name not in self.built_files():
                stale.unlink()
        for name in self.built_files():
            # a new file, renamed: overwriting a library that a running process has mapped would crash that process
            fresh = package / f".{name}.new"
            shutil.copyfile(Path(self.build_lib, "lfm_fast", name), fresh)
            fresh.replace(package / name)

    def get_outputs(self):
        return [str(Path(self.build_lib, "lfm_fast", name)) for name in self.built_files()]

    def get_output_mapping(self):
        if not (self.inplace or getattr(self, "editable_mode", False)):
            return {}
        source = ROOT / "lfm_fast"
        return {str(Path(self.build_lib, "lfm_fast", name)): str(source / name) for name in self.built_files()}


class Develop(Command):
    """`python setup.py develop`, which setuptools is giving up: hands over to `pip install -e .`."""

    description = "install in editable mode with pip"
    user_options = [("no-deps", None, "leave the dependencies alone")]
    boolean_options = ["no-deps"]

    def initialize_options(self):
        self.no_deps = False

    def finalize_options(self):
        pass

    def run(self):
        # Isolation downloads setuptools, cmake and ninja; spared where this environment has them in usable versions.
        setuptools_version = int(sys.modules["setuptools"].__version__.split(".")[0])
        has_wheel = setuptools_version >= 71 or importlib.util.find_spec("wheel")
        ready = setuptools_version >= 64 and has_wheel and tool("cmake") and tool("ninja")
        command = [sys.executable, "-m", "pip", "install", "-e", str(ROOT)]
        command += ["--no-build-isolation"] * bool(ready) + ["--no-deps"] * bool(self.no_deps)
        status = subprocess.run(command).returncode
        if status == 0:  # pip keeps the build's own words to itself
            status = subprocess.run([sys.executable, "-m", "lfm_fast._library"]).returncode
        raise SystemExit(status)


def extensions():
    """The libraries this build will make; none where nothing can be compiled: the wheel is then a plain Python one."""
    if why_no_library():
        return []
    names = ["lfm_fast._C_cpu"] + ["lfm_fast._C_cuda"] * (why_no_cuda() is None)
    return [Extension(name, sources=[], py_limited_api=True) for name in names]


def wheel_options():
    """One wheel for every CPython from 3.10 on (a free-threaded one has no limited API)."""
    return {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}


setup(
    license="Apache-2.0",
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildExt, "develop": Develop},
    options=wheel_options(),
)
