"""Handing records to sinks: one that fails is dropped, and training goes on. Packages that only one sink needs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from .record import Record

logger = logging.getLogger("layerwise")
Sink = Callable[[Record], Any]


def check_sinks(sinks: object) -> None:
    """Raise unless this is a sequence of callables, none of them a class."""
    if not isinstance(sinks, Sequence) or isinstance(sinks, str):
        raise TypeError(f"sinks={sinks!r} must be a list of callables that take a record; for one sink write [sink]")
    for sink in cast("Sequence[object]", sinks):
        if isinstance(sink, type):
            raise TypeError(f"sinks holds {sink.__name__}, which is a class; call it: {sink.__name__}(...)")
        if not callable(sink):
            raise TypeError(
                f"sinks holds {sink!r} ({type(sink).__name__}); each must be a callable that takes a record, such as "
                "layerwise.sinks.JSONL(path)"
            )


def sink_name(sink: Any) -> str:
    """Return a sink's name for messages."""
    return getattr(sink, "__qualname__", None) or repr(sink)


def deliver(sinks: list[Sink], record: Record) -> None:
    """Hand a record to each sink; remove those that raise from the list, and log that once."""
    for sink in list(sinks):
        try:
            sink(record)
        except Exception:
            sinks[:] = [other for other in sinks if other is not sink]
            logger.exception(
                "sink %s raised at step %d and gets no more records; training goes on", sink_name(sink), record.step
            )


def close(sinks: Sequence[Any]) -> None:
    """Close sinks; an error is logged."""
    for sink in sinks:
        try:
            sink.close()
        except Exception:
            logger.exception("sink %s raised when it was closed", sink_name(sink))


def optional(module: str, sink: str, package: str) -> Any:
    """Import a module of a package that only this sink needs; the error says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sinks.{sink} needs {package}, which is not installed: run  pip install {package}"
        ) from error
