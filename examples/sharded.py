"""Per-layer rates with FSDP2: each process holds a part of every layer. Digits, a Monitor, a distributed checkpoint.

In the clone: pip install -e '.[lab]' and torchrun --nproc-per-node 2 examples/sharded.py [FOLDER]
Each further run goes on from the last checkpoint, with any number of processes.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as processes
import torch.distributed.checkpoint as checkpoints
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import layerwise
from layerwise.lab import data

processes.init_process_group("gloo")  # "nccl" on GPUs
rank, count = processes.get_rank(), processes.get_world_size()
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sharded")  # one that all processes see
digits = data.load("digits5k")
images, labels = data.pixels(digits.train_images), digits.train_labels

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
for part in (model[1], model[3], model[5], model):
    fully_shard(part)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
adapter = layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerAdaptive(), model)  # before the first forward pass
sinks = [layerwise.sinks.JSONL(folder / "layers.jsonl")] if rank == 0 else []
monitor = layerwise.Monitor(optimizer, model, every=20, sinks=sinks)  # in every process; one of them writes

weights, moments = get_state_dict(model, optimizer)
if saved := sorted(folder.glob("epoch-*")):
    checkpoints.load({"model": weights, "optimizer": moments, "monitor": monitor}, checkpoint_id=saved[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    layerwise.load_checkpoint(adapter, saved[-1])  # key="adapter", as it was saved

generator = torch.Generator().manual_seed(adapter.epoch)
for rows in torch.randperm(len(labels), generator=generator).split(64):
    mine = rows[rank::count]
    optimizer.zero_grad()
    functional.cross_entropy(model(images[mine]), labels[mine]).backward()
    optimizer.step()
adapter.end_epoch()

weights, moments = get_state_dict(model, optimizer)
state = {"model": weights, "optimizer": moments, "adapter": adapter, "monitor": monitor}
checkpoints.save(state, checkpoint_id=folder / f"epoch-{adapter.epoch - 1:03}")
if rank == 0:
    print(f"after epoch {adapter.epoch - 1}, with {count} process{'es' if count > 1 else ''}:")
    print(monitor.get_last_record(), flush=True)
processes.barrier()
processes.destroy_process_group()
