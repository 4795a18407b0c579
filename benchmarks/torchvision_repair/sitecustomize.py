"""Make a torchvision that was built for another torch importable: its transforms and models, not its operators.

Python runs this file at its start when the folder is on PYTHONPATH.
"""

import sys
from importlib.abc import MetaPathFinder


class DefineOperators(MetaPathFinder):
    """Define the operators that torchvision registers functions for, when it is first imported."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        return None


sys.meta_path.insert(0, DefineOperators())
