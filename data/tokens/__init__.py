"""Token stores: a corpus as token files on disk.

In reading order:

- `marks`: what the files beside a vocabulary say about special tokens.
- `tokenizer`: text to token ids and back: the protocol, sentencepiece models, and training of one.
- `huggingface_tokenizer`: the same with a `tokenizer.json`.
- `files`: all files of a tokenizer, which travel together.
- `chat_template`, `conversation`: conversations as text and as ids with labels.
- `heldout`: the choice of the documents that are never trained on.
- `spool`: a corpus in a temporary file that can be read several times.
- `build`: writes a token store.
- `split`: the rows of the training or the held-out part of a store.
- `store`: opens a store, and builds it first if it does not exist.
"""
