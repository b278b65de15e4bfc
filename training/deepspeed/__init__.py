"""DeepSpeed's ZeRO as an engine: `engine=deepspeed`. docs/deepspeed.md describes what it supports.

In reading order:

- `engine`: `DeepSpeedEngine`, which implements `training.engine.Engine`.
- `settings`: every key that may be in the user's JSON file, and who decides its value; builds DeepSpeed's configuration
  from the run's configuration and from the file.

Only building an engine imports the package deepspeed.
"""
