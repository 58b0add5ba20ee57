"""`python -m megarlx`, and `torchrun -m megarlx`."""

import sys

from megarlx.processes import die_with_launcher

die_with_launcher()  # before the seconds that the other imports may take

from megarlx.cli import main  # noqa: E402

sys.exit(main())
