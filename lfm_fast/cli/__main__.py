"""`python -m lfm_fast.cli`."""

import sys

from lfm_fast.cli import main

sys.exit(main())
