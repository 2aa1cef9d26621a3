"""``python -m pocketslm``."""

import sys

from pocketslm.cli import main

sys.exit(main())
