"""`python -m megarlx`, and `torchrun -m megarlx`."""

import sys

from megarlx.cli import main

sys.exit(main())
