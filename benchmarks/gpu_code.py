"""What the compilers made of the kernels: registers, stack, width of the accesses. It takes no GPU, only the toolkit.

Triton's kernels are compiled for Hopper at the sizes of DiT-XL and DiT-S; the CUDA library's are read as it has them.
"""

import importlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from benchmarks import gpu_shapes
from benchmarks.gpu import Results
from benchmarks.gpu_parts import until
from lfm_fast import _library
from lfm_fast.ops import _registry, _triton

CAPABILITY = 90
_USAGE = re.compile(r"Function (\S+?):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")


class NoGPU:
    """What Triton asks of a driver in order to compile and not to run."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return f"none of capability {self.capability}"  # compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling_for(capability: int):
    """Within: Triton compiles for a GPU that is not there, and takes CPU tensors for shapes."""
    import triton

    driver, active, interpreting = triton.runtime.driver, triton.runtime.driver._active, _triton.interpreting
    driver._active, _triton.interpreting = NoGPU(capability), lambda: True
    try:
        yield
    finally:
        driver._active, _triton.interpreting = active, interpreting


def compiled(row: _registry.Op, size: dict, number: int = 0) -> list:
    """What a row's Triton kernels compile to for three samples of a size, in a configuration; for `compiling_for`."""
    from lfm_fast.kernels.triton import _tuning

    kernel = importlib.import_module(f"lfm_fast.kernels.triton.{row.name}").kernel
    args = row.bind(**row.arguments(**{**size, "shape": (min(size["shape"][0], 3), *size["shape"][1:])}))
    if row.named("triton").why_not(*args) is not None:
        return []
    with _tuning.use_configuration(number), _tuning.compile_only() as kernels:
        kernel(*args)
    return kernels


def tool(name: str) -> str | None:
    """The toolkit's own, or the one that Triton carries."""
    found = shutil.which(name)
    if found is None and _triton._installed() is None:
        import triton

        carried = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found = str(carried) if carried.is_file() else None
    return found


def usage(cubin: Path, cuobjdump: str) -> list[dict]:
    """Registers, stack and shared memory of each kernel in a file, and its accesses to memory by width."""
    said = subprocess.run([cuobjdump, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    accesses = accesses_of(code)
    keys = ("name", "registers", "stack", "shared")
    return [
        {**dict(zip(keys, (name, *map(int, numbers)))), "accesses": accesses.get(name, {})}
        for name, *numbers in _USAGE.findall(said)
    ]


def accesses_of(sass: str) -> dict[str, dict[str, int]]:
    """{kernel: {"LDG 128": how many, ...}} of disassembled code; an access without a width is of 32 bits."""
    found, name = {}, ""
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif match := re.search(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)\s", line):
            width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", match[2])
            found.setdefault(name, Counter())[f"{match[1]} {width[1] if width else 32}"] += 1
    return {name: dict(sorted(counts.items())) for name, counts in found.items()}


def code(results: Results) -> None:
    """Registers, stack and width of accesses of every kernel compiled for Hopper; none may spill."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        results.not_run("kernels", "there is no cuobjdump, neither the toolkit's nor Triton's")
        return
    library = _library.path("cuda")
    if library.is_file() and not results.smoke:
        for kernel in usage_for(library, cuobjdump):
            add_usage(results, "CUDA", kernel)
    else:
        results.not_run("CUDA kernels", f"{library.name} has not been built")
    if _triton._installed() is not None or _triton.interpreting():
        results.not_run("Triton kernels", _triton._installed() or "Triton interprets in this process")
        return
    with compiling_for(CAPABILITY), tempfile.TemporaryDirectory() as folder:
        for row, title, size in until(results, triton_sizes(results.smoke), reserve=10.0):
            for k, kernel in enumerate(compiled(row, size)):
                file = Path(folder) / f"{k}.cubin"
                file.write_bytes(kernel.asm["cubin"])
                for found in usage(file, cuobjdump):
                    warps = f"{kernel.metadata.num_warps} warps"
                    add_usage(results, f"{row.name} {title}", {**found, "warps": warps})


def usage_for(library: Path, cuobjdump: str) -> list[dict]:
    """Those of the library's kernels that are compiled for Hopper."""
    with tempfile.TemporaryDirectory() as folder:
        command = [cuobjdump, "-xelf", f"sm_{CAPABILITY}a", str(library)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        return [kernel for file in sorted(Path(folder).iterdir()) for kernel in usage(file, cuobjdump)]


def add_usage(results: Results, title: str, kernel: dict) -> None:
    local = sum(count for access, count in kernel["accesses"].items() if access[:3] in ("LDL", "STL"))
    note = f"{kernel['registers']} registers, {kernel.get('warps', 'blocks of 256')}, "
    note += ", ".join(f"{count} x {access}" for access, count in kernel["accesses"].items())
    name = re.sub(r".*GLOBAL__N__\w*?_cu_\w{8}_\w+?_\w+?(\d+)", r"\1", kernel["name"])[:48]
    results.add(f"{title}: {name}", kernel["stack"] + local, "of stack", 0, at_most=True, note=note, **kernel)


def triton_sizes(smoke: bool) -> list[tuple]:
    """(row, title, size): rows at two samples of the sizes that are benchmarked, backward rows too."""
    rows, found = _registry.rows(), []
    for case in gpu_shapes.cases(False):
        if case.title.partition(" ")[0] in ("DiT-L", "DiT-B"):
            continue
        size = {**case.size, "shape": (2, *case.size["shape"][1:])}
        names = [name for name in (case.row, f"{case.row}_backward") if name in rows]
        found += [(rows[name], case.title, size) for name in names if _has_triton(rows[name])]
    return found[:1] if smoke else found


def _has_triton(row: _registry.Op) -> bool:
    return any(backend.name == "triton" for backend in row.backends)
