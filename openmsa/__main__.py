"""`python -m openmsa` is the command `openmsa`."""

import sys

from openmsa.cli import main

sys.exit(main())
