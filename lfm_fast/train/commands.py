"""What to type to start the programs of this environment, whose folder need not be in the shell's search path."""

import os
import shutil
import sys
from pathlib import Path


def command(name):
    """`name` where the shell finds that of this environment under it, else the path of it."""
    here = Path(sys.executable).parent
    own, found = here / name, shutil.which(name)
    if not own.exists():  # pip may put programs elsewhere; and Debian has a python3 alone
        return Path(sys.executable).name if name == "python" and found is None else name
    if found is not None and os.path.samefile(Path(found).parent, here):
        return name
    near = os.path.relpath(own)
    return str(own) if near.startswith(os.pardir) else near
