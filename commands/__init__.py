"""What run scripts share where all the parts meet; nothing else imports it.

Import this before torch: the threads of OpenMP then sleep while they wait. By default they spin, which takes the cores
from data workers and other programs.
"""

import os
import time

STARTED = time.perf_counter()  # a time budget counts from here

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
