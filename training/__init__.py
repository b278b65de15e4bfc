"""Training runs from the configuration to the last checkpoint, and the work of the tools on trained models.

In reading order:

- `config`: the whole configuration of a run, one dataclass per section.
- `loop`: `train`, the run from its start to its last checkpoint. The modules below are its parts.
- `device`: the rank, the device and the data type of this process.
- `run`: the name of a run, and the files in its directory.
- `agree`: what rank 0 chooses and all ranks use, before a process group exists; where a run continues.
- `layout`: the sizes of the parallel axes of a run, with the check that they fit the model and the batch.
- `initial`: `run.init_from`, the model directory whose weights the first step starts from.
- `build`: this rank's part of the model, and the engine around it.
- `trainable`: the weights that `optim.train` selects.
- `engine`: the protocol `Engine`, and the native engine.
- `step`: one optimizer step, with the normalisation of the losses; the loss and the bits per byte on held-out text.
- `optimizer`: the registry of optimizers, and AdamW.
- `schedule`: the registry of schedules, and the learning rate of a step.
- `checkpoint/`: checkpoints that can be loaded under any layout and engine.
- `report/`: metrics, trackers, progress, tables and plots.
- `deepspeed/`: the engine that uses DeepSpeed's ZeRO.
- `formats/`: model directories of this project, of Hugging Face and of Mistral.
- `generation/`: text from a model directory. `scripts/generate.py` runs it.
- `parity/`: the comparison of every layout with one process. `scripts/parity.py` runs it.
"""
