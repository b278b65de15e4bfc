"""Small tokenizers of the kinds that published models have, made offline."""

import io
import json
import random
from pathlib import Path
from typing import Any

WORDS = "the a of model expert router token loss batch layer data train step window cache system user".split()  # noqa: SIM905


def sample_lines(count: int = 400) -> list[str]:
    """Return lines of random words, always the same."""
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(12)) for _ in range(count)]


def sentencepiece_model(vocab_size: int = 320, **options: Any) -> bytes:
    """Return a sentencepiece model as Llama and Mistral have it: BPE, byte tokens, a space before a text."""
    import sentencepiece

    model = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_lines()), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, **settings,
    )  # fmt: skip
    return model.getvalue()


def splits(*patterns: str, digits: bool = False) -> dict[str, Any]:
    """Return the pre-tokenizer of a byte-level BPE that first splits a text by regular expressions.

    Args:
        digits: whether every digit is a piece of its own.
    """
    parts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    parts += [{"type": "Digits", "individual_digits": True}] if digits else []
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}


QWEN_SPLITS = splits(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenizer of Qwen2 and Qwen3: contractions, words with the character before them, single digits."""
DEEPSEEK_SPLITS = splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", digits=True)
"""A pre-tokenizer as DeepSeek's: line breaks, words, punctuation, CJK characters and digits, one after another."""


def byte_level(specials: list[str], bos: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return a byte-level BPE as Llama 3 and GPT-2 have it, as the content of a tokenizer.json.

    Args:
        specials: the special tokens, which are added after the pieces.
        bos: the one that is put before a text.
        changes: other values for the parts of the file, e.g. `normalizer`.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(sample_lines(), trainer)
    fast.add_special_tokens(specials)
    if bos is not None:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    return json.loads(fast.to_str()) | changes


def sentencepiece_like(specials: list[str], *, legacy: bool) -> dict[str, Any]:
    """Return the tokenizer.json of a Llama tokenizer with added tokens.

    Args:
        legacy: put a space before the text after every special token, as old files do, and not only before a text.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    fast = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    marks = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[*marks, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    fast.train_from_iterator(sample_lines(), trainer)
    fast.pre_tokenizer = None if legacy else pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if legacy:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(parts)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(fast.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] in marks]
    fast = tokenizers.Tokenizer.from_str(json.dumps(content))
    fast.add_special_tokens(specials)
    return json.loads(fast.to_str())


def write_tokenizer(directory: Path, content: dict[str, Any] | None = None, **config: Any) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    if content is not None:
        (directory / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
