"""Which device a worker trains on, and how many there are; the numbers of devices are made up."""

import pytest
import torch

from layerwise.lab.training import devices


@pytest.mark.parametrize(
    ("device", "threads", "cards", "jobs"),
    [
        ("cpu", 1, 0, 16),
        ("cpu", 3, 0, 5),
        ("cpu", 32, 0, 1),
        ("cpu", 1, 4, 16),
        ("cuda", 1, 1, 1),
        ("cuda", 1, 8, 8),
        ("cuda:1", 1, 8, 1),
        ("mps", 1, 0, 1),
    ],
)
def test_one_process_a_gpu_and_one_a_core_is_the_default(device, threads, cards, jobs):
    assert devices.default_jobs(device, cores=16, threads=threads, cards=cards) == jobs


def test_workers_take_turns_on_the_gpus():
    assert [devices.device_of_worker("cuda", number, 3) for number in range(5)] == [
        *("cuda:0", "cuda:1", "cuda:2"),
        *("cuda:0", "cuda:1"),
    ]
    assert [devices.device_of_worker(name, 4, 3) for name in ("cuda:2", "cpu", "mps")] == ["cuda:2", "cpu", "mps"]


def test_memory_is_told_where_it_decides_the_number_of_jobs():
    def words(device, used, jobs, cards=0):
        return devices.memory_words(device, used * 10**9, 80 * 10**9, jobs=jobs, cards=cards)

    assert words("cuda", 4, 1, cards=1) == "A run takes 4 of the 80 GB of cuda: --jobs 18 would fit"
    assert words("cuda", 4, 2, cards=2) == "A run takes 4 of the 80 GB of cuda: --jobs 36 would fit"
    assert words("cuda:1", 30, 3, cards=2).endswith("3 side by side may not fit; use --jobs 2")
    assert words("cpu", 30, 3).endswith("3 side by side may not fit; use --jobs 2")
    assert words("cpu", 4, 2) == ""
    assert devices.memory_words("cpu", 0, 0, jobs=2, cards=0) == ""


def test_the_largest_memory_of_this_process_is_measured():
    devices.begin_memory()
    before = devices.peak_memory()
    torch.ones(25_000_000)  # 100 MB
    assert devices.peak_memory() >= before + 50_000_000 or before == 0
    assert devices.whole_memory() > devices.peak_memory() or devices.whole_memory() == 0
