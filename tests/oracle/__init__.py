"""What every op must do to memory, in float64 numpy, written from the contract alone.

No code of the package takes part, and no cast of PyTorch to a narrow format: the backends, the
plain-torch reference among them, are measured against this.
"""

from oracle.compare import MismatchError, compare
from oracle.ops import Expected, expected

__all__ = ["Expected", "MismatchError", "compare", "expected"]
