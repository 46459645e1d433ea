"""`python -m trimtab` runs the command `trimtab`."""

import sys

from trimtab.commands import main

sys.exit(main())
