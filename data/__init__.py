"""From text to batches: corpora, tokens on disk, packed rows. This package imports no other package of Mixwright except
`common`.

In reading order:

- `config`: the configuration section `data`, and the registry of its dataclasses.
- `corpora/`: where documents come from, one module per kind of corpus.
- `packing`: one row of tokens, with labels, positions and document numbers.
- `tokens/`: the tokenizer and the token store, a corpus as token files on disk.
- `batch`: the tensors of a micro-batch.
- `loader`: the order of the rows, the rows of each rank, and how a run resumes.
"""
