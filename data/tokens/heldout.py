"""Which documents are never trained on: a choice by content, so that equal documents fall on one side."""

from collections import Counter


class HeldoutChoice:
    """Sees every document once, in order; `digests()` are then the SHA-256 of those held out.

    A document is held out when its hash falls into the first `fraction` of all hashes and its domain has room below
    `max_bytes`. A domain that got none this way, in a small corpus, gives the document with the smallest hash,
    unless it is its only one.
    """

    def __init__(self, fraction: float, max_bytes: int) -> None:
        self.bound = int(fraction * 2**64)
        self.max_bytes = max_bytes
        self._decided: dict[bytes, bool] = {}
        self._bytes: Counter[str] = Counter()
        self._extremes: dict[str, tuple[bytes, bytes]] = {}

    def see(self, digest: bytes, domain: str, size: int) -> None:
        low, high = self._extremes.get(domain, (digest, digest))
        self._extremes[domain] = (min(low, digest), max(high, digest))
        if int.from_bytes(digest[:8], "big") < self.bound and digest not in self._decided:
            # Remembered either way: a copy in another domain, which has room, must not land on the other side.
            self._decided[digest] = self._bytes[domain] + size <= self.max_bytes
            self._bytes[domain] += size if self._decided[digest] else 0

    def digests(self) -> set[bytes]:
        chosen = {digest for digest, heldout in self._decided.items() if heldout}
        few = {low for domain, (low, high) in self._extremes.items() if low != high and not self._bytes[domain]}
        return chosen | few
