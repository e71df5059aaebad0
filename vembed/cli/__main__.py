"""`python -m vembed.cli`, for where the `vembed` script is not on the path."""

import sys

from vembed.cli import main

sys.exit(main())
