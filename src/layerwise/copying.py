"""Objects that stay behind when what holds them is copied or pickled."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, ClassVar


class StaysBehind:
    """An object of which a copy or a pickle is None, so that a module or a trainer that holds one can be copied.

    The first copy of each object warns, with what to do for the copy.
    """

    _copy_remedy: ClassVar[str] = "make a new one for the copy"
    _copy_warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:  # which `copy` and `pickle` ask alike
        """Return how the copy is made: it is None."""
        if not self._copy_warned:
            self._copy_warned = True
            here = inspect.currentframe()
            level, frame = 2, None if here is None else here.f_back
            while frame is not None and frame.f_code.co_filename == copy.__file__:  # to the line that copies
                level, frame = level + 1, frame.f_back
            warnings.warn(
                f"a {type(self).__name__} is not copied or pickled: the copy holds None in its place; "
                f"{self._copy_remedy}",
                UserWarning,
                stacklevel=level,
            )
        return type(None), ()
