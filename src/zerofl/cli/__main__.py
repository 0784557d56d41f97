"""`python -m zerofl.cli` is `zerofl`."""

import sys

from zerofl.cli import main

sys.exit(main())
