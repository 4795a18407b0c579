"""What run scripts share where all the parts meet; nothing else imports it.

Import this before torch: the threads of OpenMP then sleep while they wait. By default they spin, which takes the cores
from data workers and other programs.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
