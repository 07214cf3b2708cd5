"""`lfm-fast bench`: the speed beside what else one would use."""

import sys
from pathlib import Path

from lfm_fast.cli.arguments import folder

GROUPS = ("ops", "forward", "unets", "train_step", "sampling", "solvers", "data", "startup")


def add(commands):
    says = "compare the speed with what else one would use, and draw tables and pictures of it"
    parser = commands.add_parser("bench", help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--mode", choices=("quick", "standard", "full"), help="how much (default: standard, minutes on two cores)")
    add("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"some of {', '.join(GROUPS)}")
    add("--report", nargs="+", type=Path, metavar="RESULT.json", help="draw results of before instead of measuring")
    add("--output", type=folder, help="folder of benchmarks.md and images/ (default: the repository's docs/)")


def run(args):
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise ValueError("the benchmarks are not part of an installed package; run this from a clone of the repository")
    if args.report and (args.mode or args.only):
        raise ValueError("--mode and --only say what to measure, but --report draws what was measured before")
    _check_can_bench(("matplotlib",) if args.report else ("matplotlib", "pytest", "pytest_benchmark"))
    from lfm_fast.checkpoint import check_output

    output = (args.output or root / "docs").absolute()
    check_output(output)
    status, results = (0, args.report) if args.report else _measured(args, root)
    command = ["-m", "benchmarks.report", *(str(path.absolute()) for path in results), "--output", str(output)]
    return _python(command, root) or status


def _check_can_bench(packages):
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"bench needs {', '.join(missing)}; pip install 'lfm_fast[test]' brings what it needs")


def _measured(args, root):
    """Run the suite; (exit status, [result file])."""
    import os
    import time

    mode = args.mode or "standard"
    words = [time.strftime("%Y-%m-%d"), "cpu", str(os.cpu_count()), "cores", *(args.only or []), mode]
    result = root / "benchmarks" / "results" / f"{'-'.join(words)}.json"
    groups = [word for group in args.only or [] for word in ("--group", group)]
    command = ["-m", "pytest", "benchmarks/", "--benchmark-only", f"--benchmark-json={result}", *groups]
    status = _python(command, root, LFM_FAST_BENCH=mode)
    if not result.is_file() or not result.stat().st_size:
        raise RuntimeError("the benchmarks did not end; what they said stands above")
    print(f"wrote {result}")
    return status, [result]


def _python(command, root, **environment):
    import os
    import subprocess

    return subprocess.run([sys.executable, *command], cwd=root, env={**os.environ, **environment}).returncode
