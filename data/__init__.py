"""From corpora to batches: ingest, tokenizer, token store, packing, resumable loader. Imports nothing of ours."""
