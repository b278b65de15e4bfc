"""What a layout needs and sends, and the choice of the axes that are `auto`. Plain numbers: nothing here runs a model.

In reading order:

- `workload`: what one optimizer step computes, the input of all other modules.
- `hardware`: a kind of device and its links, from `conf/gpu` or from a measurement.
- `check`: whether a layout divides the model, the sequences and the batch.
- `traffic`: the bytes that a rank sends in a step, by axis.
- `plan`: the memory of each pipeline rank, its traffic and its idle time.
- `auto`: the choice of the axes that are `auto`, by memory and estimated time.
"""
