"""Token stores: a corpus as token files on disk.

In reading order:

- `tokenizer`: text to token ids and back, and training of a tokenizer.
- `heldout`: the choice of the documents that are never trained on.
- `spool`: a corpus in a temporary file that can be read several times.
- `build`: writes a token store.
- `split`: the rows of the training or the held-out part of a store.
- `store`: opens a store, and builds it first if it does not exist.
"""
