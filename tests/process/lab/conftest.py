"""What the tests of the lab share, in this process and in others."""

from lab_fixtures import carried_out, data_folder, in_process, mnist_folder, one_thread

__all__ = ["carried_out", "data_folder", "in_process", "mnist_folder", "one_thread"]
