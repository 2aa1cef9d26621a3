"""Feed everything that reads what a stranger wrote with what it should not get.

    python -m tests.fuzz --minutes 30

runs every target of :mod:`.readers` (Python) and :mod:`.native` (C++, under AddressSanitizer and
UBSan), in turns, each in a process of its own. A finding is an exception that is no
``PocketSlmError``, more than a bounded time or memory, or the end of the process: its input is kept
in ``build/fuzz/findings``, and goes to ``tests/corpus/TARGET`` when it is mended, where every later
run begins with it. Totals add up over runs in ``build/fuzz/totals.json``.

    python -m tests.fuzz --coverage

says which lines the same inputs reach. The tests run a bounded part.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what tests share
