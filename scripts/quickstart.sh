#!/usr/bin/env bash
# The main job, on a fresh machine with Python >= 3.10 and pip: makes the environment, trains a latent flow on the
# embedded data set for a few minutes and writes the pictures it learned to make into quickstart/.
#   bash scripts/quickstart.sh                 further arguments go to scripts/quickstart.py (--minutes 10, ...)
# Variables: see scripts/environment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment quickstart
# threads that wait for each other sleep instead of spinning: beside other work on the same cores spinning costs tenfold
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$VENV/bin/python" scripts/quickstart.py "$@"
