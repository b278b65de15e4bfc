"""The choice of the documents that are never trained on. Equal documents are always on the same side."""

from collections import Counter


class HeldoutChoice:
    """Chooses held-out documents by the SHA-256 of their text.

    Call `add_document` for every document, in order, and then `choose`.

    A document is held out if its hash is in the first `fraction` of all possible hashes and the held-out text of its
    domain stays within `max_bytes`. In a small corpus, this can leave a domain without a held-out document. The
    document of that domain with the smallest hash is then held out, unless all documents of the domain are equal. If no
    domain has two different documents, the document with the smallest hash of all is held out, unless all are equal.

    Args:
        fraction: the fraction of the documents to hold out.
        max_bytes: the maximum size of a domain's held-out text.
    """

    def __init__(self, fraction: float, max_bytes: int) -> None:
        self.bound = int(fraction * 2**64)
        self.max_bytes = max_bytes
        self._is_heldout: dict[bytes, bool] = {}
        self._heldout_bytes: Counter[str] = Counter()
        self._extremes: dict[str, tuple[bytes, bytes]] = {}
        """Domain -> its smallest and its largest hash."""

    def add_document(self, digest: bytes, domain: str, size: int) -> None:
        """Take a document into account: the SHA-256 of its text, its domain, and its UTF-8 bytes."""
        low, high = self._extremes.get(domain, (digest, digest))
        self._extremes[domain] = (min(low, digest), max(high, digest))
        if int.from_bytes(digest[:8], "big") < self.bound and digest not in self._is_heldout:
            # A document that does not fit is remembered too: the decision must also apply to a copy in another domain.
            self._is_heldout[digest] = self._heldout_bytes[domain] + size <= self.max_bytes
            self._heldout_bytes[domain] += size if self._is_heldout[digest] else 0

    def choose(self) -> set[bytes]:
        """Return the SHA-256 of every held-out document. The set is empty only if all documents are equal."""
        chosen = {digest for digest, is_heldout in self._is_heldout.items() if is_heldout}
        smallest = {
            low for domain, (low, high) in self._extremes.items() if low != high and not self._heldout_bytes[domain]
        }
        chosen |= smallest
        if not chosen and len(lows := {low for low, _ in self._extremes.values()}) > 1:
            chosen = {min(lows)}
        return chosen
