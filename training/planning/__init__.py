"""What a layout needs and how long its step takes, before it runs: the real step, without values and on one process.

In reading order:

- `skew`: how many tokens each expert gets.
- `operators`: the operators of a step with their bytes and floating-point operations, and their time on a device.
- `stand_ins`: the kernels of GPUs that torch does not show on other devices.
- `trace`: one rank's step under fake tensors and a fake process group: its memory over time, operators, collectives.
- `timing`: the time of a step from its trace.
- `search`: the layouts of a model on a number of devices, ranked by formulas.
- `answer`: the best layouts with all figures; the first ones are traced.
- `serving`: the memory of text generation.
- `peak`: the largest memory of a real step, as the allocators count it.
- `forecast`: the process that predicts the memory and the step time of a run, beside the run.
"""
