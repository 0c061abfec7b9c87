"""Where the records of a `layerwise.Monitor` go.

A sink is any callable that takes a `Record`. If it has a `close()`, the monitor calls that when it is detached or
collected, or when the program ends. The packages of TensorBoard, W&B, MLflow and Parquet are imported when such a sink
is made.
"""

from .jsonl import JSONL
from .memory import Memory
from .mlflow import MLflow
from .parquet import Parquet
from .record import Record
from .tensorboard import TensorBoard
from .wandb import WandB

__all__ = ["JSONL", "MLflow", "Memory", "Parquet", "Record", "TensorBoard", "WandB"]
