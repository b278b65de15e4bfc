"""The command-line tools. Each takes `--help`, and `key=value` arguments that change the keys of `conf/<tool>.yaml`.

- `describe`: the parameters, FLOPs and memory of a model.
- `generate`: text from a trained model (`training/generation`).
- `parity`: whether every layout computes what one process computes (`training/parity`).
- `upcycle`: a dense model to a Mixture of Experts (`moe/upcycle.py`).
- `import_hf`, `export_hf`: a model directory from and to the formats of others (`training/formats`).
- `node.sh`, `slurm.sbatch`, `kubernetes.yaml`: training on several nodes (docs/clusters.md).
- `cli`: how `train.py` and the tools turn arguments into a configuration, and errors into one line.
"""
