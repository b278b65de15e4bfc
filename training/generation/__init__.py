"""Text generation from a model directory: what `scripts/generate.py` runs. The files, in reading order:

- `config`: `GenerateConfig`, the keys of the command line. Imports no torch.
- `request`: opens the tokenizer of a model directory, and turns the prompts or the conversation into token ids.
- `worker`: what one rank does, from the process group to the last token. It turns the tokens of each row into text, as
  they come, up to a stop string, and prints the growing text on a terminal, or the results as JSON.

The loop over tokens is in `moe/generation`. docs/generation.md is the user's page.
"""
