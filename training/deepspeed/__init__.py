"""DeepSpeed's ZeRO as an engine: `engine=deepspeed`. docs/deepspeed.md describes what it supports.

In reading order:

- `engine`: `DeepSpeedEngine`, which implements `training.engine.Engine`.
- `settings`: builds DeepSpeed's configuration from the run's configuration and from the user's JSON file.
- `keys`: every key that may be in the user's file, and who decides its value.

Only building an engine imports the package deepspeed.
"""
