"""One thread for BLAS and torch: the tests' arrays are small, and pytest-xdist already fills the cores."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
