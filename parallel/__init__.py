"""Parallel training: the layout of the ranks, and how the model of `moe/` is sharded over them from outside.

In reading order:

- `config`: the sizes of the parallel axes as the user configures them.
- `layout`: the sizes as numbers, and the position of each rank on every axis.
- `mesh`: the process groups along the axes.
- `weight_specs`: every parameter of a model, and the axes that shard it.
- `weight_shards`: which part of a parameter this rank stores.
- `stages`: how layers are divided into the stages of a pipeline.
- `apply`: from a configuration to this rank's part of the model. It applies the modules below in a fixed order.
- `tensor`: tensor parallelism with sequence parallelism.
- `expert`: expert parallelism.
- `context`: context parallelism.
- `fsdp`: FSDP2 for weights, gradients and optimizer state.
- `pipeline`: pipeline parallelism with the schedules of torch.
- `objective`: the interface through which a pipeline and an engine compute the loss.
- `gradients`: the sum of gradients over ranks, and their norm.
- `collectives`: collectives with a gradient.
- `planning/`: what a layout needs and sends, and the choice of the axes that are `auto`.
- `startup/`: launching workers, the rendezvous, and the check that all ranks were started alike.
"""
