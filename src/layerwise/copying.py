"""Objects that are replaced by None when what holds them is copied or pickled."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, ClassVar


class StaysBehind:
    """An object whose copy or pickle is None, so that a module or trainer that holds one can be copied.

    The first copy of each object warns and names the remedy.
    """

    _copy_remedy: ClassVar[str] = "make a new one for the copy"
    _copy_warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:  # used by both `copy` and `pickle`
        """Return how the copy is made, which is None."""
        if not self._copy_warned:
            self._copy_warned = True
            here = inspect.currentframe()
            level, frame = 2, None if here is None else here.f_back
            while frame is not None and frame.f_code.co_filename == copy.__file__:  # point at the line that copies
                level, frame = level + 1, frame.f_back
            warnings.warn(
                f"a {type(self).__name__} is not copied or pickled: the copy holds None in its place; "
                f"{self._copy_remedy}",
                UserWarning,
                stacklevel=level,
            )
        return type(None), ()
