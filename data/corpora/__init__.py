"""Corpora: sources of documents. These modules import neither torch nor `data.tokens`.

In reading order:

- `messages`: `Message`, and the function that reads the messages of a conversation.
- `document`: `Document`, `Fault`, and the protocol `Corpus` that every corpus implements.
- `arithmetic`: generated exercises.
- `embedded`: the default corpus, text of the Python installation and exercises.
- `rows`: rows of a table as documents.
- `formats`: the rows or the text of one file: plain text, JSON, CSV, parquet, compressed or not.
- `files`: local files.
- `hub`: a Hugging Face dataset.
- `chat`: conversations as text and token ids, in the `[INST]` format.
- `sft`: conversations in local files.
- `corpus`: the registry of all kinds, and `open_corpus`.
"""
