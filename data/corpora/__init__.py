"""Corpora: sources of documents. These modules import neither torch nor `data.tokens`.

In reading order:

- `messages`: `Message`, and the function that reads the messages of a conversation.
- `document`: `Document`, and the protocol `Corpus` that every corpus implements.
- `arithmetic`: generated exercises.
- `embedded`: the default corpus, text of the Python installation and exercises.
- `rows`: rows of a table as documents.
- `files`: local files: plain text, JSON lines, parquet.
- `hub`: a Hugging Face dataset.
- `chat`: conversations as text and token ids, in the `[INST]` format.
- `sft`: conversations in JSON lines.
- `corpus`: the registry of all kinds, and `open_corpus`.
"""
