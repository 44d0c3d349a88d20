"""Makes Triton's interpreter twice as fast: importing this changes it.

A kernel's start puts functions of the interpreter into `triton.language`. It does so anew at each
call of a device function, which changes nothing once that function's module has them, and took half
of the time.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    seen = [module for module in self.fn.__globals__.values() if module is tl or module is tl.core]
    if any(tl.core.is_builtin(module.full) for module in seen):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
