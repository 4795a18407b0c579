"""What run scripts share where all the parts meet; nothing else imports it.

Import this before torch: the threads of OpenMP, which otherwise spin while they wait, leave their cores to the data
workers and to other programs. On two cores with one other busy process, training is four times as fast.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
