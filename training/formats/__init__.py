"""Models on disk: reading a model directory of any kind, and writing one.

A *model directory* is a run's directory, one of its checkpoints, a Hugging Face model, or a model in Mistral's format.
docs/formats.md describes them.

In reading order:

- `reader`: `open_model` opens a model directory and returns a `ModelReader`, which fills a model with the weights.
- `foreign_tensors`: the tensors of a directory of safetensors files from any source, checked before they are read, and
  where they are in Mixwright's tensors, as a list of pieces.
- `fields`, `meaning`: the values of a configuration file, checked; what a configuration computes.
- `huggingface`: `config.json` to and from Mixwright's configuration. `families` has one class for each kind of
  model, with the names of its keys and tensors.
- `mistral`: the same for `params.json`.
- `model_directory`: writes a model directory like a run's.
- `fingerprint`: a hash of a model's weights, by which a run recognises the base of its adapters.
- `merge`: a run with adapters, read as the model without adapters that computes the same.
- `peft`: adapters in the format of the library peft, in both directions.
- `export`: converts a model directory to another format, and a dense one to a MoE model. The mathematics of the latter
  is in `moe.upcycle`.
"""
